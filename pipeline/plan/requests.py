"""Requests to stores, as numbers: how many a second are allowed, how many were refused or repeated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RequestRates:
    """Requests a second to read and to write; None means no limit. In a job they hold for all workers together."""

    read: float | None = None
    write: float | None = None

    def share(self, workers: int) -> RequestRates:
        """What each of so many workers may make."""
        return RequestRates(*(rate and rate / max(1, workers) for rate in (self.read, self.write)))


@dataclass(frozen=True)
class RequestCounts:
    """Requests that failed for the moment.

    `refused` counts answers 429 and 503, those included that tensorstore itself repeated; `retried` counts the calls
    that emsr repeated.
    """

    refused: int = 0
    retried: int = 0

    def __add__(self, other: RequestCounts) -> RequestCounts:
        return RequestCounts(self.refused + other.refused, self.retried + other.retried)
