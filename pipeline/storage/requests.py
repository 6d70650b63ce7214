"""Requests of this process to its stores: how fast they may be made, and how many were refused or repeated.

One request is one object put, or one chunk of a box that is read: a chunk that is cached counts too, the index of a
shard does not. tensorstore's own limiters (experimental_s3_rate_limiter) let everything through after the first second
in 0.1.86.
"""

from __future__ import annotations

import math
import threading
import time

import tensorstore as ts

from pipeline.base.waits import waiting
from pipeline.plan.requests import RequestCounts, RequestRates


class Pace:
    """A token bucket: it lets `per_second` requests pass on average, and at once as many as are due in a second."""

    def __init__(self) -> None:
        self.per_second: float | None = None
        self._paid = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Sleep until so many requests may be made: such a wait is no stall."""
        with self._lock:
            if self.per_second is None:
                return
            now = time.monotonic()
            self._paid = max(self._paid, now - 1.0) + count / self.per_second
            wait = self._paid - now
        if wait > 0:
            with waiting("its turn to ask the store (work.requests_per_second)", math.inf):
                time.sleep(wait)


READS, WRITES = Pace(), Pace()


def limit(rates: RequestRates) -> None:
    """From now on this process makes no more requests than `rates`."""
    READS.per_second, WRITES.per_second = rates.read, rates.write


class _Counter:
    """Failed requests of this process since they were last taken."""

    def __init__(self) -> None:
        self._retried = self._refused_before = 0
        self._lock = threading.Lock()

    def retry(self) -> None:
        """One call is repeated."""
        with self._lock:
            self._retried += 1

    def take(self) -> RequestCounts:
        """The counts; from here on they begin at 0."""
        with self._lock:
            refused = _refused()
            counts = RequestCounts(refused - self._refused_before, self._retried)
            self._refused_before, self._retried = refused, 0
        return counts


COUNTER = _Counter()


def _refused() -> int:
    """Answers 429 and 503 since this process began, as tensorstore counts them."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/http/response_codes")
    return sum(int(v["value"]) for metric in metrics for v in metric["values"] if v.get("code") in ("429", "503"))
