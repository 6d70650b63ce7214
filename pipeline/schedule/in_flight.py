"""The leases that Dask has now: submitted, collected, cancelled."""

from __future__ import annotations

import dataclasses
import queue
import time
import uuid
from collections.abc import Callable
from typing import Any

from distributed import Client, Future, KilledWorker

from pipeline.base.errors import ClusterError, EmsrError
from pipeline.cluster.connect import may_come
from pipeline.plan.requests import RequestRates
from pipeline.schedule.check_workers import NO_WORKER_S, no_worker
from pipeline.schedule.leases import Capacity, Lease
from pipeline.schedule.results import Results, Work, pack, run_packed
from pipeline.worker.job import Job, LeaseResult

CANDIDATES = 8
"""The copy of a late lease may go to this many workers: the idlest, and none that has a copy already."""


class InFlight:
    """The futures by key. A lease has one, or one for each of its copies."""

    def __init__(self, client: Client, job: Job, work: Work) -> None:
        self._client, self._job, self._work = client, job, work
        self._done: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self._out: dict[str, tuple[Lease, Future]] = {}
        self._number = 0
        # Dask's name of them all is `lease`, since it keeps something for every name that it has heard of. The rest is
        # this run's own: what a killed run left running is not taken for an answer to this one.
        self._prefix = f"lease-{job.digest[:8]}-{uuid.uuid4().hex[:8]}"
        self._results = Results(client, self._prefix)
        self._capacity, self._asked_at = Capacity(0, 0), 0.0
        self._had_worker_at = time.monotonic()

    def capacity(self) -> Capacity:
        """The workers that are there. The scheduler is asked once a second."""
        now = time.monotonic()
        if now - self._asked_at > 1.0:
            threads = _call(self._client.nthreads) or {}
            self._capacity, self._asked_at = Capacity(len(threads), sum(threads.values())), now
            if threads:
                self._had_worker_at = now
        return self._capacity

    def start(self, lease: Lease) -> None:
        """Submit the lease, or a further copy of it, which goes to a worker that has none."""
        self._number += 1
        key = f"{self._prefix}-{self._number:x}"
        job = self._job
        if job.rates != RequestRates():
            job = dataclasses.replace(job, rates=job.rates.share(self._capacity.workers))
        others = self._workers_without(lease) if lease.starts > 1 else []
        where = {"workers": others, "allow_other_workers": True} if others else {}
        packed = pack(self._work, job, lease.span, lease.max_s)
        future = self._client.submit(run_packed, packed, key=key, pure=False, **where)
        self._out[key] = lease, future
        future.add_done_callback(self._done.put)

    def collect(self, timeout: float) -> list[tuple[Lease, LeaseResult | None]]:
        """Leases of which a copy has ended, with its result; None where its workers died too often.

        Waits at most `timeout` seconds. Raises ClusterError where the scheduler or all workers are gone, and what a
        worker raised because it cannot open the job.
        """
        ended: list[tuple[Lease, LeaseResult | None]] = []
        for future in self._ended(timeout):
            if future.key not in self._out:
                continue
            if (result := self._results.take(future.key)) is not None:
                ended.append((self._remove(future.key), result))
            elif future.status == "error":
                error = future.exception()
                if not isinstance(error, KilledWorker):
                    raise _worker_error(error)
                ended.append((self._remove(future.key), None))
            elif future.status == "cancelled":
                raise _scheduler_gone()
            elif future.status == "finished":
                raise ClusterError(
                    "a task has ended and its result did not come",
                    "a scheduler that passes events on",
                    "Run the same command again",
                )
        self._check_workers()
        return ended

    def cancel_copies(self, lease: Lease) -> None:
        """Drop the copies that are still out. One that waits is cancelled; one that runs goes on, and its result is
        ignored.
        """
        self._cancel([key for key, (out, _) in self._out.items() if out is lease] if lease.starts > 1 else [])

    def close(self) -> None:
        """Cancel everything."""
        self._cancel(list(self._out))
        self._results.close()

    def _remove(self, key: str) -> Lease:
        lease, future = self._out.pop(key)
        future.release()
        return lease

    def _cancel(self, keys: list[str]) -> None:
        futures = [self._out.pop(key)[1] for key in keys]
        if futures:
            self._client.cancel(futures, force=True)

    def _workers_without(self, lease: Lease) -> list[str]:
        """The addresses of the idlest workers that have no copy of this lease."""
        copies = {key: future for key, (out, future) in self._out.items() if out is lease}
        who_has = _call(self._client.who_has, list(copies.values()))
        holders = {address for addresses in who_has.values() for address in addresses}
        loads = [
            (len(keys), address)
            for address, keys in _call(self._client.processing).items()
            if copies.keys().isdisjoint(keys) and address not in holders
        ]
        return [address for _, address in sorted(loads)[:CANDIDATES]]

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

    def _check_workers(self) -> None:
        self.capacity()
        if time.monotonic() - self._had_worker_at > NO_WORKER_S:
            if not may_come(self._client):
                raise no_worker()
            self._had_worker_at = time.monotonic()


def _call(question: Callable[..., dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """What the scheduler answers. Raises ClusterError where it is gone."""
    try:
        return question(*arguments)
    except OSError as error:
        raise _scheduler_gone(error) from None


def _worker_error(error: BaseException | None) -> EmsrError:
    if isinstance(error, EmsrError):
        return error
    return ClusterError(f"a worker failed outside any slab: {error!r}", "", "See the worker's log")


def _scheduler_gone(why: OSError | None = None) -> ClusterError:
    saw = "the Dask scheduler is gone" + (f" ({why})" if why else "")
    return ClusterError(saw, "a running scheduler", "Run the same command again: finished slabs are not repeated")
