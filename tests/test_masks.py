"""A mask that leaves a run nothing to do, or that changed since it began, is told: there is no empty `done`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import main_job, texture, tree, volume_yaml, write_lr

from pipeline.base import waits
from pipeline.base.errors import EmsrError, UserError
from pipeline.config import volume
from pipeline.plan.receipt import SKIPPED
from pipeline.prepare import mask_reach
from pipeline.prepare.mask_reach import Reach, reach
from pipeline.prepare.prepare import prepare
from pipeline.prepare.prepared import Prepared
from pipeline.run import main
from pipeline.worker.job import Job
from pipeline.worker.lease import process_lease
from pipeline.worker.open_job import open_job

SHAPE = (4, 64, 64)
COARSE = (45.0, 128.0, 128.0)


def prepared(folder: Path, mask: np.ndarray, nm: tuple[float, float, float] = COARSE, **changes: Any) -> Prepared:
    write_lr(folder / "lr.zarr", texture(SHAPE))
    write_lr(folder / "mask.zarr", mask, nm)
    keys = {"work__slab_shape": [2, 16, 16], "source__mask": {"url": "mask.zarr"}} | changes
    return prepare(volume.load(volume_yaml(folder / "v.yaml", "lr.zarr", "sr", **keys)))


def some(count: int) -> np.ndarray:
    """A mask of 4 x 16 x 16 whose first `count` columns are set, each 4 LR voxels wide."""
    mask = np.zeros((4, 16, 16), np.uint8)
    mask[:, :, :count] = 1
    return mask


@pytest.mark.parametrize(("columns", "touched"), [(16, 32), (4, 8), (1, 8), (5, 16)])
def test_how_many_slabs_a_mask_touches(columns: int, touched: int, tmp_path: Path) -> None:
    assert reach(prepared(tmp_path, some(columns))) == Reach(touched, 32, 32)


def test_of_many_slabs_a_sample_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until one is touched: a mask that seems to touch nothing is looked at longer, and only refused when all are."""
    monkeypatch.setattr(mask_reach, "SAMPLE", 8)
    found = reach(prepared(tmp_path, some(8)))
    assert found is not None
    assert (found.looked, found.slabs) == (8, 32)
    assert 2 <= found.touched <= 6
    lonely = some(0)
    lonely[3, 15, 15] = 1
    found = reach(prepared(tmp_path, lonely))
    assert found is not None
    assert found.touched == 1
    monkeypatch.setattr(mask_reach, "MAX_LOOKED", 16)
    for where in (0, 15):
        lonely = some(0)
        lonely[0, where, where] = 1
        found = reach(prepared(tmp_path, lonely))
        assert found is not None
        assert found.looked <= 16


def test_a_slow_look_at_a_mask_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(waits, "SAY_S", 0.0)
    reach(prepared(tmp_path, some(8)))
    assert "mask.zarr: 31 slabs looked at" in capsys.readouterr().err


def test_a_mask_that_touches_nothing_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = prepared(tmp_path, some(0))
    with pytest.raises(UserError, match="0 of 32 slabs written: the mask"):
        reach(wanted)
    for arguments in (["--dry-run"], []):
        assert main([str(tmp_path / "v.yaml"), *arguments]) == 2
        assert "touches nothing" in capsys.readouterr().err
    assert not list(tmp_path.glob("sr*"))


@pytest.mark.parametrize("far", [(0, 10_000.0, 0), (5_000.0, 0, 0)])
def test_a_mask_that_lies_elsewhere_is_refused(far: tuple[float, float, float], tmp_path: Path) -> None:
    import zarr

    prepared(tmp_path, some(16))
    group = zarr.open_group(tmp_path / "mask.zarr", mode="r+")
    ome = dict(group.attrs["ome"])
    steps = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    steps.append({"type": "translation", "translation": list(far)})
    group.attrs["ome"] = ome
    with pytest.raises(UserError, match="no voxel of it lies there"):
        prepare(volume.load(tmp_path / "v.yaml"))


def test_a_mask_of_too_small_voxels_is_told_by_the_box(tmp_path: Path) -> None:
    """It covers a corner of the volume only, so that a box elsewhere has none of it."""
    with pytest.raises(UserError, match="no voxel of it lies there"):
        prepared(tmp_path, some(16), (45.0, 32.0, 32.0), source__box={"start": [0, 32, 32], "stop": [4, 64, 64]})


def test_a_run_that_wrote_nothing_says_so(tmp_path: Path) -> None:
    """Where it cannot be known before: every slab is constant. Exit code 2, again when it is repeated."""
    write_lr(tmp_path / "lr.zarr", np.full(SHAPE, 9, np.uint8))
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__skip_empty=True)
    for _ in range(2):
        done = main_job(path, "run", check=False)
        assert done.returncode == 2
        assert "slabs written: every one is constant (source.skip_empty)" in done.stderr
        assert "done:" not in done.stdout


def test_a_mask_that_was_moved_between_runs_is_another_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the first run skipped for it would stay skipped."""
    prepared(tmp_path, some(8), network__name="nearest")
    assert main([str(tmp_path / "v.yaml")]) == 0
    before = tree(tmp_path / "sr")
    write_lr(tmp_path / "mask.zarr", some(8), tuple(size / 2 for size in COARSE))  # type: ignore[arg-type]
    assert main([str(tmp_path / "v.yaml")]) == 2
    said = capsys.readouterr().err
    assert "begun with another plan" in said
    assert "source.mask.voxel_size_nm" in said
    assert tree(tmp_path / "sr") == before


def test_a_mask_that_changes_under_a_run(tmp_path: Path) -> None:
    """Its shape, or where it lies: no worker opens the job with another mask than the plan's."""
    job = prepared(tmp_path, some(4)).job
    open_job(job)
    for changed, nm in ((some(4)[:, :8], COARSE), (some(4), (45.0, 64.0, 64.0))):
        write_lr(tmp_path / "mask.zarr", changed, nm)
        with pytest.raises(EmsrError, match="metadata of the mask"):
            process_lease(prepared_again(job), 0, 1)
    write_lr(tmp_path / "mask.zarr", some(4), COARSE)
    assert process_lease(prepared_again(job), 2, 3).receipts[0].index == 2
    assert process_lease(prepared_again(job), job.plan.slabs - 1, job.plan.slabs).receipts[0].state == SKIPPED


def prepared_again(job: Job) -> Job:
    """The same job in another run, which opens everything anew."""
    return replace(job, run=job.run + "x")
