"""Which tasks, how many in flight: a bounded window of leases, refilled lazily. Dask places them, the ledger remembers."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from distributed import Client, Future, KilledWorker

from pipeline import worker
from pipeline.errors import ClusterError, EmsrError, LedgerError
from pipeline.plan import Plan
from pipeline.storage.ledger import PENDING, QUARANTINED, Entry, Ledger
from pipeline.storage.target_lease import TargetLease
from pipeline.worker import Job, LeaseResult, Receipt, process_lease

LEASE_S = 5.0
"""A lease is about this long: short enough to drain soon, long enough that the scheduler idles."""
LEASE_MOST = 64
NO_WORKER_S = 300.0

Work = Callable[[Job, int, int], LeaseResult]


def rehearse(client: Client, job: Job) -> None:
    """One worker opens the job: its mistakes (a path it does not see, weights that do not fit) come before anything is written."""
    try:
        client.submit(worker.rehearse, job, key=f"rehearse-{job.digest[:8]}", pure=False).result(timeout=NO_WORKER_S)
    except TimeoutError:
        raise ClusterError(f"no worker answered in {NO_WORKER_S:.0f} s", "at least one Dask worker", "Start workers, then run the same command again") from None
    except KilledWorker:
        raise ClusterError("workers die while they open the job", "workers with memory for the network", "See their logs") from None


@dataclass
class Tally:
    """What one worker process did: tasks, how many of them were quarantined, seconds, Unix time of the last."""

    tasks: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    last: float = 0.0


@dataclass
class Outcome:
    """What one run did."""

    written: int = 0
    skipped: int = 0
    quarantined: int = 0
    interrupted: bool = False
    peak_bytes: int = 0
    base_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "network": 0.0, "write": 0.0})
    voxels: int = 0
    bytes: int = 0
    workers: dict[str, Tally] = field(default_factory=dict)
    """By HOST:PID."""


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
    outcome = Outcome()
    window = _Window(client, job, work)
    try:
        for stage in job.plan.stages():
            if stage.start and any(ledger.count(state, range(stage.start)) for state in (PENDING, QUARANTINED)):
                break  # a level needs every shard of the one before it
            _stage(window, job.plan, ledger, stage, outcome, stop, held, progress)
    finally:
        window.cancel()
        ledger.close()
    outcome.interrupted = stop.is_set()
    return outcome


def _stage(
    window: _Window,
    plan: Plan,
    ledger: Ledger,
    stage: range,
    outcome: Outcome,
    stop: threading.Event,
    held: TargetLease | None,
    progress: Callable[[Outcome], None],
) -> None:
    todo = _Todo(plan, ledger, stage)
    while True:
        if held is not None and held.lost.is_set():
            raise LedgerError(
                "another run took this target over while this one was out of reach", "one run per target", "See which one is alive, then run again"
            )
        while not stop.is_set() and window.has_room():
            span = todo.next(window.lease_size(todo.left()))
            if span is None:
                break
            window.submit(span)
        if not window.pending:
            suspect = None if stop.is_set() else todo.next_suspect()
            if suspect is None:
                return
            window.submit(suspect)
        receipts, dead, unfinished = window.collect(timeout=0.5)
        todo.again(unfinished)
        entries: list[Entry] = []
        for receipt in receipts:
            _count(outcome, receipt)
            entries.append(receipt)
        for span in dead:
            given_up = todo.killed(span)
            if given_up is not None:
                _count(outcome, given_up)
                entries.append(given_up)
        outcome.peak_bytes, outcome.base_bytes = max(outcome.peak_bytes, window.peak_bytes), max(outcome.base_bytes, window.base_bytes)
        ledger.record(entries)
        ledger.tick()
        progress(outcome)


def _count(outcome: Outcome, receipt: Receipt) -> None:
    state = ("", "written", "skipped", "quarantined")[receipt.state]
    setattr(outcome, state, getattr(outcome, state) + 1)
    for part in outcome.seconds:
        outcome.seconds[part] += getattr(receipt, f"{part}_s")
    outcome.voxels += receipt.voxels
    outcome.bytes += receipt.bytes
    if receipt.worker:
        tally = outcome.workers.setdefault(receipt.worker, Tally())
        tally.tasks += 1
        tally.quarantined += receipt.state == QUARANTINED
        tally.seconds += receipt.seconds
        tally.last = time.time()


class _Todo:
    """Pending tasks as runs of consecutive numbers within one z column, found lazily; leases of dead workers come first."""

    def __init__(self, plan: Plan, ledger: Ledger, stage: range) -> None:
        self._plan = plan
        self._indices: Iterator[int] = ledger.indices(PENDING, stage)
        self._ahead: int | None = next(self._indices, None)
        self._again: deque[range] = deque()
        self._suspects: deque[int] = deque()
        self._alone: set[int] = set()
        self._left = ledger.count(PENDING, stage)

    def left(self) -> int:
        return self._left

    def next(self, most: int) -> range | None:
        if self._again:
            return self._again.popleft()
        if self._ahead is None:
            return None
        start = self._ahead
        limit = min(start + most, self._plan.column_end(start))
        stop = start + 1
        self._ahead = next(self._indices, None)
        while self._ahead == stop and stop < limit:
            stop += 1
            self._ahead = next(self._indices, None)
        self._left -= stop - start
        return range(start, stop)

    def again(self, spans: list[range]) -> None:
        """The rest of leases that ended early, because a task of theirs stalled."""
        self._again.extend(spans)

    def next_suspect(self) -> range | None:
        """A task whose workers died, to be run with nothing beside it: what shared a worker with the guilty one is innocent."""
        if not self._suspects:
            return None
        index = self._suspects.popleft()
        self._alone.add(index)
        return range(index, index + 1)

    def killed(self, span: range) -> Receipt | None:
        """A lease whose workers died again and again: its tasks one by one, then alone; only one that dies alone is given up."""
        if len(span) > 1:
            self._again.extend(range(i, i + 1) for i in span)
            return None
        if span.start not in self._alone:
            self._suspects.append(span.start)
            return None
        return Receipt(
            span.start, QUARANTINED, error=f"its worker died on every try (out of memory or killed): task {span.start}, {self._plan.place(span.start)}"
        )


class _Window:
    """The futures in flight: about two leases per worker beyond what its threads hold, never more."""

    def __init__(self, client: Client, job: Job, work: Work) -> None:
        self._client, self._job, self._work = client, job, work
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._spans: dict[str, range] = {}
        self._number = 0
        self._prefix = f"lease-{job.digest[:8]}"
        self._slot_count, self._slots_at = 0, 0.0
        self._seconds_per_task = 0.0
        self._seen_worker = time.monotonic()
        self._futures: dict[str, Future] = {}
        self.peak_bytes = 0
        self.base_bytes = 0

    @property
    def pending(self) -> int:
        return len(self._spans)

    def has_room(self) -> bool:
        return len(self._spans) < self._slots()

    def lease_size(self, left: int) -> int:
        """Tasks per lease: LEASE_S seconds' worth by the measured mean, one until there is a measurement, fewer near the end."""
        if self._seconds_per_task <= 0:
            return 1
        return max(1, min(LEASE_MOST, int(LEASE_S / self._seconds_per_task), left // (2 * max(1, self._slots()))))

    def submit(self, span: range) -> None:
        self._number += 1
        key = f"{self._prefix}-{self._number:x}"
        future = self._client.submit(self._work, self._job, span.start, span.stop, key=key, pure=False)
        self._spans[key] = span
        self._futures[key] = future
        future.add_done_callback(self._done.put)

    def collect(self, timeout: float) -> tuple[list[Receipt], list[range], list[range]]:
        """Receipts of leases that ended, the leases whose workers died too often, and what leases left undone. Waits at most `timeout` seconds."""
        futures = self._ended(timeout)
        receipts: list[Receipt] = []
        dead: list[range] = []
        unfinished: list[range] = []
        fine = [f for f in futures if f.status == "finished"]
        for future, result in zip(fine, self._gather(fine), strict=True):
            receipts.extend(result.receipts)
            span = self._spans[future.key]
            if len(result.receipts) < len(span):
                unfinished.append(span[len(result.receipts) :])
            self.peak_bytes, self.base_bytes = max(self.peak_bytes, result.peak_bytes), max(self.base_bytes, result.base_bytes)
        for future in futures:
            span = self._spans.pop(future.key)
            self._futures.pop(future.key)
            if future.status == "error":
                error = future.exception()
                if not isinstance(error, KilledWorker):
                    raise error if isinstance(error, EmsrError) else ClusterError(f"a worker failed outside any slab: {error!r}", "", "See the worker's log")
                dead.append(span)
            elif future.status != "finished":
                raise ClusterError("the Dask scheduler is gone", "a running scheduler", "Run the same command again: finished slabs are not repeated")
            future.release()
        self._learn(receipts)
        self._watch_workers()
        return receipts, dead, unfinished

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

    def _gather(self, futures: list[Future]) -> list[LeaseResult]:
        if not futures:
            return []
        try:
            return list(self._client.gather(futures))
        except (OSError, TimeoutError) as error:
            raise ClusterError(
                f"the Dask scheduler is gone ({error})", "a running scheduler", "Run the same command again: finished slabs are not repeated"
            ) from None

    def _learn(self, receipts: list[Receipt]) -> None:
        if receipts:
            mean = sum(r.seconds for r in receipts) / len(receipts)
            self._seconds_per_task = max(1e-6, mean if self._seconds_per_task <= 0 else 0.7 * self._seconds_per_task + 0.3 * mean)

    def _slots(self) -> int:
        """Leases that keep every worker busy: one per thread and one waiting per worker. Asked of the scheduler once a second."""
        now = time.monotonic()
        if now - self._slots_at > 1.0:
            threads = self._client.nthreads() or {}
            self._slot_count, self._slots_at = sum(threads.values()) + len(threads), now
            if threads:
                self._seen_worker = now
        return max(2, self._slot_count)

    def _watch_workers(self) -> None:
        self._slots()
        if time.monotonic() - self._seen_worker > NO_WORKER_S:
            raise ClusterError(f"no worker for {NO_WORKER_S:.0f} s", "at least one Dask worker", "Start workers, then run the same command again")

    def cancel(self) -> None:
        if self._futures:
            self._client.cancel(list(self._futures.values()), force=True)
            self._futures.clear()
            self._spans.clear()
