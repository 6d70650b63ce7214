"""A training loses nothing and goes on: full disks, losses that are not finite, rot, kills, two at once, other data."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import REPOSITORY, texture, wait_until, write_lr
from safetensors import safe_open
from test_train import NO_PRIOR, stage_yaml, tensors

from pipeline.train import main
from pipeline.training import run_folder

VQGAN: dict[str, Any] = {"losses__adversarial": 0.0}


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "hr.zarr", texture((8, 72, 72)))


def train(path: Path, before: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
    )


def network(folder: Path, name: str = "checkpoint.pt") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / name, weights_only=True)["network"]
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_that_may_not_be_written(hr: Path, tmp_path: Path) -> None:
    """The process may write no file of more than 1 MB: the checkpoint before stays, nothing unfinished does."""
    assert main([str(stage_yaml(tmp_path, "vqgan", **VQGAN, steps=2))]) == 0
    before = (tmp_path / "vqgan" / "checkpoint.pt").read_bytes()
    longer = stage_yaml(tmp_path, "vqgan", **VQGAN, steps=4)
    with train(longer, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))) as process:
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 2, said
    assert f"{tmp_path / 'vqgan'}: a file would be larger than this process may write" in said
    assert "MB for what was being written. Raise `ulimit -f`" in said
    assert "Traceback" not in said
    assert (tmp_path / "vqgan" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "vqgan").glob("*.unfinished"))
    assert main([str(longer)]) == 0


def test_space_is_looked_at_before_the_first_step(
    hr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: Usage(50_000_000))
    assert main([str(stage_yaml(tmp_path, "vqgan", **VQGAN))]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'vqgan'}: no space for this training (50.0 MB are free)" in said
    assert "step 1" not in said


def test_the_space_that_is_asked_for_is_what_a_run_takes(
    hr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("pipeline.training.run.check_space", lambda _, checkpoint, weights: asked.append(checkpoint))
    keys = {"losses__adversarial_from": 0, "losses__critic_width": 4, "data__crop": 96, "average": 0.5}
    write_lr(tmp_path / "hr.zarr", texture((8, 96, 96)))
    assert main([str(stage_yaml(tmp_path, "vqgan", steps=1, **keys))]) == 0
    assert asked[0] == pytest.approx((tmp_path / "vqgan" / "checkpoint.pt").stat().st_size, rel=0.05)


def test_a_step_that_is_not_finite(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The state before it is the checkpoint. Without a change the step is left out, with one it is tried again."""
    folder = tmp_path / "vqgan"
    assert main([str(stage_yaml(tmp_path, "vqgan", **VQGAN, steps=2))]) == 0
    good = network(folder)
    spoilt = stage_yaml(tmp_path, "vqgan", **VQGAN, steps=6, losses__codebook=1e38)
    capsys.readouterr()
    assert main([str(spoilt)]) == 2
    said = capsys.readouterr().err
    assert "step 3: a gradient is not finite" in said
    assert "Lower rate (0.0004)" in said
    assert "Traceback" not in said
    assert equal(network(folder), good)
    assert main([str(spoilt)]) == 2
    said = capsys.readouterr().err
    assert "the update of step 3, which was not finite, is left out (1 so far)" in said
    assert "step 4: a gradient is not finite" in said
    assert equal(network(folder), good)
    assert main([str(stage_yaml(tmp_path, "vqgan", **VQGAN, steps=6))]) == 0
    said = capsys.readouterr().err
    assert "going on from step 3" in said
    assert "losses.codebook was 1e+38, is 10.0" in said
    with safe_open(folder / "last.safetensors", "pt") as file:
        assert json.loads(file.metadata()["facts"])["skipped_updates"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in network(folder).values())


def test_two_trainings_in_one_folder(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage_yaml(tmp_path, "flow", steps=100_000)
    with train(path) as process:
        wait_until((tmp_path / "flow" / "checkpoint.pt").exists)
        assert main([str(path)]) == 2
        assert f"in use by another training (process {process.pid} on" in capsys.readouterr().err
        process.kill()
    assert main([str(stage_yaml(tmp_path, "flow", steps=2))]) in (0, 2)  # the lock has ended with its holder
    assert "in use" not in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(
    hr: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", output="whole", steps=6))]) == 0
    assert main([str(stage_yaml(tmp_path, "flow", output="hurt", steps=4, periods=[6]))]) == 0
    path = stage_yaml(tmp_path, "flow", output="hurt", steps=6, periods=[6])
    checkpoint = tmp_path / "hurt" / "checkpoint.pt"
    _damage(checkpoint, damage)
    assert main([str(path)]) == 0
    said = capsys.readouterr().err
    assert f"{checkpoint} is damaged" in said
    assert "going on from step 3" in said
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "hurt"))
    for name in ("checkpoint.pt", "checkpoint-before.pt"):
        _damage(tmp_path / "hurt" / name, damage)
    assert main([str(path)]) == 2
    assert "to begin anew" in capsys.readouterr().err


def _damage(path: Path, how: str) -> None:
    stored = bytearray(path.read_bytes())
    if how == "flipped":
        stored[len(stored) // 2] ^= 1
    path.write_bytes(stored[: {"flipped": len(stored), "cut": len(stored) // 2, "emptied": 0}[how]])


def test_killed_while_checkpoints_are_written(hr: Path, tmp_path: Path) -> None:
    """Killed again and again, each time as soon as a checkpoint is being written, it reaches the same weights."""
    keys: dict[str, Any] = VQGAN | {"steps": 8, "data__validate_on": [{"url": "hr.zarr"}]}
    assert main([str(stage_yaml(tmp_path, "vqgan", output="whole", **keys))]) == 0
    path = stage_yaml(tmp_path, "vqgan", output="killed", **keys)
    unfinished = tmp_path / "killed" / "checkpoint.unfinished"
    for _ in range(3):
        unfinished.unlink(missing_ok=True)
        with train(path) as process:
            wait_until(lambda: (tmp_path / "killed" / "checkpoint.pt").exists() or process.poll() is not None)
            while process.poll() is None and not unfinished.exists():
                pass
            process.kill()
    assert main([str(path)]) == 0
    assert not unfinished.exists()
    assert equal(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
    lines = [json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_other_voxels_are_refused_and_moved_folders_are_not(
    hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out: dict[str, Any] = {"data__validate_on": [{"url": "hr.zarr"}]}
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, **held_out))]) == 0
    voxels = texture((8, 72, 72))
    voxels[5, 1, 1] ^= 1
    write_lr(hr, voxels)
    longer = stage_yaml(tmp_path, "flow", steps=3, **held_out)
    capsys.readouterr()
    assert main([str(longer)]) == 2
    assert "data.train[0].url was voxels" in capsys.readouterr().err
    write_lr(hr, texture((8, 72, 72)))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move(hr, moved / "raw.zarr")
    shutil.move(tmp_path / "flow", moved / "run")
    there = {"data__train": [{"url": "raw.zarr"}], "data__validate_on": [{"url": "raw.zarr"}]}
    assert main([str(stage_yaml(moved, "flow", output="run", steps=3, **there))]) == 0
    assert "going on from step 2" in capsys.readouterr().err


def test_changed_keys_are_named_with_both_values(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(stage_yaml(tmp_path, "flow", steps=3, data__validate_on=[{"url": "hr.zarr"}]))]) == 0
    assert main([str(stage_yaml(tmp_path, "flow", steps=3, batch=2, data__crop=64))]) == 2
    said = capsys.readouterr().err
    assert "batch times devices was 1, is 2, data.crop was 32, is 64" in said
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, data__validate_on=[{"url": "hr.zarr"}]))]) == 2
    assert "steps is 2, but the checkpoint in" in capsys.readouterr().err
    longer = stage_yaml(tmp_path, "flow", steps=5, rate=1e-5, data__validate_on=[{"url": "hr.zarr"}])
    assert main([str(longer)]) == 0
    assert "rate was 0.0004, is 1e-05, steps was 3, is 5" in capsys.readouterr().err
    noted = [json.loads(line) for line in (tmp_path / "flow" / "metrics.jsonl").read_text().splitlines()]
    assert {"step": 3, "changed": {"rate": [4e-4, 1e-5], "steps": [3, 5]}} in noted


@pytest.mark.parametrize("copied", [False, True])
def test_sections_in_training_and_validation_are_told(
    hr: Path, tmp_path: Path, copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """By their place, and by their voxels where a copy lies elsewhere."""
    other = "hr.zarr"
    if copied:
        other = shutil.copytree(hr, tmp_path / "copy.zarr").name
    data: dict[str, Any] = {
        "data__train": [{"url": "hr.zarr", "sections": [0, 5], "bad_sections": [3]}],
        "data__validate_on": [{"url": other, "sections": [2, 8]}],
    }
    assert main([str(stage_yaml(tmp_path, "flow", steps=2, **data))]) == 0
    assert "emsr: 2 sections validated on that are also trained on" in capsys.readouterr().err
    note = {"sections_validated_on_that_are_also_trained_on": 2}
    assert note.items() <= json.loads((tmp_path / "flow" / "metrics.jsonl").read_text()).items()
    with safe_open(tmp_path / "flow" / "last.safetensors", "pt") as file:
        assert note.items() <= json.loads(file.metadata()["facts"]).items()
    data["data__validate_on"] = [{"url": other, "sections": [5, 8]}]
    assert main([str(stage_yaml(tmp_path, "flow", output="apart", steps=2, **data))]) == 0
    assert "also trained on" not in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hang_up_ends_a_run_as_sigterm_does_unless_it_is_ignored(hr: Path, tmp_path: Path, ignored: bool) -> None:
    path = stage_yaml(tmp_path, "flow", steps=100_000, checkpoint_every=100_000)
    disposition = signal.SIG_IGN if ignored else signal.SIG_DFL  # whatever these tests themselves run under
    with train(path, lambda: signal.signal(signal.SIGHUP, disposition) and None) as process:
        assert process.stderr is not None
        while "step 1/" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGHUP)
        if ignored:
            assert "step" in process.stderr.readline()
            process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert (tmp_path / "flow" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"network__mpf": False}, "network.flow, the file of an earlier stage, or network.untrained: [flow]"),
        (NO_PRIOR | {"network__mpf": True, "network__preset": "paper"}, "network.vqgan"),
        (
            {"network__preset": "paper", "network__vqgan": "v", "network__indexer": "i", "network__flow": "f"},
            "network.vgg19, the file of an earlier stage, or network.untrained: [vgg19]",
        ),
    ],
)
def test_frozen_parts_are_not_random_in_silence(
    hr: Path, tmp_path: Path, keys: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(stage_yaml(tmp_path, "network", **keys))]) == 2
    assert words in capsys.readouterr().err


def test_an_output_that_is_no_folder(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flow").write_text("")
    assert main([str(stage_yaml(tmp_path, "flow"))]) == 2
    assert f"{tmp_path / 'flow'} is a file. Wanted: a folder" in capsys.readouterr().err
