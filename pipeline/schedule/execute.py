"""The run itself: leases out to Dask, receipts into the ledger. `leases` decides, Dask places, the ledger remembers."""

from __future__ import annotations

import time
from collections.abc import Callable

from distributed import Client

from pipeline.plan.receipt import PENDING, QUARANTINED, Receipt
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
    began = time.monotonic()
    in_flight = InFlight(client, run.job, work)
    try:
        for stage in run.job.plan.passes():
            before = range(stage.start)
            if stage.start and any(run.ledger.count(state, before) for state in (PENDING, QUARANTINED)):
                break  # a level needs every shard of the one before it
            _run_pass(run, Leases(run.job.plan, run.ledger, stage, began), in_flight, progress)
    finally:
        try:
            in_flight.close()
        finally:
            run.ledger.close()
    run.interrupted = run.stop.is_set()


def _run_pass(run: RunState, leases: Leases, in_flight: InFlight, progress: Progress) -> None:
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
        run.ledger.record(receipts)
        run.ledger.tick()
        progress(run.totals)
