"""These tasks sleep and put one small object, for runs of the real schedule on real workers without a network.

A task's index is in its object; a lease puts one more when it begins. A task sleeps `TASK_S` seconds (0.05). `HANGS`
names one that sleeps for ten minutes when it is tried first, and only then. `EMPTY` is how many first tasks are
skipped.
"""

from __future__ import annotations

import os
import time

from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import NetworkConfig, SourceConfig
from pipeline.inference.describe import describe
from pipeline.plan.plan import Plan
from pipeline.plan.receipt import SKIPPED, WRITTEN, Receipt
from pipeline.plan.target_spec import TargetSpec
from pipeline.storage.kv import Store
from pipeline.worker.job import Job, LeaseResult


def job_of(folder: str, columns: int, depth: int) -> Job:
    """The job's volume exists nowhere; its target is `folder`."""
    box = Box.of((0, 0, 0), (depth, 8, 8 * columns))
    network = describe(NetworkConfig(name="nearest", scale=8))
    plan = Plan(box, box, ZYX(1, 8, 8), 8, network.lattice, (), None)
    target = TargetSpec(f"file://{folder}", "ome-zarr", "raw", 8, (1, 1, 1), (0, 0, 0), (), None)
    return Job("0" * 64, SourceConfig(url="file:///nowhere"), "", network, plan, target, 0, 600)


def sleep_and_put(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
    """Like process_lease, but for what a task does."""
    store = Store(job.target.url)
    store.put(f"lease-{start}", b"")
    receipts: list[Receipt] = []
    end = time.monotonic() + max_s
    for index in range(start, stop):
        if receipts and time.monotonic() >= end:
            break
        began = time.monotonic()
        if index < int(os.environ.get("EMPTY", "0")):
            receipts.append(Receipt(index, SKIPPED, seconds=time.monotonic() - began))
            continue
        time.sleep(
            600
            if os.environ.get("HANGS") == str(index) and _first_try(job, index)
            else float(os.environ.get("TASK_S", "0.05"))
        )
        store.put(f"task-{index}", str(index).encode())
        receipts.append(Receipt(index, WRITTEN, seconds=time.monotonic() - began))
    return LeaseResult(tuple(receipts), 0, 0)


def _first_try(job: Job, index: int) -> bool:
    try:
        os.close(os.open(f"{job.target.url.removeprefix('file://')}/tried-{index}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def nothing(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
    """A lease of which no task was begun."""
    return LeaseResult((), 0, 0)
