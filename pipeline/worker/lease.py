"""A lease: consecutive tasks, one after another. This is what Dask runs on a worker."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import replace

from pipeline.base.errors import DataError, NoAnswerError, TargetError, TransientError, UserError
from pipeline.base.secrets import redacted
from pipeline.base.waits import LIMIT_S, heartbeat, no_answer, waiting
from pipeline.inference.tiles import SectionCaches
from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.process import allocator, watchdog
from pipeline.process.resident_size import peak_resident_bytes
from pipeline.storage import requests
from pipeline.worker.check import may_freeze, refuse_other_place, runtime
from pipeline.worker.job import Fitness, Job, LeaseResult, Question
from pipeline.worker.open_job import OpenJob, open_job
from pipeline.worker.slab import process_pyramid_block, process_slab
from pipeline.worker.told import name, teller


def process_lease(job: Job, start: int, stop: int, max_s: float = math.inf) -> LeaseResult:
    """Run tasks start .. stop-1. A task that fails for good is a quarantined receipt, never an exception.

    After `max_s` seconds no further task is begun. A task that stalls is quarantined; then this process ends soon. In
    both cases there are fewer receipts than tasks, those of the first ones.

    Raises UserError where this worker cannot open the job at all (a path that it does not see, weights that it lacks,
    too little memory, a disk or server that does not answer) or may not write the target (a full disk, no permission):
    no other task would fare better here.
    """
    requests.limit(job.rates)
    opened: OpenJob | None = None
    receipts: list[Receipt] = []

    def tasks() -> None:
        nonlocal opened
        opened = _opened(job)
        end = time.monotonic() + max_s
        caches: SectionCaches | None = {} if job.plan.lattice.window > 1 else None
        for index in range(start, stop):
            if receipts and time.monotonic() >= end:
                break
            receipts.append(replace(_attempt(opened, index, caches), worker=name()))
            allocator.trim()

    stall = watchdog.run_watched(tasks, job.stall_s, teller(job.run))
    ended = tuple(receipts)
    if stall is not None:
        if opened is None:
            raise _not_opened(job, stall)
        watchdog.exit_soon()
        on = f", waiting for {stall.what}" if stall.what else ""
        why = f"no progress for {job.stall_s:.0f} s (work.stall_s){on}, given up\n\n{stall.stack}"
        index, kind = start + len(ended), NoAnswerError.__name__
        ended += (Receipt(index, QUARANTINED, error=why, fault=kind, seconds=job.stall_s, worker=name()),)
    assert opened is not None
    return LeaseResult(
        ended,
        peak_resident_bytes(),
        opened.base_bytes,
        opened.network.resident,
        requests.COUNTER.take(),
        opened.network.notes,
    )


def check_worker(job: Job, question: Question) -> Fitness:
    """Open the job as for a lease, and look whether source and target are where the client has them.

    Raises what `open_job` and `refuse_other_place` raise, NoAnswerError where they hang.
    """
    found: list[Fitness] = []
    freezes = may_freeze()

    def check() -> None:
        opened = _opened(job)
        refuse_other_place(job, question, opened.source)
        found.append(Fitness(runtime(job.target.encoding), opened.base_bytes, freezes))

    stall = watchdog.run_watched(check, job.stall_s, teller(job.run))
    if stall is not None:
        raise _not_opened(job, stall)
    return found[0]


def _opened(job: Job) -> OpenJob:
    """The job, open. Loading a network is no step, and may take longer than a job's steps."""
    with waiting("the job to be open", max(0.0, LIMIT_S - job.stall_s)):
        return open_job(job)


def _not_opened(job: Job, stall: watchdog.Stall) -> NoAnswerError:
    """The error of a process that hangs while it opens the job. The process ends soon."""
    watchdog.exit_soon()
    return no_answer(f"{name()} waits for {stall.what}", job.stall_s)


def _attempt(opened: OpenJob, index: int, caches: SectionCaches | None) -> Receipt:
    """The task's receipt. Bad data is quarantined at once, anything unforeseen after `retries` further tries."""
    began = time.perf_counter()
    for left in range(opened.job.retries, -1, -1):
        heartbeat()
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
    text = redacted(f"{kind}: {error}\n\n" + "".join(traceback.format_exception(error)))
    return Receipt(index, QUARANTINED, error=text, fault=kind, seconds=time.perf_counter() - began)
