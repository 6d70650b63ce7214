"""What is handed out next, how much of it, and what comes of it: decisions only. Time and capacity are arguments.

`execute` carries them out with Dask's futures, benchmarks/simulate.py with an event queue: the same code for both.

    handed out, in this order:
        what failed elsewhere | what came back undone | pending tasks | a suspect, alone | a late lease once more
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.plan.plan import Plan
from pipeline.plan.receipt import PENDING, QUARANTINED, WRITTEN, Receipt
from pipeline.plan.task_states import TaskStates
from pipeline.schedule.ramp import Ramp

LEASE_S = 5.0
"""A lease takes about so many seconds: few enough to drain soon, many enough that the scheduler idles ..."""
LEASES_PER_S = 100.0
"""... or so many that no more than this many leases end in a second: each costs the scheduler 2 to 3 ms."""
MIN_LEASE_S = 0.5
"""Near the end leases shrink, so that all workers end together, but not below this."""
MAX_LEASE_TASKS = 64
LATE_FACTOR = 3.0
"""A lease is late when it takes so many times what slow tasks (the ninth of ten) would have made of it ..."""
MIN_LATE_S = 5.0
"""... and at least this."""
MAX_STARTS = 3
"""A lease is started so often at most."""


def lease_seconds(threads: int) -> float:
    """About how long a lease takes where there are so many threads."""
    return max(LEASE_S, threads / LEASES_PER_S)


def tasks_in(lease_s: float, task_s: float) -> int:
    """How many tasks of `task_s` seconds make a lease of `lease_s`, far from a run's end."""
    return max(1, min(MAX_LEASE_TASKS, int(lease_s / task_s)))


@dataclass(frozen=True)
class Capacity:
    """The workers that are there, and their threads in all."""

    workers: int
    threads: int

    @property
    def slots(self) -> int:
        """Leases that keep all threads busy: one for each, and one waiting per worker."""
        return max(2, self.threads + self.workers)


@dataclass(eq=False)
class Lease:
    """Consecutive tasks of one z column, handed out together. One that is late is started again; the first result
    closes it.

    A worker begins no further task after `max_s` seconds, and gives the rest back. `tasks_ahead` is how many tasks may
    have waited before it on the same worker. `started` is when the last copy was handed out. `alone` means that nothing
    else runs beside it. `failed_on` (HOST:PID) is where its one task failed before: it is for another worker.
    """

    span: range
    max_s: float
    tasks_ahead: int
    started: float
    alone: bool = False
    starts: int = 1
    copies: int = 1
    closed: bool = False
    failed_on: str = ""


class Leases:
    """The pending tasks of one stage, found lazily, and the leases that are out. `began` is when the run began; `ramp`
    is that of all its stages.
    """

    def __init__(self, plan: Plan, tasks: TaskStates, stage: range, began: float, ramp: Ramp | None = None) -> None:
        self._plan, self.stage = plan, stage
        self._ramp = ramp or Ramp(began)
        self._indices: Iterator[int] = tasks.indices(PENDING, stage)
        self._next: int | None = next(self._indices, None)
        self._left = tasks.count(PENDING, stage)
        self._returned: deque[range] = deque()
        self._suspects: deque[int] = deque()
        self._elsewhere: deque[tuple[int, str]] = deque()
        self._out: dict[Lease, None] = {}
        self._copies = 0
        self._largest = 0
        self._mean_s = 0.0
        self._recent_s: deque[float] = deque(maxlen=512)
        self._late: deque[Lease] = deque()
        self._searched_at = began

    @property
    def out(self) -> int:
        """How many leases are not closed."""
        return len(self._out)

    def next(self, now: float, capacity: Capacity, again: bool = True) -> Lease | None:
        """The lease to start now, or None. One whose `starts` is more than 1 is out already: a copy goes to another
        worker, unless `again` is False, where two workers may make different bytes of a task.
        """
        if self._copies >= self._ramp.limit(now, capacity.slots):
            return None
        max_s = lease_seconds(capacity.threads)
        if self._elsewhere:
            index, failed_on = self._elsewhere.popleft()
            self._left -= 1
            return self._hand_out(Lease(range(index, index + 1), max_s, self._largest, now, failed_on=failed_on))
        span = self._cut(self._size(max_s, capacity))
        if span is not None:
            return self._hand_out(Lease(span, max_s, self._largest, now))
        if self._suspects and not self._out:
            # What shared a worker with the guilty task is innocent: each is tried with nothing beside it.
            index = self._suspects.popleft()
            return self._hand_out(Lease(range(index, index + 1), max_s, 0, now, alone=True))
        return self._late_lease(now, capacity) if again else None

    def seen(self, lease: Lease, now: float, tasks: int, refused: int) -> None:
        """A copy has ended at `now`, whether it counts or not; its worker's stores have refused so many requests."""
        self._ramp.ended(now, self._copies, now - lease.started, tasks, refused)

    def ended(self, lease: Lease, receipts: Sequence[Receipt], others: bool = False) -> Sequence[Receipt]:
        """A copy has ended with these receipts, those of its first tasks; returns those that count.

        Where none count, another copy is still out and decides. Else the lease is closed, other copies are useless, and
        tasks without a receipt are handed out again. So is, once, a task that failed where there are `others`, on one
        of which it may do better.
        """
        self._count_back(lease)
        if lease.copies and (not receipts or any(r.state == QUARANTINED for r in receipts)):
            return ()  # perhaps its worker's fault: the other copy tells
        self._close(lease)
        self._measure(receipts)
        if rest := lease.span[len(receipts) :]:
            if lease.failed_on:
                self._elsewhere.append((rest.start, lease.failed_on))
            else:
                self._returned.append(rest)
            self._left += len(rest)
        again = [r for r in receipts if others and r.fault and not lease.failed_on]
        self._elsewhere.extend((r.index, r.worker) for r in again)
        self._left += len(again)
        return [r for r in receipts if r not in again] if again else receipts

    def died(self, lease: Lease) -> Sequence[Receipt]:
        """The workers of a copy died again and again; returns the receipts that count.

        Its tasks are handed out one by one, then each with nothing beside it. Only one that dies alone is quarantined.
        """
        self._count_back(lease)
        if lease.copies:
            return ()
        self._close(lease)
        start = lease.span.start
        if len(lease.span) > 1:
            self._returned.extend(range(i, i + 1) for i in lease.span)
            self._left += len(lease.span)
            return ()
        if not lease.alone:
            self._suspects.append(start)
            return ()
        return (
            Receipt(
                start,
                QUARANTINED,
                error="its worker died on every try (out of memory or killed): "
                f"task {start}, {self._plan.describe(start)}",
            ),
        )

    def _cut(self, most: int) -> range | None:
        """Up to `most` consecutive pending tasks of one column; those that came back first."""
        if self._returned:
            span = self._returned.popleft()
            if len(span) > most:
                self._returned.appendleft(span[most:])
                span = span[:most]
        elif self._next is None:
            return None
        else:
            start, stop = self._next, self._next + 1
            limit = min(start + most, self._plan.column_end(start))
            self._next = next(self._indices, None)
            while self._next == stop and stop < limit:
                stop += 1
                self._next = next(self._indices, None)
            span = range(start, stop)
        self._left -= len(span)
        return span

    def _size(self, max_s: float, capacity: Capacity) -> int:
        """Tasks that take `max_s` by the measured mean, one until there is a measurement, fewer near the end."""
        if self._mean_s <= 0:
            return 1
        fair = max(self._left // (2 * capacity.slots), int(MIN_LEASE_S / self._mean_s))
        return max(1, min(tasks_in(max_s, self._mean_s), fair))

    def _late_lease(self, now: float, capacity: Capacity) -> Lease | None:
        """A lease that is late, now that nothing else is left. A task writes whole shards of the same bytes: two may do
        it.
        """
        while self._late:
            lease = self._late.popleft()
            if not lease.closed and lease.copies < capacity.workers:
                lease.started = now
                lease.starts += 1
                lease.copies += 1
                self._copies += 1
                return lease
        if capacity.workers < 2 or not self._recent_s or now - self._searched_at < 1.0:
            return None
        self._searched_at = now
        slow_s = sorted(self._recent_s)[len(self._recent_s) * 9 // 10]
        self._late.extend(lease for lease in self._out if _is_late(lease, now, slow_s, capacity))
        return self._late_lease(now, capacity) if self._late else None

    def _hand_out(self, lease: Lease) -> Lease:
        self._out[lease] = None
        self._copies += 1
        self._largest = len(lease.span)
        return lease

    def _count_back(self, lease: Lease) -> None:
        lease.copies -= 1
        self._copies -= 1

    def _close(self, lease: Lease) -> None:
        lease.closed = True
        self._copies -= lease.copies
        del self._out[lease]

    def _measure(self, receipts: Sequence[Receipt]) -> None:
        """All tasks tell how many make a lease. What is slow, only written ones tell: skipped ones end at once."""
        if receipts:
            mean = sum(r.seconds for r in receipts) / len(receipts)
            self._mean_s = max(1e-6, mean if self._mean_s <= 0 else 0.7 * self._mean_s + 0.3 * mean)
            self._recent_s.extend(r.seconds for r in receipts if r.state == WRITTEN)


def _is_late(lease: Lease, now: float, slow_s: float, capacity: Capacity) -> bool:
    """Whether another copy may make up for it: slow tasks take `slow_s`."""
    expected_s = min((lease.tasks_ahead + len(lease.span)) * slow_s, 2 * lease.max_s) + slow_s
    return (
        now - lease.started > max(MIN_LATE_S, LATE_FACTOR * expected_s)
        and lease.starts < MAX_STARTS
        and not lease.alone
        and lease.copies < capacity.workers
    )
