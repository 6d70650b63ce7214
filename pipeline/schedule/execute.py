"""The run itself: leases out to Dask, receipts into the ledger. `leases` decides, Dask places, the ledger remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from distributed import Client

from pipeline.plan.plan import Plan
from pipeline.plan.receipt import PENDING, QUARANTINED, WRITTEN, Receipt
from pipeline.plan.task_states import TaskRecord
from pipeline.schedule.crew import Crew
from pipeline.schedule.faults import Faults
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.leases import Lease, Leases
from pipeline.schedule.ramp import Ramp
from pipeline.schedule.results import Work
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals

Progress = Callable[[RunTotals], None]

DRAIN_S = 300.0
"""A run that was told to stop lets go what is in flight when nothing of it has ended for so long."""


def execute(
    client: Client,
    run: RunState,
    work: Work,
    progress: Progress = lambda totals: None,
    crew: Crew | None = None,
) -> None:
    """Run every pending task. Returns when all are closed, or when `run.stop` is set and what was in flight has ended,
    or nothing of it ends any more.

    Leases go to the fit workers of `crew`, to all that are there where it is not given. Raises ClusterError when the
    scheduler or all workers are gone or tasks fail alike on all of them, LedgerError when another run took the target
    over, and what the last worker raised that was set aside. The ledger is flushed in every case.
    """
    hand_out(run, InFlight(client, run.job, work, crew, run.hold), run.ledger, _stages(run), progress)


def hand_out(
    run: RunState, in_flight: InFlight, tasks: TaskRecord, stages: Iterable[range], progress: Progress
) -> None:
    """Hand the pending ones of `tasks` out, stage after stage, and record what comes of them. Raises as `execute`.

    Where `tasks` are not the run's ledger, tasks that fail alike on all workers are counted and end nothing.
    """
    faults, ramp = Faults(), Ramp(began := time.monotonic())

    def show(totals: RunTotals) -> None:
        totals.waits = in_flight.crew.says()
        progress(totals)

    try:
        for stage in stages:
            _run_stage(run, tasks, Leases(run.job.plan, tasks, stage, began, ramp), in_flight, faults, show)
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
    run: RunState, tasks: TaskRecord, leases: Leases, in_flight: InFlight, faults: Faults, progress: Progress
) -> None:
    written_after = tasks.count(WRITTEN, range(leases.stage.stop, run.job.plan.tasks))
    crew = in_flight.crew
    while True:
        # A new reason to end a run early stands here, beside a lost lock.
        run.hold()
        while not run.stop.is_set() and (
            lease := leases.next(time.monotonic(), in_flight.capacity(), again=not crew.mixed)
        ):
            in_flight.start(lease)
            run.totals.started_again += lease.starts > 1
        if not leases.out or (run.stop.is_set() and in_flight.quiet_s() > DRAIN_S * bool(in_flight.capacity().workers)):
            return
        receipts: list[Receipt] = []
        for lease, result in in_flight.collect(timeout=0.5):
            if result is not None:
                run.totals.add_result(result)
                leases.seen(lease, time.monotonic(), len(result.receipts), result.requests.refused)
            if lease.closed:
                continue  # another copy was faster
            if result is None:
                receipts += leases.died(lease)
                if lease.closed and lease.failed_on:
                    faults.undecided(lease.failed_on)
            else:
                counted = leases.ended(lease, result.receipts, others=in_flight.capacity().workers > 1)
                receipts += counted
                _blame(lease, result.receipts, counted, crew, faults)
            if lease.closed:
                in_flight.cancel_copies(lease)
        in_flight.avoid = faults.doubtful()
        for receipt in receipts:
            run.totals.add_receipt(receipt)
        if written_after:
            tasks.record(_outdated(run.job.plan, tasks, receipts))  # with the others or before, never after them
        tasks.record(receipts)
        tasks.tick()
        run.totals.aside = crew.aside.reasons
        progress(run.totals)
        if tasks is run.ledger:
            faults.refuse_row(in_flight.capacity().workers)


def _outdated(plan: Plan, tasks: TaskRecord, receipts: list[Receipt]) -> list[Receipt]:
    """Coarser tasks that were averaged from what these have written anew, which had rotted then perhaps: pending
    again.
    """
    written = (receipt.index for receipt in receipts if receipt.state == WRITTEN)
    coarser = {block for index in written for block in plan.averaged_from(index)}
    return [Receipt(block, PENDING) for block in sorted(coarser) if tasks.state(block) == WRITTEN]


def _blame(lease: Lease, receipts: Sequence[Receipt], counted: Sequence[Receipt], crew: Crew, faults: Faults) -> None:
    """Set the worker aside on which tasks fail that others write."""
    if not lease.closed:
        return  # another copy decides
    if lease.failed_on and receipts and faults.tried_again(lease.failed_on, receipts[0]):
        crew.set_aside_name(lease.failed_on, faults.why(lease.failed_on))
    faults.answered(receipts, counted)
