"""The run itself: leases out to Dask, receipts into the ledger. `leases` decides, Dask places, the ledger remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from distributed import Client

from pipeline.plan.plan import Plan
from pipeline.plan.receipt import PENDING, QUARANTINED, WRITTEN, Receipt
from pipeline.plan.task_states import TaskRecord
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.leases import Leases
from pipeline.schedule.results import Work
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals

Progress = Callable[[RunTotals], None]


def execute(client: Client, run: RunState, work: Work, progress: Progress = lambda totals: None) -> None:
    """Run every pending task. Returns when all are closed, or when `run.stop` is set and what was in flight has ended.

    Raises ClusterError when the scheduler or all workers are gone, LedgerError when another run took the target over,
    and whatever a worker raised because it cannot open the job. The ledger is flushed in every case.
    """
    hand_out(client, run, run.ledger, _stages(run), work, progress)


def hand_out(
    client: Client, run: RunState, tasks: TaskRecord, stages: Iterable[range], work: Work, progress: Progress
) -> None:
    """Hand the pending ones of `tasks` out, stage after stage, and record what comes of them. Raises as `execute`."""
    began = time.monotonic()
    in_flight = InFlight(client, run.job, work)
    try:
        for stage in stages:
            _run_stage(run, tasks, stage, Leases(run.job.plan, tasks, stage, began), in_flight, progress)
    finally:
        try:
            in_flight.close()
        finally:
            tasks.close()
    run.interrupted = run.stop.is_set()


def _stages(run: RunState) -> Iterator[range]:
    """The passes, as long as all tasks of those before are written or skipped: a level needs every shard of the one
    before it.
    """
    for stage in run.job.plan.passes():
        before = range(stage.start)
        if stage.start and any(run.ledger.count(state, before) for state in (PENDING, QUARANTINED)):
            return
        yield stage


def _run_stage(
    run: RunState, tasks: TaskRecord, stage: range, leases: Leases, in_flight: InFlight, progress: Progress
) -> None:
    written_after = tasks.count(WRITTEN, range(stage.stop, run.job.plan.tasks))
    while True:
        # A new reason to end a run early stands here, beside a lost lock.
        if run.lock is not None:
            run.lock.hold()
        while not run.stop.is_set() and (lease := leases.next(time.monotonic(), in_flight.capacity())) is not None:
            in_flight.start(lease)
            run.totals.started_again += lease.starts > 1
        if not leases.out:
            return
        receipts: list[Receipt] = []
        for lease, result in in_flight.collect(timeout=0.5):
            if result is not None:
                run.totals.add_result(result)
            if lease.closed:
                continue  # another copy was faster
            receipts += leases.died(lease) if result is None else leases.ended(lease, result.receipts)
            if lease.closed:
                in_flight.cancel_copies(lease)
        for receipt in receipts:
            run.totals.add_receipt(receipt)
        if written_after:
            tasks.record(_outdated(run.job.plan, tasks, receipts))  # with the others or before, never after them
        tasks.record(receipts)
        tasks.tick()
        progress(run.totals)


def _outdated(plan: Plan, tasks: TaskRecord, receipts: list[Receipt]) -> list[Receipt]:
    """Coarser tasks that were averaged from what these have written anew, which had rotted then perhaps: pending
    again.
    """
    written = (receipt.index for receipt in receipts if receipt.state == WRITTEN)
    coarser = {block for index in written for block in plan.averaged_from(index)}
    return [Receipt(block, PENDING) for block in sorted(coarser) if tasks.state(block) == WRITTEN]
