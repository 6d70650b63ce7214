"""Workers that outlive a run: what one run left open in them never serves another one in its place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import texture, tree, volume_yaml, write_lr

from pipeline.run import main
from pipeline.verify import main as verify


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A scheduler and one worker process, as an administrator starts them."""
    folder = tmp_path_factory.mktemp("cluster")
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    described = folder / "scheduler.json"
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen(
        [*start, "--no-dashboard", "--scheduler-file", str(described)], env=environ, stderr=subprocess.DEVNULL
    )
    start = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(described)]
    worker = subprocess.Popen(
        [*start, "--nthreads", "2", "--no-nanny", "--no-dashboard", "--memory-limit", "0"],
        env=environ,
        cwd=folder,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not described.exists() or not described.read_text():
            assert scheduler.poll() is None
            time.sleep(0.1)
        yield json.loads(described.read_text())["address"]
    finally:
        worker.kill()
        scheduler.kill()
        worker.wait()
        scheduler.wait()


def volume(tmp_path: Path, address: str, target: str, source: Path | None = None) -> Path:
    source = source or write_lr(tmp_path / "lr.zarr", texture((8, 32, 32)))
    return volume_yaml(
        tmp_path / "volume.yaml", source, tmp_path / target, cluster={"kind": "address", "address": address}
    )


def test_a_second_target_of_the_same_plan_is_written_in_its_own_place(tmp_path: Path, address: str) -> None:
    """Both have one digest, which says nothing of where the target lies."""
    assert main([str(volume(tmp_path, address, "one.zarr"))]) == 0
    first = tree(tmp_path / "one.zarr")
    shutil.rmtree(tmp_path / "one.zarr")
    assert main([str(volume(tmp_path, address, "two.zarr", tmp_path / "lr.zarr"))]) == 0
    assert tree(tmp_path / "two.zarr") == first
    assert not (tmp_path / "one.zarr").exists(), "the worker wrote to the first place again"


def test_a_moved_target_is_finished_where_it_lies_now(tmp_path: Path, address: str) -> None:
    """Some slabs are done, both folders move, target.url follows, the same command: as docs/operations.md allows."""
    assert main([str(volume(tmp_path, address, "old/sr.zarr"))]) == 0
    whole = tree(tmp_path / "old/sr.zarr")
    (tmp_path / "old").rename(tmp_path / "new")
    next(path for path in (tmp_path / "new/sr.zarr/0/c").rglob("*") if path.is_file()).unlink()
    yaml_path = volume(tmp_path, address, "new/sr.zarr", tmp_path / "lr.zarr")
    assert verify([str(yaml_path), "--requeue"]) == 1
    assert main([str(yaml_path)]) == 0
    assert tree(tmp_path / "new/sr.zarr") == whole
    assert not (tmp_path / "old").exists()
    assert verify([str(yaml_path)]) == 0


def test_a_mended_chunk_is_read_again(tmp_path: Path, address: str) -> None:
    """A worker remembers chunks that it has read, and that one was absent: not beyond the run."""
    voxels = texture((8, 32, 32))
    source = write_lr(tmp_path / "lr.zarr", voxels)
    chunk = source / "0" / "c" / "1" / "1" / "1"
    kept = chunk.read_bytes()
    chunk.unlink()
    yaml_path = volume(tmp_path, address, "sr.zarr", source)
    assert main([str(yaml_path)]) == 1
    chunk.write_bytes(kept)
    assert main([str(yaml_path)]) == 0
    whole = volume(tmp_path, address, "whole.zarr", source)
    assert main([str(whole)]) == 0
    found, wanted = (np.asarray(zarr.open_array(tmp_path / name / "0", mode="r")) for name in ("sr.zarr", "whole.zarr"))
    np.testing.assert_array_equal(found, wanted)
