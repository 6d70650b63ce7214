"""Training on two devices is training on one with all of their samples: two real processes on the CPU, over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, texture, wait_until, write_lr
from lightning_fabric import Fabric
from safetensors.torch import load_file
from test_train import stage_yaml

from models.config import X8_SMALL
from models.training.crops import Crops, Volume
from models.training.loop import Loop, Recipe, State
from models.training.ranks import Ranks
from models.training.stages import VQGANStage
from pipeline.base import waits
from pipeline.train import main
from pipeline.training.processes import join

VQGAN: dict[str, Any] = {"losses__critic_width": 4, "data__crop": 96, "accelerator": "cpu"}


@pytest.fixture
def hr(tmp_path: Path) -> Path:
    return write_lr(tmp_path / "hr.zarr", texture((8, 96, 96)))


def checkpoint(folder: Path) -> State:
    state: State = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def test_two_devices_take_the_step_of_one_with_both_batches(hr: Path, tmp_path: Path) -> None:
    """After one step Adam's first moments are a tenth of the gradients, which are means over all samples. Codes are
    counted over all of them, and unused rows are put on outputs of both encoders.
    """
    once = VQGAN | {"steps": 1, "losses__adversarial_from": 0, "revive_every": 1, "average": 0.9}
    assert main([str(stage_yaml(tmp_path, "vqgan", output="one", batch=2, **once))]) == 0
    assert main([str(stage_yaml(tmp_path, "vqgan", output="two", devices=2, **once))]) == 0
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    for adam in ("adam", "critic_adam"):
        for number, state in one[adam]["state"].items():
            wanted, found = state["exp_avg"], two[adam]["state"][number]["exp_avg"]
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-9)
    rows, wanted = two["network"]["codebook.weight"], one["network"]["codebook.weight"]
    moved = (wanted.abs() > 2 / len(rows)).any(1)  # a row begins within 1 / rows
    assert moved.sum() > len(rows) / 2
    assert torch.allclose(rows[moved], wanted[moved], atol=1e-2)
    assert torch.equal(two["averaged"]["codebook.weight"][moved], rows[moved])


def held_by_rank(rank: int, folder: Path) -> None:
    """Three steps of stage vqgan, with its critic, tokens drawn at random and rows revived; what it holds is saved."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # rank 0's weights are everybody's
    waited: list[int] = []
    ranks = Ranks(rank, 2, lambda: contextlib.nullcontext(waited.append(1)))
    join(folder, ranks, cuda=False)
    voxels = texture((8, 96, 96))
    volume = Volume(voxels.shape, lambda z, y, x: voxels[z, y, x], np.ones(8, bool))  # type: ignore[arg-type]
    stage = VQGANStage(X8_SMALL, adversarial_from=1, critic_width=4, quantise_from=2, revive_every=1)
    loop = Loop(Fabric(accelerator="cpu", devices=1), stage, Recipe(3, 1, average=0.5), ranks)
    loop.run(Crops([volume], 1, 96, 8), [], lambda *_: None, lambda _: None)
    assert waited, "a rank says that it waits for the others"
    torch.save(loop.state(), folder / f"rank-{rank}.pt")


def test_all_ranks_hold_the_same(tmp_path: Path) -> None:
    """Weights, averages, optimisers, critic and counts, bit by bit."""
    started = [
        multiprocessing.get_context("spawn").Process(target=held_by_rank, args=(rank, tmp_path)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert _equal(first, second)
    assert first["usage"].sum() == 0  # revived in the last step, after which nobody has counted


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def test_ranks_share_the_samples_of_one_batch() -> None:
    voxels = texture((8, 96, 96))
    volume = Volume(voxels.shape, lambda z, y, x: voxels[z, y, x], np.ones(8, bool))  # type: ignore[arg-type]
    crops = Crops([volume], 2, 32, 8)
    whole = crops.batch(7, 3, 4)
    for part, of_whole in enumerate(zip(*(crops.batch(7, 3, 2, rank) for rank in range(2)), strict=True)):
        assert torch.equal(torch.cat(of_whole), whole[part])


def test_two_devices_go_on_to_the_same_weights(
    hr: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps, and two more, are four. The first device says that it waits for the other one to start."""
    monkeypatch.setattr(waits, "SAY_S", 0.2)
    keys: dict[str, Any] = {"losses__adversarial_from": 1, "revive_every": 2, "devices": 2, "average": 0.9}
    keys |= VQGAN | {"steps": 4, "periods": [4]}
    assert main([str(stage_yaml(tmp_path, "vqgan", output="whole", **keys))]) == 0
    assert main([str(stage_yaml(tmp_path, "vqgan", output="parts", **(keys | {"steps": 2})))]) == 0
    assert main([str(stage_yaml(tmp_path, "vqgan", output="parts", **keys))]) == 0
    whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "waiting for the processes of the other devices" in capsys.readouterr().err


@pytest.mark.parametrize("ended", ["rank", "first"])
def test_a_device_that_ends_ends_the_others(hr: Path, tmp_path: Path, ended: str) -> None:
    path = stage_yaml(tmp_path, "vqgan", **VQGAN | {"steps": 100_000, "losses__adversarial": 0.0, "devices": 2})
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        wait_until((tmp_path / "vqgan" / "checkpoint.pt").exists)
        (rank,) = _children(first.pid)
        os.kill(rank if ended == "rank" else first.pid, signal.SIGKILL)
        assert first.stderr is not None
        said = first.stderr.read()
    wait_until(lambda: not Path(f"/proc/{rank}").exists())
    if ended == "rank":
        assert first.returncode == 1
        assert "the process of device 2 was ended by signal 9" in said
        assert "Traceback" not in said


def _children(process: int) -> list[int]:
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_more_devices_than_gpus_are_refused(hr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stage_yaml(tmp_path, "flow", accelerator="cuda", devices=99)
    assert main([str(path)]) == 2
    assert "Wanted: devices: 99" in capsys.readouterr().err
