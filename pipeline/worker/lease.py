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
from pipeline.worker.check import refuse_other_place, runtime
from pipeline.worker.job import Fitness, Job, LeaseResult, Question
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


def check_worker(job: Job, question: Question) -> Fitness:
    """Open the job as for a lease, and look whether source and target are where the client has them.

    Raises what `open_job` and `refuse_other_place` raise.
    """
    opened = open_job(job)
    refuse_other_place(job, question, opened.source)
    return Fitness(runtime(), opened.base_bytes)


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
            return _failed(index, error, began)
        except Exception as error:
            if not left:
                return _failed(index, error, began)
    raise AssertionError("unreachable")


def _failed(index: int, error: Exception, began: float) -> Receipt:
    kind = type(error).__name__
    text = f"{kind}: {error}\n\n" + "".join(traceback.format_exception(error))
    return Receipt(index, QUARANTINED, error=text, fault=kind, seconds=time.perf_counter() - began)
