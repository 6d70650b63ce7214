"""Looks at all workers, which take longer the more there are: so seldom that they take a small share of the time."""

from __future__ import annotations

SHARE = 0.05
MAX_WAIT_S = 10.0
"""A look that took long, perhaps since the machine is loaded, is repeated after so long at the latest: who comes or
leaves is known well before 20 s are over, after which an absence is told."""


class Seldom:
    """Every `every_s` seconds, and later after a look that took more than SHARE of that."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._next = float("-inf")

    def due(self, now: float) -> bool:
        """Whether it is time for the next look."""
        return now >= self._next

    def took(self, began: float, ended: float) -> None:
        """A look has lasted from `began` until `ended`."""
        self._next = max(began + self._every_s, ended + min((ended - began) / SHARE, MAX_WAIT_S))
