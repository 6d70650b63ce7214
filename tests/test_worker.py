"""One slab on one worker, in this process: what is stored, skipped, tried again and given up."""

from __future__ import annotations

import gc
import threading
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import run_here, texture, volume_yaml, write_lr

from pipeline.base.errors import ClusterError, DiskError, EmsrError, TargetError, TransientError, UserError
from pipeline.config import volume as config
from pipeline.config.volume import SourceConfig
from pipeline.plan.receipt import QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.plan.requests import RequestRates
from pipeline.prepare.prepare import prepare
from pipeline.process import watchdog
from pipeline.storage import requests
from pipeline.storage.sources.open import open_source
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import checksum, object_keys
from pipeline.storage.volume import Source
from pipeline.worker import open_job as open_job_module
from pipeline.worker.job import Job
from pipeline.worker.lease import process_lease
from pipeline.worker.open_job import open_job

SHAPE = (6, 72, 64)
NEAREST = {"network__name": "nearest", "network__cell": 32}


def job_of(folder: Path, voxels: np.ndarray | None = None, **changes: Any) -> Job:
    """12 slabs of 4 x 32 x 32 LR voxels, z fastest, and blocks of coarser levels; metadata of the target is written."""
    write_lr(folder / "lr.zarr", texture(SHAPE) if voxels is None else voxels)
    job = prepare(config.load(volume_yaml(folder / "v.yaml", "lr.zarr", "sr", **NEAREST | changes))).job
    open_target(job.target).create()
    return job


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_of(tmp_path)


def states(job: Job) -> list[int]:
    return [receipt.state for receipt in process_lease(job, 0, job.plan.slabs).receipts]


def only(job: Job, task: int) -> Receipt:
    (receipt,) = process_lease(job, task, task + 1).receipts
    return receipt


def stored(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder / "sr")): f.read_bytes() for f in (folder / "sr").rglob("c/**/*") if f.is_file()}


def test_a_checksum_by_hand() -> None:
    """Over keys and bytes in key order, however the objects come."""
    assert checksum({"b": b"2", "a": b"1"}) == zlib.crc32(b"a1b2")


def test_a_task_stores_what_its_receipt_says_under_the_keys_that_verify_reads(job: Job, tmp_path: Path) -> None:
    for task in range(job.plan.tasks):
        before = stored(tmp_path)
        receipt = only(job, task)
        new = {key: value for key, value in stored(tmp_path).items() if key not in before}
        assert sorted(new) == object_keys(open_target(job.target), job.plan, task)
        assert (receipt.index, receipt.state) == (task, WRITTEN)
        assert receipt.bytes == sum(map(len, new.values()))
        assert receipt.checksum == zlib.crc32(b"".join(key.encode() + new[key] for key in sorted(new)))
    assert {key.split("/")[0] for key in stored(tmp_path)} == {"0", "1", "2", "3", "fidelity"}


def test_a_lease_whose_time_is_over_still_does_one_task(job: Job) -> None:
    """So a run goes on, however slow its tasks are. The others are given back."""
    assert [r.index for r in process_lease(job, 2, 6, max_s=0.0).receipts] == [2]
    assert [r.index for r in process_lease(job, 2, 6).receipts] == [2, 3, 4, 5]


@pytest.mark.parametrize(("column", "written"), [(7, {0}), (8, {1}), (0, {0}), (15, {1})])
def test_a_slab_is_skipped_when_no_mask_voxel_touches_it(column: int, written: set[int], tmp_path: Path) -> None:
    """Mask voxels are 4 LR voxels wide; one column is set, the last before or the first behind a slab's face."""
    mask = np.zeros((6, 18, 16), np.uint8)
    mask[:, :, column] = 1
    write_lr(tmp_path / "mask.zarr", mask, (45.0, 128.0, 128.0))
    job = job_of(tmp_path, source__mask={"url": "mask.zarr"})
    found = states(job)
    for i in range(job.plan.slabs):
        side = job.plan.slab(i).lr.start.x // 32
        assert found[i] == (WRITTEN if side in written else SKIPPED)


def test_a_slab_of_one_grey_level_is_skipped_if_that_is_asked(tmp_path: Path) -> None:
    voxels = texture(SHAPE)
    voxels[:4, :32, :32] = 77
    assert states(job_of(tmp_path, voxels, source__skip_empty=True))[:3] == [SKIPPED, WRITTEN, WRITTEN]
    assert states(job_of(tmp_path, voxels))[:3] == [WRITTEN] * 3


def test_a_shard_that_is_gone_is_no_black_block(tmp_path: Path) -> None:
    """A level is averaged from what is stored: a hole there is told, unless slabs may be skipped, which leave holes."""
    for may_skip in (False, True):
        job = job_of(tmp_path, source__skip_empty=may_skip)
        assert set(states(job)) == {WRITTEN}
        block = job.plan.pyramid_block(job.plan.slabs)
        finer = job.plan.level_box(job.plan.slab(0), block.level - 1)
        Path(tmp_path, "sr", open_target(job.target).keys(block.level - 1, finer)[0]).unlink()
        receipt = only(job, job.plan.slabs)
        assert receipt.state == (WRITTEN if may_skip else QUARANTINED)
        assert may_skip or "MissingChunkError" in receipt.error


def test_stand_ins_are_read_in_the_place_of_bad_sections(tmp_path: Path) -> None:
    """Also where the bad one is the slab's first or last, and its stand-in lies in another slab.

    The slab of sections 0 to 5 is made of 1 1 2 3 3 6: as many as lie between 1 and 6, but not the same.
    """
    voxels = texture((8, 32, 32))
    write_lr(tmp_path / "lr.zarr", voxels)
    keys = NEAREST | {"source__bad_sections": {"list": [0, 4, 5]}, "work__slab_shape": [6, 32, 32]}
    run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys))
    sr = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r"))[:, ::8, ::8]
    assert (sr == voxels[[1, 1, 2, 3, 3, 6, 6, 7]]).all()


def test_a_lease_limits_its_process_to_the_jobs_rates(job: Job) -> None:
    try:
        process_lease(replace(job, rates=RequestRates(1e6, 2e6)), 0, 1)
        assert (requests.READS.per_second, requests.WRITES.per_second) == (1e6, 2e6)
        process_lease(job, 0, 1)
        assert (requests.READS.per_second, requests.WRITES.per_second) == (None, None)
    finally:
        requests.limit(RequestRates())


class Failing:
    """Stands before a function: its first calls fail."""

    def __init__(self, call: Any, times: int, error: Exception) -> None:
        self.call, self.times, self.error, self.calls = call, times, error, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.call(*arguments)


@pytest.fixture
def fails(job: Job, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a part of the open job fail so many times; the job tries twice more."""
    tried_again = replace(job, retries=2)

    def install(part: str, name: str, times: int, error: Exception) -> tuple[Job, Failing]:
        holder = getattr(open_job(tried_again), part)
        failing = Failing(getattr(holder, name), times, error)
        monkeypatch.setattr(holder, name, failing)
        return tried_again, failing

    return install


def test_a_put_is_tried_again_after_a_passing_fault(fails: Any, tmp_path: Path) -> None:
    requests.COUNTER.take()
    job, failing = fails("target", "put", 2, TransientError("503"))
    result = process_lease(job, 0, 1)
    assert (result.receipts[0].state, failing.calls, result.requests.retried) == (WRITTEN, 3, 2)
    failing.calls, failing.times = 0, 3
    assert only(job, 0).state == QUARANTINED


def test_a_full_disk_is_no_slabs_fault(fails: Any) -> None:
    """No slab would fare better: the lease raises, and nothing is quarantined."""
    job, _ = fails("target", "put", 1, UserError("no space left", "", "Free some space"))
    with pytest.raises(TargetError, match="no space left"):
        process_lease(job, 0, 3)


def test_a_disk_that_fails_is_tried_again_and_then_no_slabs_fault(fails: Any) -> None:
    job, failing = fails("target", "put", 2, DiskError("Input/output error"))
    assert only(job, 0).state == WRITTEN
    failing.calls, failing.times = 0, 3
    with pytest.raises(TargetError, match="Input/output error"):
        process_lease(job, 0, 1)


@pytest.mark.parametrize(("times", "state", "calls"), [(2, WRITTEN, 3), (3, QUARANTINED, 3), (9, QUARANTINED, 3)])
def test_the_unforeseen_is_tried_again(times: int, state: int, calls: int, fails: Any) -> None:
    job, failing = fails("network", "tiles", times, ArithmeticError("ours"))
    receipt = only(job, 0)
    assert (receipt.state, failing.calls) == (state, calls)
    assert state == WRITTEN or "ArithmeticError: ours" in receipt.error


def test_bad_data_is_not_tried_again(fails: Any) -> None:
    job, failing = fails("source", "read", 9, UserError("no permission", "", ""))
    assert only(job, 0).state == QUARANTINED
    assert failing.calls == 1


def test_the_task_that_hangs_is_the_one_given_up(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tasks before it are done, those after it are given back. (A worker would end itself afterwards.)"""
    monkeypatch.setattr(watchdog, "exit_soon", lambda: None)
    impatient = replace(job, stall_s=5.0)
    network, free, calls = open_job(impatient).network, threading.Event(), iter(range(99))
    tile = network.tiles

    def hangs(*arguments: Any) -> Any:
        if next(calls) == 2:
            free.wait(60)
        return tile(*arguments)

    monkeypatch.setattr(network, "tiles", hangs)
    try:
        receipts = process_lease(impatient, 3, 9).receipts
    finally:
        free.set()
    assert [(r.index, r.state) for r in receipts] == [(3, WRITTEN), (4, WRITTEN), (5, QUARANTINED)]
    assert "in hangs" in receipts[-1].error


def test_a_job_that_is_not_what_the_client_saw_is_refused(job: Job) -> None:
    with pytest.raises(EmsrError, match="changed while the run was going on"):
        open_job(replace(job, digest="another", source_fingerprint="another"))
    with pytest.raises(ClusterError, match=r"the client has emsr 0\.0\.0"):
        open_job(replace(job, emsr="0.0.0"))


def test_a_process_keeps_the_last_job_open_and_no_other(job: Job) -> None:
    """A worker that lives for months sees many; each holds a network."""
    first = open_job(job)
    assert open_job(job) is first
    open_job(replace(job, digest="another"))
    assert open_job(job) is not first


def test_the_last_job_is_free_before_the_next_one_is_opened(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks at a time may be more than the worker's memory."""
    last = weakref.ref(open_job(job))
    found: list[object] = []

    def look(config: SourceConfig) -> Source:
        gc.collect()
        found.append(last())
        return open_source(config)

    monkeypatch.setattr(open_job_module, "open_source", look)
    open_job(replace(job, digest="another"))
    assert found == [None]


@pytest.mark.parametrize("field", ["run", "target", "retries"])
def test_a_job_is_opened_anew_where_anything_in_it_differs(field: str, job: Job) -> None:
    """The digest is the same; another run reads again what was mended, another target is another place."""
    other = {"run": "another", "target": replace(job.target, url=job.target.url + "-2"), "retries": job.retries + 1}
    first = open_job(job)
    second = open_job(replace(job, **{field: other[field]}))
    assert second is not first
    assert getattr(second.job, field) == other[field]


def test_a_job_with_another_share_of_requests_is_the_same_job(job: Job) -> None:
    """The share changes with the number of workers; nothing is opened again for that."""
    first = open_job(replace(job, rates=RequestRates(10.0, 20.0)))
    assert open_job(replace(job, rates=RequestRates(5.0, 10.0))) is first
