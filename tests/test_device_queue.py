"""A device is given the next slab while it computes the one before; what its seconds are; how many slabs that takes."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import GUARD_S, texture, volume_yaml, wait_until, write_lr
from numpy.typing import NDArray

from pipeline.cluster import connect as cluster
from pipeline.cluster.connect import slabs_in_flight
from pipeline.config import volume as config
from pipeline.config.cluster import ClusterConfig
from pipeline.config.volume import Config
from pipeline.inference.tiles import Pending
from pipeline.plan.receipt import WRITTEN
from pipeline.prepare.prepare import prepare
from pipeline.storage.targets.open import open_target
from pipeline.worker import slab as one_slab
from pipeline.worker.device_queue import DeviceQueue
from pipeline.worker.lease import process_lease


class Device:
    """Slabs are numbered as they begin. Each is computed when the test lets it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.waited_for: list[str] = []
        self.let = {name: threading.Event() for name in "abc"}

    def begin(self, name: str, fault: Exception | None = None) -> Pending:
        self.begun.append(name)
        return Computed(lambda: self._computed(name, fault))

    def _computed(self, name: str, fault: Exception | None) -> None:
        self.waited_for.append(name)
        assert self.let[name].wait(GUARD_S)
        if fault is not None:
            raise fault


class Computed(Pending):
    def __init__(self, wait: Callable[[], None], voxels: NDArray[np.uint8] | None = None) -> None:
        self._wait, self._sr = wait, np.zeros((1, 8, 8), np.uint8) if voxels is None else voxels

    def finish(self) -> NDArray[np.uint8]:
        self._wait()
        return self._sr


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    for event in device.let.values():
        event.set()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def test_a_slab_begins_while_the_one_before_is_computed_and_ends_after_it(
    device: Device, threads: ThreadPoolExecutor
) -> None:
    """The device has all three before the host has heard of the first one's end, and they are waited for in turn."""
    queue = DeviceQueue()
    running = {}
    for name in "abc":
        running[name] = threads.submit(queue.compute, lambda name=name: device.begin(name))  # type: ignore[misc]
        wait_until(lambda name=name: name in device.begun)  # type: ignore[misc]
    assert not any(future.done() for future in running.values())
    for name in "cba":
        device.let[name].set()
    for name in "abc":
        running[name].result(GUARD_S)
    assert device.waited_for == ["a", "b", "c"]


def test_seconds_by_hand(device: Device, threads: ThreadPoolExecutor) -> None:
    """`a` begins at 1, `b` at 2 while `a` is computed; `a` ends at 5, `b` at 9. `c` comes at 20, when all is done."""
    clock = iter([1.0, 2.0, 5.0, 9.0, 20.0, 23.0])
    queue = DeviceQueue(lambda: next(clock))
    a = threads.submit(queue.compute, lambda: device.begin("a"))
    wait_until(lambda: device.begun == ["a"])
    b = threads.submit(queue.compute, lambda: device.begin("b"))
    wait_until(lambda: device.begun == ["a", "b"])
    for event in device.let.values():
        event.set()
    assert [a.result(GUARD_S)[1], b.result(GUARD_S)[1]] == [4.0, 4.0]
    assert queue.compute(lambda: device.begin("c"))[1] == 3.0


def test_the_seconds_of_all_slabs_are_no_more_than_the_time_that_passed() -> None:
    """The clock counts how often it was looked at, so every order of threads has a time of its own."""
    ticks = itertools.count()
    queue = DeviceQueue(lambda: float(next(ticks)))
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(queue.compute, lambda: Computed(lambda: None)) for _ in range(200)]
        seconds = [future.result(GUARD_S)[1] for future in done]
    assert all(each > 0 for each in seconds)
    assert sum(seconds) <= next(ticks)


def test_a_slab_that_fails_holds_up_no_other_and_keeps_its_seconds(device: Device, threads: ThreadPoolExecutor) -> None:
    clock = iter([1.0, 2.0, 5.0, 9.0])
    queue = DeviceQueue(lambda: next(clock))
    a = threads.submit(queue.compute, lambda: device.begin("a", ArithmeticError("no numbers")))
    wait_until(lambda: device.begun == ["a"])
    b = threads.submit(queue.compute, lambda: device.begin("b"))
    wait_until(lambda: device.begun == ["a", "b"])
    device.let["a"].set()
    device.let["b"].set()
    with pytest.raises(ArithmeticError, match="no numbers"):
        a.result(GUARD_S)
    assert b.result(GUARD_S)[1] == 4.0


def test_a_slab_that_does_not_begin_holds_up_no_other(device: Device) -> None:
    queue = DeviceQueue()
    with pytest.raises(ZeroDivisionError):
        queue.compute(lambda: device.begin(str(1 // 0)))
    device.let["a"].set()
    assert queue.compute(lambda: device.begin("a"))[0].shape == (1, 8, 8)


def test_slabs_are_encoded_and_put_while_the_device_has_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two leases of a real job: no slab's voxels come before the device has been given another one."""
    write_lr(tmp_path / "lr.zarr", texture((16, 32, 32)))
    job = prepare(config.load(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", network__name="nearest"))).job
    open_target(job.target).create()
    slabs = job.plan.slabs
    begun = threading.Semaphore(0)
    monkeypatch.setattr(one_slab, "begin", give_when_another_has_begun(one_slab.begin, begun, slabs))
    with ThreadPoolExecutor(2) as pool:
        leases = [pool.submit(process_lease, job, first, first + slabs // 2) for first in (0, slabs // 2)]
        receipts = [receipt for lease in leases for receipt in lease.result(GUARD_S).receipts]
    assert {receipt.state for receipt in receipts} == {WRITTEN}
    assert len(receipts) == slabs == 4


def give_when_another_has_begun(real: Any, begun: threading.Semaphore, slabs: int) -> Callable[..., Pending]:
    """`begin` of a device whose slab ends when a later one has begun; the last one's ends by itself."""
    count = itertools.count(1)

    def begin(*arguments: Any) -> Pending:
        voxels = real(*arguments).finish()
        number = next(count)
        if number > 1:
            begun.release()

        def wait() -> None:
            assert number == slabs or begun.acquire(timeout=GUARD_S)

        return Computed(wait, voxels)

    return begin


def volume(tmp_path: Path, in_flight: int | None = None, **cluster_keys: Any) -> Config:
    path = volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", work__in_flight=in_flight)
    return config.load(path).model_copy(update={"cluster": ClusterConfig(**cluster_keys)})


JOBS: dict[str, Any] = {"kind": "slurm", "host": "127.0.0.1", "slurm": {"walltime": "01:00:00", "memory": "2GB"}}
PODS: dict[str, Any] = {"kind": "kubernetes", "kubernetes": {"image": "emsr:1", "memory": "8GiB"}}


@pytest.mark.parametrize(
    ("visible", "keys", "slabs"),
    [
        ("", {}, 2),
        ("0", {}, 3),
        ("0,1,2,3", {"workers": 2}, 3),
        ("0,1", {"gpus_per_worker": 0}, 2),
        ("0", {"kind": "address", "address": "tcp://a:1"}, 2),
        ("0", JOBS, 2),
        ("", JOBS | {"gpus_per_worker": 1}, 3),
        ("", PODS | {"gpus_per_worker": 1}, 3),
        ("", PODS | {"gpus_per_worker": 0}, 2),
    ],
)
def test_a_worker_with_a_gpu_has_three_slabs_in_flight(
    visible: str, keys: dict[str, Any], slabs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs here say nothing of those of jobs, and of workers that are there nothing is known. A given number counts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert slabs_in_flight(volume(tmp_path, **keys)) == slabs
    assert slabs_in_flight(volume(tmp_path, 5, **keys)) == 5


def test_a_machine_has_a_worker_for_each_gpu_or_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = cluster.worker_count(ClusterConfig(gpus_per_worker=0))
    for visible, workers in {"0,1,2,3,4,5,6,7": 8, "7": 1, "MIG-1,MIG-2": 2, "": cores, "-1": cores}.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert cluster.worker_count(ClusterConfig()) == workers
        assert cluster.worker_count(ClusterConfig(workers=3)) == 3


def test_a_job_asks_for_a_core_for_each_slab_and_one_for_the_gpu() -> None:
    assert ClusterConfig(**JOBS, gpus_per_worker=1).cores(3) == 4
    assert ClusterConfig(**JOBS, gpus_per_worker=0).cores(2) == ClusterConfig(**JOBS).cores(2) == 2
