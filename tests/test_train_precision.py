"""What a training computes in: words, defaults, what a checkpoint keeps; and what it says where memory is short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, texture, write_lr
from safetensors import safe_open
from test_train import NO_PRIOR, stage_yaml, tensors

from models.config import X8_SMALL
from models.training.parts import Part, save_part
from models.training.ranks import ALONE
from models.vqgan import VQGAN
from pipeline.config import stage as stage_config
from pipeline.train import main
from pipeline.training import devices
from pipeline.training.run import make_loop, prepare_run

WORDS = {"32-true": "float32", "bf16-mixed": "bfloat16", "16-mixed": "float16"}


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)["settings"]
    return found


@pytest.mark.parametrize("word", ["float32", "tf32", "bfloat16", "float16", *WORDS])
def test_the_earlier_words_mean_the_same(tmp_path: Path, word: str) -> None:
    assert stage_config.load(stage_yaml(tmp_path, "flow", precision=word)).precision == WORDS.get(word, word)


def test_another_word_is_refused(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", precision="fp8"))]) == 2
    assert "'float32', 'tf32', 'bfloat16' or 'float16'" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["tf32", "float16", "16-mixed"])
def test_a_cpu_refuses_what_it_does_not_compute_in(
    hr: Path, tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", precision=word, accelerator="cpu"))]) == 2
    said = capsys.readouterr().err
    assert f"precision {WORDS.get(word, word)}: a CPU does not compute in it. Wanted: float32 or bfloat16" in said
    assert not (tmp_path / "flow").exists()


def test_a_cpu_takes_float32_and_says_so_in_the_card(hr: Path, tmp_path: Path) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", steps=1, accelerator="cpu"))]) == 0
    assert settings(tmp_path / "flow")["precision"] == "float32"
    with safe_open(tmp_path / "flow" / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"])["recipe"]["precision"] == "float32"
    other = {"output": "other", "precision": "bfloat16"}
    assert main([str(stage_yaml(tmp_path, "flow", steps=1, accelerator="cpu", **other))]) == 0
    as_float32, as_bfloat16 = tensors(tmp_path / "flow"), tensors(tmp_path / "other")
    assert any(not torch.equal(as_float32[name], as_bfloat16[name]) for name in as_float32)


def test_a_checkpoint_keeps_its_precision_until_another_is_given(
    hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys: dict[str, Any] = {"accelerator": "cpu", "periods": [9]}
    assert main([str(stage_yaml(tmp_path, "flow", steps=1, precision="bf16-mixed", **keys))]) == 0
    capsys.readouterr()
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, **keys))]) == 0
    assert "precision was" not in capsys.readouterr().err
    assert settings(tmp_path / "flow")["precision"] == "bfloat16"
    assert main([str(stage_yaml(tmp_path, "flow", steps=3, precision="float32", **keys))]) == 0
    assert "precision was bfloat16, is float32" in capsys.readouterr().err
    assert settings(tmp_path / "flow")["precision"] == "float32"


def rewrite(folder: Path, precision: str) -> None:
    """Make the checkpoint one that was written elsewhere, or by an earlier emsr."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["settings"]["precision"] = precision
    torch.save(state, folder / "checkpoint.pt")


def test_a_checkpoint_with_an_earlier_word_is_gone_on_with(
    hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", steps=1, accelerator="cpu"))]) == 0
    rewrite(tmp_path / "flow", "32-true")
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, accelerator="cpu"))]) == 0
    assert "precision was" not in capsys.readouterr().err


def test_a_checkpoint_of_a_gpu_says_what_a_cpu_needs_to_be_told(
    hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", steps=1, accelerator="cpu"))]) == 0
    rewrite(tmp_path / "flow", "tf32")
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, accelerator="cpu"))]) == 2
    said = capsys.readouterr().err
    assert "precision tf32: a CPU does not compute in it" in said
    assert f"The checkpoint in {tmp_path / 'flow'} keeps its own: give another one to change it" in said
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, accelerator="cpu", precision="float32"))]) == 0
    assert "precision was tf32, is float32" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["flow", "vqgan", "indexer", "network"])
def test_mixed_precision_does_not_round_images(hr: Path, tmp_path: Path, stage: str) -> None:
    """Convolutions are bfloat16; what they are given, and what comes out of the network, is float32."""
    vqgan = tmp_path / "vqgan.safetensors"
    save_part(vqgan, Part("vqgan", X8_SMALL, "CC0", VQGAN(X8_SMALL.prior).state_dict(), {}))
    keys: dict[str, Any] = {"indexer": {"network__vqgan": vqgan.name}, "network": NO_PRIOR}.get(stage, {})
    path = stage_yaml(tmp_path, stage, precision="bfloat16", accelerator="cpu", losses__adversarial=0.0, **keys)
    prepared = prepare_run(stage_config.load(path))
    loop = make_loop(prepared, ALONE)
    seen: dict[str, set[torch.dtype]] = {"given": set(), "convolved": set(), "made": set()}
    loop.stage.network.register_forward_pre_hook(lambda _, given: seen["given"].update(x.dtype for x in given))
    first = next(m for m in loop.stage.network.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, given, made: seen["convolved"].add(made.dtype))
    drawn = loop.stage.draw(prepared.crops.batch(0, 0, 1), 0)
    made = loop.stage.losses(loop.network, None, drawn, 0)
    seen["made"].update(loss.dtype for loss in made.values())
    assert seen == {"given": {torch.float32}, "convolved": {torch.bfloat16}, "made": {torch.float32}}


def test_gpus_take_tf32_where_all_of_them_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each kind of GPU has is CUDA's table of compute capabilities: 9.0 is an H100, 7.0 a V100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: [(9, 0), (8, 0), (7, 0)][number])
    assert [devices.choose(count) for count in (0, 1, 2, 3)] == ["float32", "tf32", "tf32", "float32"]
    devices.check("tf32", 2, "")
    with pytest.raises(Exception, match="one of these 3 GPUs does not compute in it"):
        devices.check("tf32", 3, "")


def test_float32_on_a_gpu_is_float32() -> None:
    """PyTorch's own default is TF32 for convolutions."""
    try:
        for precision, count, allowed in (("float32", 1, False), ("tf32", 1, True), ("bfloat16", 0, False)):
            devices.set_rounding(precision, count)
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        devices.set_rounding("float32", 1)


def test_memory_that_is_short_is_said_with_what_takes_it(hr: Path, tmp_path: Path) -> None:
    """The process may take 1 GB more once everything is imported."""
    path = stage_yaml(tmp_path, "vqgan", batch=128, data__crop=64, losses__adversarial=0.0, accelerator="cpu")
    script = """
import resource, sys
import psutil, torch
import pipeline.training.run
from pipeline.train import main
torch.set_num_threads(1)
size = psutil.Process().memory_info().vms + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
sys.exit(main([sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "no memory is left for batch 128 of crop 64" in done.stderr
    assert "Use a smaller batch" in done.stderr
    assert "Traceback" not in done.stderr
