"""Law 1 end to end, with the stand-in network: identical trees for every slab shape, worker count, box, after kills."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import zarr
from conftest import GUARD_S, REPOSITORY, TESTS, main_job, run_here, texture, tree, volume_yaml, write_lr

SHAPE = (9, 80, 72)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lr(tmp_path_factory.mktemp("source") / "lr.zarr", texture(SHAPE))


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    main_job(volume_yaml(folder / "v.yaml", source, "sr", network__name="nearest", work__slab_shape=[10, 80, 80]))
    found = tree(folder / "sr")
    assert len(found) > 30
    return found


@pytest.mark.parametrize(("slab", "workers"), [([2, 16, 16], 1), ([4, 32, 48], 2), ([6, 80, 16], 4)])
def test_identical_trees_for_any_slabs_and_workers(
    slab: list[int], workers: int, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    main_job(
        volume_yaml(
            tmp_path / "v.yaml", source, "sr", network__name="nearest", work__slab_shape=slab, cluster__workers=workers
        )
    )
    assert tree(tmp_path / "sr") == undisturbed


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg", "jxl"])
def test_precomputed_trees_too(encoding: str, source: Path, tmp_path: Path) -> None:
    """Also where levels are averaged from what a lossy encoding stored."""
    trees = []
    for slab in ([2, 16, 16], [4, 32, 64], [10, 80, 80]):
        keys = {
            "target__format": "precomputed",
            "target__encoding": encoding,
            "target__shard_shape": None,
            "target__mips": 4,
        }
        run_here(volume_yaml(tmp_path / "v.yaml", source, f"sr{slab[1]}", work__slab_shape=slab, **keys))
        trees.append(tree(tmp_path / f"sr{slab[1]}"))
    assert trees[0] == trees[1] == trees[2]


def test_a_box_in_the_middle_holds_the_same_voxels(source: Path, undisturbed: dict[str, str], tmp_path: Path) -> None:
    main_job(volume_yaml(tmp_path / "all.yaml", source, "all", network__name="nearest"))
    box = {"start": [2, 13, 22], "stop": [8, 61, 50]}
    main_job(volume_yaml(tmp_path / "box.yaml", source, "box", network__name="nearest", source__box=box))
    whole, part = (np.asarray(zarr.open_array(tmp_path / name / "0", mode="r")) for name in ("all", "box"))
    assert (part == whole[2:8, 13 * 8 : 61 * 8, 22 * 8 : 50 * 8]).all()


def test_twenty_kills_of_workers_and_client_leave_the_same_tree(
    source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(3)
    path = volume_yaml(
        tmp_path / "v.yaml", source, "sr", network__name="nearest", work__slab_shape=[2, 32, 32], cluster__workers=2
    )
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "STANDIN_DELAY_S": "0.02"}
    kills, runs = 0, 0
    while kills < 20:
        assert runs < 40
        runs += 1
        with subprocess.Popen(
            [sys.executable, str(TESTS / "run_standin.py"), str(path)], env=environ, stderr=subprocess.PIPE, text=True
        ) as client:
            while client.poll() is None and kills < 20:
                time.sleep(rng.uniform(0.3, 1.5))
                workers = (
                    [p for p in psutil.Process(client.pid).children(recursive=True) if _is_worker(p)]
                    if client.poll() is None
                    else []
                )
                if workers and rng.random() < 0.7:
                    victim = rng.choice(workers)
                    kills += _kill(victim.pid)
                elif workers:
                    kills += _kill(client.pid)
            if kills >= 20 and client.poll() is None:
                _kill(client.pid)
            client.communicate(timeout=GUARD_S)
        if client.returncode == 0 and kills < 20:  # it finished between kills: begin again on a fresh target
            assert tree(tmp_path / "sr") == undisturbed
            (tmp_path / "sr").rename(tmp_path / f"done{runs}")
            (tmp_path / "sr.emsr").rename(tmp_path / f"done{runs}.emsr")
    main_job(path)
    assert tree(tmp_path / "sr") == undisturbed


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _kill(pid: int) -> int:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return 0
    return 1
