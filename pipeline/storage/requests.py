"""Requests of this process to its stores: how fast they may be made, and how many were refused or tried again.

One request is one object put, or one chunk of a box that is read (cached chunks and the indices of shards are not told apart).
tensorstore's own limiters (experimental_s3_rate_limiter) let everything through after the first second in 0.1.86.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import tensorstore as ts


@dataclass(frozen=True)
class Rates:
    """Requests a second, None: no limit. Of all workers together in a job; `share` is what one of them may make."""

    read: float | None = None
    write: float | None = None

    def share(self, workers: int) -> Rates:
        return Rates(*(rate and rate / max(1, workers) for rate in (self.read, self.write)))


class Pace:
    """Lets `per_second` requests pass on average, a second's worth at once; `take` sleeps until it is their turn."""

    def __init__(self) -> None:
        self.per_second: float | None = None
        self._paid = 0.0
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        with self._lock:
            if self.per_second is None:
                return
            now = time.monotonic()
            self._paid = max(self._paid, now - 1.0) + count / self.per_second
            wait = self._paid - now
        if wait > 0:
            time.sleep(wait)


NO_LIMIT = Rates()
READS, WRITES = Pace(), Pace()


def limit(rates: Rates) -> None:
    """From now on, for this process."""
    READS.per_second, WRITES.per_second = rates.read, rates.write


@dataclass(frozen=True)
class Troubles:
    """`refused` are answers 429 and 503, those included that tensorstore tried again itself; `retried` are our own further tries."""

    refused: int = 0
    retried: int = 0

    def __add__(self, other: Troubles) -> Troubles:
        return Troubles(self.refused + other.refused, self.retried + other.retried)


NO_TROUBLES = Troubles()


class _Record:
    """Troubles of this process since somebody last took them."""

    def __init__(self) -> None:
        self._retried = self._told = 0
        self._lock = threading.Lock()

    def retry(self) -> None:
        with self._lock:
            self._retried += 1

    def take(self) -> Troubles:
        with self._lock:
            refused = _refused()
            found = Troubles(refused - self._told, self._retried)
            self._told, self._retried = refused, 0
        return found


RECORD = _Record()


def _refused() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/http/response_codes")
    return sum(int(v["value"]) for metric in found for v in metric["values"] if v.get("code") in ("429", "503"))
