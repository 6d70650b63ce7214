"""The leases that Dask has now: submitted, collected, cancelled."""

from __future__ import annotations

import dataclasses
import itertools
import queue
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable

from distributed import Client, Future, KilledWorker

from pipeline.base.errors import ClusterError, EmsrError
from pipeline.cluster.patient_client import call, scheduler_gone
from pipeline.plan.receipt import SKIPPED, WRITTEN
from pipeline.plan.requests import RequestRates
from pipeline.schedule.crew import Crew
from pipeline.schedule.leases import Capacity, Lease
from pipeline.schedule.results import TOPIC, Ended, Results, Work, pack, run_packed
from pipeline.schedule.seldom import Seldom
from pipeline.schedule.worker_deaths import MAX_DEATHS, Departures, WorkerDeaths
from pipeline.worker.job import Job, LeaseResult, Process

LOADS_S = 1.0
"""How often the scheduler is asked which worker has what, at the end of a run."""
CANDIDATES = 8
"""The copy of a late lease may go to this many workers: the idlest, and none that has a copy already."""
MAX_LOST = 3
"""A lease that named its workers is given up as one whose workers died when they have gone more often than this."""
MAX_UNREADABLE = 100
"""So many leases in a row may end on workers that cannot even read them, before these are found and set aside."""
NOTHING = LeaseResult((), 0, 0)
"""Of a lease that nobody began: all its tasks are handed out again."""


class InFlight:
    """The futures by key, with the workers that were named, if any. A lease has one, or one for each of its copies.

    `hold` is called before anything is handed out, and raises where another run has taken the target over.
    """

    def __init__(
        self,
        client: Client,
        job: Job,
        work: Work,
        crew: Crew | None = None,
        hold: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._job, self._work, self._hold = client, job, work, hold
        self.crew = crew or Crew(client)
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._out: dict[str, tuple[Lease, Future, list[str] | None]] = {}
        self._keys: defaultdict[Lease, set[str]] = defaultdict(set)
        self._held: list[tuple[Lease, Ended]] = []
        self._waiting: list[Lease] = []
        self._lost: Counter[Lease] = Counter()
        self._deaths = WorkerDeaths()
        self.avoid: list[str] = []
        self._unreadable = 0
        self._number = 0
        # Dask's name of them all is `lease`, since it keeps something for every name that it has heard of. The rest is
        # this run's own: what a killed run left running is not taken for an answer to this one.
        self._prefix = f"lease-{job.digest[:8]}-{uuid.uuid4().hex[:8]}"
        self._results, self._departures = Results(client, self._prefix), Departures(client)
        self._displaced: set[str] = set()
        self._left_before = 0
        self._hand_ons, self._loads = Seldom(0.0), Seldom(LOADS_S)
        self._idlest: dict[str, Collection[str]] = {}
        self._moved_at = time.monotonic()

    def quiet_s(self) -> float:
        """Since when nothing was begun and nothing has ended."""
        return time.monotonic() - self._moved_at

    def capacity(self) -> Capacity:
        """The workers that are there and may be given something."""
        self.crew.look(self._any_at_large)
        return self.crew.capacity()

    def start(self, lease: Lease) -> None:
        """Submit the lease, or a further copy of it, which goes to a worker that has none. It waits where none is fit.

        It goes to none of `avoid` and not where it failed before, as long as there is another one.
        """
        if not self.crew.capacity().workers:
            self._waiting.append(lease)
            return
        self._hold()
        self._number += 1
        self._moved_at = time.monotonic()
        key = f"{self._prefix}-{self._number:x}"
        job, capacity = self._job, self.crew.capacity()
        if job.rates != RequestRates():
            job = dataclasses.replace(job, rates=job.rates.share(max(1, capacity.workers)))
        named = self.crew.some([*self.avoid, lease.failed_on])
        others = self._workers_without(lease) if lease.starts > 1 else []
        where = {"workers": others or named, "allow_other_workers": named is None} if others or named else {}
        packed = pack(TOPIC, self._work, job, lease.span.start, lease.span.stop, lease.max_s)
        future = self._client.submit(run_packed, packed, key=key, pure=False, **where)
        self._out[key] = lease, future, (others or named) if named is not None else None
        self._keys[lease].add(key)
        future.add_done_callback(self._done.put)

    def collect(self, timeout: float) -> list[tuple[Lease, LeaseResult | None]]:
        """Leases of which a copy has ended, with its result; None where its workers died too often.

        A worker that raised something is set aside, and its leases come back without receipts or go to others. Waits at
        most `timeout` seconds. Raises ClusterError where the scheduler is gone or no worker is left.
        """
        ended: list[tuple[Lease, LeaseResult | None]] = []
        futures = self._ended(timeout)
        self._see_departures()
        for future in futures:
            if future.key not in self._out:
                continue
            self._moved_at = time.monotonic()
            if (result := self._results.take(future.key)) is not None:
                self._held.append((self._remove(future.key), result))
                self._unreadable = 0
            elif future.status == "error":
                error = future.exception()
                lease = self._remove(future.key)
                if isinstance(error, KilledWorker):
                    ended.append((lease, None))
                    continue
                self._unreadable += 1
                if self._unreadable > MAX_UNREADABLE:
                    raise ClusterError(f"workers cannot read what they are given: {error!r}", "the same emsr there")
                ended.append((lease, NOTHING))
            elif future.status == "cancelled":
                raise scheduler_gone()
            elif future.status == "finished":
                raise ClusterError(
                    "a task has ended and its result did not come",
                    "a scheduler that passes events on",
                    "Run the same command again",
                )
        self.crew.look(self._any_at_large)
        ended += self._judged()
        ended += [(lease, None) for lease in self._hand_on()]
        if self._waiting and self.crew.capacity().workers:
            waiting, self._waiting = self._waiting, []
            for lease in waiting:
                self.start(lease)
        return ended

    def _see_departures(self) -> None:
        for address, of_all in self._departures.take():
            keys = [key for key in of_all if key in self._out]
            self._deaths.died(self.crew.nanny(address), (task for key in keys for task in self._out[key][0].span))
            self.crew.departed(address)
            self._displaced.update(key for key in keys if self._out[key][2] is None)

    def _judged(self) -> list[tuple[Lease, LeaseResult | None]]:
        """What ended on workers of which it is known whether they are fit; the rest is kept until it is."""
        ended: list[tuple[Lease, LeaseResult | None]] = []
        held, self._held = self._held, []
        for lease, result in held:
            if isinstance(result.outcome, EmsrError):
                self.crew.set_aside(result.process, result.outcome)
            vouched = self.crew.vouches(result.process)
            if vouched is None:
                self._held.append((lease, result))
            elif vouched and isinstance(result.outcome, LeaseResult):
                self._credit(result.process, result.outcome)
                ended.append((lease, result.outcome))
            else:
                ended.append((lease, NOTHING))
        return ended

    def _credit(self, process: Process, result: LeaseResult) -> None:
        """Set those workers aside whose processes died with what this one has finished."""
        finished = [receipt.index for receipt in result.receipts if receipt.state in (WRITTEN, SKIPPED)]
        for nanny in self._deaths.finished(self.crew.nanny(process.address), finished):
            self.crew.set_aside_nanny(nanny, f"its process died {MAX_DEATHS} times with tasks that others finished")

    def _hand_on(self) -> list[Lease]:
        """Leases whose worker was set aside, or whose named workers have all gone, go to others; returns those that
        have lost workers too often.

        So do those of a process that has ended while its nanny starts the next one: Dask may give them to that one
        before anybody has asked it.
        """
        began = time.monotonic()
        changed = self.crew.left > self._left_before or self.crew.newly_aside or self._displaced
        if not (changed and self._hand_ons.due(began)):
            return []
        self._left_before = self.crew.left
        gone = {key for key, (_, _, named) in self._out.items() if named and not self.crew.is_there(named)}
        gone |= self._displaced_at_large()
        self._lost.update(self._out[key][0] for key in gone)
        theirs = self._with(set(self.crew.newly_aside))
        self.crew.newly_aside.clear()
        lost = [key for key in self._out if key in gone or key in theirs]
        leases = [self._out[key][0] for key in lost]
        self._cancel(lost)
        given_up = [lease for lease in leases if self._lost[lease] > MAX_LOST]
        for lease in leases:
            if self._lost[lease] <= MAX_LOST:
                self.start(lease)
        self._hand_ons.took(began, time.monotonic())
        return given_up

    def _displaced_at_large(self) -> set[str]:
        """What Dask may give to a process that has just begun, and that no fit worker has."""
        keys = self._displaced & self._out.keys()
        self._displaced.clear()
        if not keys or not self.crew.aside.restarting or self.crew.mixed:
            return set()
        return keys - self._with(self.crew.fit_addresses())

    def _with(self, addresses: Collection[str]) -> set[str]:
        """The leases that these workers have now."""
        if not addresses:
            return set()
        there = call(self._client.processing)
        return {key for address in addresses for key in there.get(address, ()) if key in self._out}

    def cancel_copies(self, lease: Lease) -> None:
        """Drop the copies that are still out. One that waits is cancelled; one that runs goes on, and its result is
        ignored.
        """
        self._cancel(list(self._keys.get(lease, ())))

    def close(self) -> None:
        """Cancel everything."""
        self._cancel(list(self._out))
        self._results.close()
        self._departures.close()

    def _any_at_large(self) -> bool:
        """Whether Dask may give one of them to any worker."""
        return any(named is None for _, _, named in self._out.values())

    def _remove(self, key: str) -> Lease:
        lease, future = self._taken(key)
        future.release()
        return lease

    def _cancel(self, keys: Iterable[str]) -> None:
        futures = [self._taken(key)[1] for key in keys]
        if futures:
            self._client.cancel(futures, force=True)

    def _taken(self, key: str) -> tuple[Lease, Future]:
        """Lease and future of this key, which is out no more."""
        lease, future, _ = self._out.pop(key)
        self._keys[lease].discard(key)
        if not self._keys[lease]:
            del self._keys[lease]
        return lease, future

    def _workers_without(self, lease: Lease) -> list[str]:
        """The addresses of idle fit workers that have no copy of this lease.

        Who has what, and who is idlest, is as it was up to LOADS_S ago. Those that are named now are named next after
        all others, so that many late leases do not wait for the same workers.
        """
        now = time.monotonic()
        if self._loads.due(now):
            there = call(self._client.processing)
            self._idlest = {address: there[address] for address in sorted(there, key=lambda one: len(there[one]))}
            self._loads.took(now, time.monotonic())
        fit, copies = self.crew.fit_addresses(), self._keys[lease]
        free = (address for address, keys in self._idlest.items() if address in fit and copies.isdisjoint(keys))
        named = list(itertools.islice(free, CANDIDATES))
        for address in named:
            self._idlest[address] = self._idlest.pop(address)
        return named

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
