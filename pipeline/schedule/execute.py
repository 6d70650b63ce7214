"""The run itself: work leases out to Dask, receipts into the ledger. `leases` decides, Dask places, the ledger remembers."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distributed import Client, Future, KilledWorker

from pipeline.base.errors import ClusterError, EmsrError, LedgerError
from pipeline.cluster import steady_clock
from pipeline.cluster.connect import may_come, refuse_other_versions, shorten_logs, stop_profiling
from pipeline.plan.price import NOTHING, Footprint
from pipeline.schedule.answers import Answers, Work, answer, asked
from pipeline.schedule.leases import Crew, Lease, Leases
from pipeline.storage.ledger import PENDING, QUARANTINED, Entry, Ledger
from pipeline.storage.requests import NO_LIMIT, NO_TROUBLES, Troubles
from pipeline.storage.target_lock import TargetLease
from pipeline.worker import slab as worker
from pipeline.worker.slab import Job, LeaseResult, Receipt, process_lease

NO_WORKER_S = 300.0
SAY_S = 20.0
CANDIDATES = 8
"""Workers that the copy of a late lease may go to: the idlest, but none that has a copy already."""


def rehearse(client: Client, job: Job) -> None:
    """One worker opens the job: its mistakes (a path it does not see, weights that do not fit, a cell larger than its memory) come
    before anything is written.
    """
    _first_worker(client)
    refuse_other_versions(client)
    shorten_logs(client)
    stop_profiling(client)
    steady_clock.install_everywhere(client)
    try:
        client.submit(worker.rehearse, job, key=f"rehearse-{job.digest[:8]}", pure=False).result(timeout=NO_WORKER_S)
    except TimeoutError:
        raise ClusterError(
            f"no worker answered in {NO_WORKER_S:.0f} s",
            "at least one Dask worker",
            "Start workers, then run the same command again",
        ) from None
    except KilledWorker:
        raise ClusterError(
            "workers die while they open the job", "workers with memory for the network", "See their logs"
        ) from None


def _first_worker(client: Client) -> None:
    """Wait for one: as long as it takes while a batch system has it in its queue."""
    possible = time.monotonic()
    for turn in itertools.count():
        try:
            return client.wait_for_workers(1, timeout=SAY_S)  # type: ignore[no-any-return]
        except TimeoutError:
            if not turn:
                print("emsr: waiting for the first worker", file=sys.stderr)
            if may_come(client):
                possible = time.monotonic()
            elif time.monotonic() - possible > NO_WORKER_S:
                raise _no_worker() from None


def _no_worker() -> ClusterError:
    return ClusterError(
        f"no worker for {NO_WORKER_S:.0f} s",
        "at least one Dask worker",
        "Start workers, or see the logs of those that ended; then run the same command again",
    )


@dataclass
class Tally:
    """What one worker process did: tasks, how many of them were quarantined, seconds, Unix time of the last."""

    tasks: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    last: float = 0.0


@dataclass
class Outcome:
    """What one run did. `started_again` counts late leases that a second worker was given."""

    written: int = 0
    skipped: int = 0
    quarantined: int = 0
    interrupted: bool = False
    started_again: int = 0
    troubles: Troubles = NO_TROUBLES
    peak_bytes: int = 0
    base_bytes: int = 0
    network: Footprint = NOTHING
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "network": 0.0, "write": 0.0})
    voxels: int = 0
    bytes: int = 0
    workers: dict[str, Tally] = field(default_factory=dict)
    """By HOST:PID."""

    def count(self, receipt: Receipt) -> None:
        state = ("", "written", "skipped", "quarantined")[receipt.state]
        setattr(self, state, getattr(self, state) + 1)
        for part in self.seconds:
            self.seconds[part] += getattr(receipt, f"{part}_s")
        self.voxels += receipt.voxels
        self.bytes += receipt.bytes
        if receipt.worker:
            tally = self.workers.setdefault(receipt.worker, Tally())
            tally.tasks += 1
            tally.quarantined += receipt.state == QUARANTINED
            tally.seconds += receipt.seconds
            tally.last = time.time()

    def see(self, result: LeaseResult) -> None:
        """Also of a lease whose receipts do not count."""
        self.peak_bytes, self.base_bytes = (
            max(self.peak_bytes, result.peak_bytes),
            max(self.base_bytes, result.base_bytes),
        )
        self.troubles += result.troubles
        if result.receipts:
            self.network = result.network


def drive(
    client: Client,
    job: Job,
    ledger: Ledger,
    stop: threading.Event,
    held: TargetLease | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
    work: Work = process_lease,
) -> Outcome:
    """Run every pending task; returns when all are closed, or when `stop` is set and what was in flight has drained.

    Raises ClusterError when the scheduler or all workers are gone, LedgerError when another run took the target over,
    and whatever a worker raised because it cannot open the job. The ledger is flushed in every case.
    """
    outcome, began = Outcome(), time.monotonic()
    window = _Window(client, job, work)
    try:
        for stage in job.plan.stages():
            if stage.start and any(ledger.count(state, range(stage.start)) for state in (PENDING, QUARANTINED)):
                break  # a level needs every shard of the one before it
            _stage(window, Leases(job.plan, ledger, stage, began), ledger, outcome, stop, held, progress)
    finally:
        window.close()
        ledger.close()
    outcome.interrupted = stop.is_set()
    return outcome


def _stage(
    window: _Window,
    leases: Leases,
    ledger: Ledger,
    outcome: Outcome,
    stop: threading.Event,
    held: TargetLease | None,
    progress: Callable[[Outcome], None],
) -> None:
    while True:
        if held is not None and held.lost.is_set():
            raise LedgerError(
                "another run took this target over while this one was out of reach",
                "one run per target",
                "See which one is alive, then run again",
            )
        while not stop.is_set() and (lease := leases.next(time.monotonic(), window.crew())) is not None:
            window.start(lease)
            outcome.started_again += lease.starts > 1
        if not leases.out:
            return
        entries: list[Entry] = []
        for lease, result in window.collect(timeout=0.5):
            if result is not None:
                outcome.see(result)
            if lease.closed:
                continue  # another copy was faster
            for receipt in leases.died(lease) if result is None else leases.ended(lease, result.receipts):
                outcome.count(receipt)
                entries.append(receipt)
            if lease.closed:
                window.forget(lease)
        ledger.record(entries)
        ledger.tick()
        progress(outcome)


class _Window:
    """The futures in flight, by key: a lease has one, or one for each of its copies."""

    def __init__(self, client: Client, job: Job, work: Work) -> None:
        self._client, self._job, self._work = client, job, work
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._out: dict[str, tuple[Lease, Future]] = {}
        self._number = 0
        # Dask's name of them all is `lease`, for what it keeps by name lives for ever. What a killed run left running is not taken for this one's.
        self._prefix = f"lease-{job.digest[:8]}-{uuid.uuid4().hex[:8]}"
        self._answers = Answers(client, self._prefix)
        self._crew, self._asked = Crew(0, 0), 0.0
        self._seen_worker = time.monotonic()

    def crew(self) -> Crew:
        """Asked of the scheduler once a second."""
        now = time.monotonic()
        if now - self._asked > 1.0:
            threads = _asked(self._client.nthreads) or {}
            self._crew, self._asked = Crew(len(threads), sum(threads.values())), now
            if threads:
                self._seen_worker = now
        return self._crew

    def start(self, lease: Lease) -> None:
        self._number += 1
        key = f"{self._prefix}-{self._number:x}"
        job = self._job
        if job.rates != NO_LIMIT:
            job = dataclasses.replace(job, rates=job.rates.share(self._crew.workers))
        elsewhere = self._elsewhere(lease) if lease.starts > 1 else None
        where = {"workers": elsewhere, "allow_other_workers": True} if elsewhere else {}
        future = self._client.submit(
            answer, asked(self._work, job, lease.span, lease.most_s), key=key, pure=False, **where
        )
        self._out[key] = lease, future
        future.add_done_callback(self._done.put)

    def collect(self, timeout: float) -> list[tuple[Lease, LeaseResult | None]]:
        """Leases of which a copy came back, with its result, None where its workers died too often. Waits at most `timeout` seconds."""
        found: list[tuple[Lease, LeaseResult | None]] = []
        for ended in self._ended(timeout):
            if ended.key not in self._out:
                continue
            if (result := self._answers.take(ended.key)) is not None:
                found.append((self._let_go(ended.key), result))
            elif ended.status == "error":
                error = ended.exception()
                if not isinstance(error, KilledWorker):
                    raise (
                        error
                        if isinstance(error, EmsrError)
                        else ClusterError(f"a worker failed outside any slab: {error!r}", "", "See the worker's log")
                    )
                found.append((self._let_go(ended.key), None))
            elif ended.status == "cancelled":
                raise _scheduler_gone()
            elif ended.status == "finished":
                raise ClusterError(
                    "a task has ended and its answer did not come",
                    "a scheduler that passes events on",
                    "Run the same command again",
                )
        self._watch_workers()
        return found

    def _let_go(self, key: str) -> Lease:
        lease, future = self._out.pop(key)
        future.release()
        return lease

    def forget(self, lease: Lease) -> None:
        """Copies that are still out: one that waits is dropped, one that runs goes on and nobody asks for its receipts."""
        self._cancel([key for key, (out, _) in self._out.items() if out is lease] if lease.starts > 1 else [])

    def close(self) -> None:
        self._cancel(list(self._out))
        self._answers.close()

    def _cancel(self, keys: list[str]) -> None:
        futures = [self._out.pop(key)[1] for key in keys]
        if futures:
            self._client.cancel(futures, force=True)

    def _elsewhere(self, lease: Lease) -> list[str] | None:
        """The idlest workers that have no copy of this lease; None where there are no others."""
        copies = {key: future for key, (out, future) in self._out.items() if out is lease}
        holders = {
            address
            for addresses in _asked(self._client.who_has, list(copies.values())).values()
            for address in addresses
        }
        busy = [
            (len(keys), address)
            for address, keys in _asked(self._client.processing).items()
            if copies.keys().isdisjoint(keys) and address not in holders
        ]
        return [address for _, address in sorted(busy)[:CANDIDATES]] or None

    def _ended(self, timeout: float) -> list[Future]:
        try:
            ended = [self._done.get(timeout=timeout)]
        except queue.Empty:
            return []
        while True:
            try:
                ended.append(self._done.get_nowait())
            except queue.Empty:
                return ended

    def _watch_workers(self) -> None:
        self.crew()
        if time.monotonic() - self._seen_worker > NO_WORKER_S:
            if not may_come(self._client):
                raise _no_worker()
            self._seen_worker = time.monotonic()


def _asked(call: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What the scheduler answers. ClusterError where it is gone."""
    try:
        return call(*arguments)
    except OSError as error:
        raise _scheduler_gone(error) from None


def _scheduler_gone(why: OSError | None = None) -> ClusterError:
    saw = "the Dask scheduler is gone" + (f" ({why})" if why else "")
    return ClusterError(saw, "a running scheduler", "Run the same command again: finished slabs are not repeated")
