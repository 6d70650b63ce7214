"""A lease: consecutive tasks, one after another. This is what Dask runs on a worker."""

from __future__ import annotations

import math
import os
import socket
import time
import traceback
from dataclasses import replace

from pipeline.base.errors import DataError, TargetError, TransientError, UserError
from pipeline.inference.tiles import SectionCaches
from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.process import allocator, watchdog
from pipeline.process.resident_size import peak_resident_bytes
from pipeline.storage import requests
from pipeline.worker.job import Job, LeaseResult
from pipeline.worker.open_job import OpenJob, open_job
from pipeline.worker.slab import process_pyramid_block, process_slab


def process_lease(job: Job, start: int, stop: int, max_s: float = math.inf) -> LeaseResult:
    """Run tasks start .. stop-1. A task that fails for good is a quarantined receipt, never an exception.

    After `max_s` seconds no further task is begun. A task that stalls is quarantined; then this process ends soon. In
    both cases there are fewer receipts than tasks, those of the first ones.

    Raises UserError where this worker cannot open the job at all (a path that it does not see, weights that it lacks,
    too little memory) or may not write the target (a full disk, no permission): no other task would fare better here.
    """
    requests.limit(job.rates)
    opened = open_job(job)
    end = time.monotonic() + max_s
    caches: SectionCaches | None = {} if job.plan.lattice.window > 1 else None
    receipts: list[Receipt] = []
    worker = f"{socket.gethostname()}:{os.getpid()}"

    def tasks() -> None:
        for index in range(start, stop):
            if receipts and time.monotonic() >= end:
                break
            receipts.append(replace(_attempt(opened, index, caches), worker=worker))
            allocator.trim()

    stuck_at = watchdog.run_watched(tasks, job.stall_s)
    ended = tuple(receipts)
    if stuck_at:
        why = f"no progress for {job.stall_s:.0f} s (work.stall_s), given up\n\n{stuck_at}"
        ended += (Receipt(start + len(ended), QUARANTINED, error=why, seconds=job.stall_s, worker=worker),)
        watchdog.exit_soon()
    return LeaseResult(
        ended, peak_resident_bytes(), opened.base_bytes, opened.network.resident, requests.COUNTER.take()
    )


def check_job(job: Job) -> int:
    """Open the job as every worker will, before anything is written. Returns the process's resident bytes.

    Raises what `open_job` raises.
    """
    return open_job(job).base_bytes


def _attempt(opened: OpenJob, index: int, caches: SectionCaches | None) -> Receipt:
    """The task's receipt. Bad data is quarantined at once, anything unforeseen after `retries` further tries."""
    began = time.perf_counter()
    for left in range(opened.job.retries, -1, -1):
        watchdog.heartbeat()
        try:
            return (
                process_slab(opened, index, caches)
                if index < opened.plan.slabs
                else process_pyramid_block(opened, index)
            )
        except TargetError:
            raise
        except (DataError, TransientError, UserError) as error:
            return Receipt(index, QUARANTINED, error=_text(error), seconds=time.perf_counter() - began)
        except Exception as error:
            if not left:
                return Receipt(index, QUARANTINED, error=_text(error), seconds=time.perf_counter() - began)
    raise AssertionError("unreachable")


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}\n\n" + "".join(traceback.format_exception(error))
