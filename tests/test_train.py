"""`python -m pipeline.train`: four stages one after the other, killed and resumed, and data that nothing can be learnt
from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, texture, write_lr
from safetensors.torch import load_file

from models import build, load, read_metadata
from pipeline.train import main

HR = (8, 72, 72)


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "hr.zarr", texture(HR))


def stage_yaml(folder: Path, stage: str, **changes: Any) -> Path:
    body: dict[str, Any] = {
        "stage": stage,
        "output": stage,
        "data": {
            "train": [{"url": "hr.zarr"}],
            "licence": "CC0",
            "crop": 32,
            "validation_crop": 32,
            "validation_windows": 1,
        },
        "network": {"scale": 8, "preset": "small"},
        "steps": 3,
        "batch": 1,
        "validate_every": 2,
        "checkpoint_every": 1,
        "threads": 1,
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = body
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    path = folder / f"{body['output']}.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


EARLIER = {
    "network__vqgan": "vqgan/last.safetensors",
    "network__indexer": "indexer/last.safetensors",
    "network__flow": "flow/last.safetensors",
}

NO_PRIOR = {"network__mpf": False, "network__untrained": ["flow"]}


def test_four_stages_make_weights_that_the_pipeline_runs(
    hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = {
        "data__validate_on": [{"url": "hr.zarr", "sections": [3, 8]}],
        "data__train": [{"url": "hr.zarr", "sections": [0, 6]}],
    }
    for stage, keys in {
        "flow": {},
        "vqgan": {"losses__adversarial_from": 0, "losses__critic_width": 4, "data__crop": 96, "revive_every": 2},
        "indexer": {"network__vqgan": "vqgan/last.safetensors"},
        "network": EARLIER | {"centres": 2, "half": True, "average": 0.5},
    }.items():
        if stage == "vqgan":
            write_lr(tmp_path / "hr.zarr", texture((8, 96, 96)))
        assert main([str(stage_yaml(tmp_path, stage, **held_out, **keys))]) == 0, capsys.readouterr().err
        said = capsys.readouterr().err
        assert "step 3/3" in said
        assert "steps/s" in said
        assert "  device busy " in said
        assert "left" in said
        lines = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [2, 3]
        assert all(0 < line["device_busy"] <= 1 for line in lines)
        assert list((tmp_path / stage / "tensorboard").iterdir())
    codebook = load_file(tmp_path / "vqgan" / "last.safetensors")["codebook.weight"]
    path = tmp_path / "network" / "best-psnr.safetensors"
    metadata = read_metadata(path)
    assert (metadata.licence, metadata.preset, metadata.scale) == ("CC0", "small", 8)
    assert json.loads(metadata.card)["recipe"]["network"]["vqgan"] == "last.safetensors"
    network = build("gpemsr", 8, "small")
    load(path, network)
    state = network.state_dict()
    assert torch.equal(state["prior.codebook.weight"], codebook.half().float())
    encoder = load_file(tmp_path / "vqgan" / "last.safetensors")["encoder.body.0.conv1.weight"]
    assert torch.equal(state["mask.features.block.conv1.weight"], encoder.half().float())
    assert (tmp_path / "network" / "samples" / "step-0000002-0.png").exists()
    assert "bicubic_psnr" in lines[0]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "last.safetensors")


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        (
            "vqgan",
            {
                "losses__adversarial_from": 2,
                "losses__critic_width": 4,
                "data__crop": 96,
                "average": 0.9,
                "revive_every": 3,
                "quantise_from": 2,
            },
        ),
        (
            "network",
            NO_PRIOR | {"centres": 2, "data__noise": 2.0, "data__drift": 4},
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, stage: str, keys: dict[str, Any]) -> None:
    """The process is killed, not asked; what was not in the last checkpoint is done again."""
    write_lr(tmp_path / "hr.zarr", texture((8, 96, 96)))
    steps = {"steps": 8, "validate_every": 4}
    assert main([str(stage_yaml(tmp_path, stage, output="whole", **steps, **keys))]) == 0
    path = stage_yaml(tmp_path, stage, output="killed", **steps, **keys)
    command = [sys.executable, "-m", "pipeline.train", str(path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.DEVNULL
    ) as process:
        checkpoint = tmp_path / "killed" / "checkpoint.pt"
        deadline = time.monotonic() + 120
        while process.poll() is None and not _at_step(checkpoint, 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
    assert not (tmp_path / "killed" / "last.safetensors").exists()
    assert main([str(path)]) == 0
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def _at_step(checkpoint: Path, step: int) -> bool:
    return checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= step


def test_an_interrupted_run_says_so_and_goes_on(hr: Path, tmp_path: Path) -> None:
    path = stage_yaml(tmp_path, "flow", steps=100_000, checkpoint_every=100_000)
    command = [sys.executable, "-m", "pipeline.train", str(path)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        while "step 1/" not in said:
            said = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "the same command goes on" in rest
    assert "Traceback" not in rest
    assert (tmp_path / "flow" / "checkpoint.pt").exists()


def mistake(data: Callable[[Path], dict[str, Any]], words: str) -> Any:
    return pytest.param(data, words, id=words.replace(" ", "-"))


def flat(folder: Path) -> dict[str, Any]:
    write_lr(folder / "hr.zarr", np.full(HR, 90, np.uint8))
    return {}


def zero_one(folder: Path) -> dict[str, Any]:
    write_lr(folder / "hr.zarr", (texture(HR) > 128).astype(np.uint8))
    return {}


def not_a_number(folder: Path) -> dict[str, Any]:
    voxels = texture(HR).astype(np.float32)
    voxels[3] = np.nan
    write_lr(folder / "hr.zarr", voxels)
    return {}


def one_section(folder: Path) -> dict[str, Any]:
    write_lr(folder / "hr.zarr", texture((1, *HR[1:])))
    return {}


def small_lr(folder: Path) -> dict[str, Any]:
    write_lr(folder / "lr.zarr", texture((8, 8, 8)))
    return {"data__train": [{"url": "hr.zarr", "lr": "lr.zarr"}]}


def other_lr(folder: Path) -> dict[str, Any]:
    write_lr(folder / "lr.zarr", texture((8, 9, 9), seed=5))
    return {"data__train": [{"url": "hr.zarr", "lr": "lr.zarr"}]}


def sixteen_bit(folder: Path) -> dict[str, Any]:
    write_lr(folder / "hr.zarr", texture(HR).astype(np.uint16) * 200)
    return {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        mistake(flat, "every section is constant"),
        mistake(zero_one, "grey values of 0 and 1 only"),
        mistake(not_a_number, "float32"),
        mistake(one_section, "5 consecutive ones"),
        mistake(small_lr, "its HR divided by 8"),
        mistake(other_lr, "do not show the same"),
        mistake(sixteen_bit, "intensity_window"),
        mistake(lambda folder: {"data__crop": 96}, "at least data.crop"),
        mistake(lambda folder: {"data__crop": 40}, "multiple of 32"),
        mistake(lambda folder: {"data__train": [{"url": "hr.zarr", "sections": [2, 9]}]}, "sections within"),
        mistake(lambda folder: {"data__train": [{"url": "hr.zarr", "bad_sections": [3]}]}, "5 consecutive ones"),
        mistake(lambda folder: {"data__train": [{"url": "no.zarr"}]}, "no.zarr"),
        mistake(lambda folder: {"network__mpf": True}, "network.vqgan, the file of an earlier stage"),
        mistake(lambda folder: {"network__flow": "hr.zarr"}, "hr.zarr"),
        mistake(lambda folder: {"losses__perceptual": 1.0}, "losses.lpips_alex"),
        mistake(lambda folder: {"data__licence": None}, "data.licence"),
        mistake(lambda folder: {"step": 3}, "Did you mean steps?"),
    ],
)
def test_mistakes_are_refused_before_the_first_step(
    hr: Path, tmp_path: Path, damage: Callable[[Path], dict[str, Any]], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = NO_PRIOR | damage(tmp_path)
    assert main([str(stage_yaml(tmp_path, "network", **changes))]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("network/*"))
