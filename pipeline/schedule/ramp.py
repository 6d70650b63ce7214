"""How many leases may be out while a run begins, and where a store refuses: decisions only, time is an argument.

Opening the job and the first writes come as a ramp, since object stores refuse (429, 503) what rises faster than they
add servers. Like a connection of TCP the ramp rises until something is refused, steps back, and rises on more slowly.

    leases out
       slots |                    ____________
             |              ,  .-'                  refused: half of what is out, then a tenth more a lease
             |           .-' '-
             |        .-'
       FIRST |_____.-'
             +------------------------------- time; from FIRST to all slots in FULL_S
"""

from __future__ import annotations

FIRST = 64
"""Leases that may be out when a run begins."""
FULL_S = 120.0
"""Without refusals all slots may be taken after so long, however many there are."""
MIN_PER_S = 32.0
"""So many more may go out every second at least."""
LOOK_S = 10.0
"""Refusals are weighed over so long, ..."""
MAX_REFUSED = 1.0
"""... and are too many where there were more than this for each task."""
BACK = 0.5
"""What is left of the leases out when there were too many."""
SLOWER = 0.1
"""The rise after that, in the time of a lease, as a share of what may be out. What a step back has gained must not be
gone before leases have ended that tell what it was good for: where a store refuses, they take long."""


class Ramp:
    """`began` is when the run began. One ramp serves all stages of a run."""

    def __init__(self, began: float) -> None:
        self._risen_at = self._weighed_at = began
        self._limit = float(FIRST)
        self._stepped_back = False
        self._tasks = self._refused = 0
        self._lease_s = 0.0

    def limit(self, now: float, slots: int) -> float:
        """How many leases may be out at `now`, at most `slots`."""
        per_s = max(MIN_PER_S, slots / FULL_S)
        if self._stepped_back:
            per_s = min(per_s, SLOWER * self._limit / max(LOOK_S, self._lease_s))
        self._limit = min(max(float(FIRST), float(slots)), self._limit + per_s * max(0.0, now - self._risen_at))
        self._risen_at = max(now, self._risen_at)
        return min(self._limit, float(slots))

    def ended(self, now: float, out: int, took_s: float, tasks: int, refused: int) -> None:
        """A lease has ended after `took_s`, with so many tasks; its worker's stores have refused so many requests since
        the worker's last one. `out` leases are out.

        After a step back the next one is taken when leases have ended that began after it.
        """
        self._lease_s = took_s if self._lease_s <= 0 else 0.9 * self._lease_s + 0.1 * took_s
        if now < self._weighed_at:
            return
        self._tasks += tasks
        self._refused += refused
        if now - self._weighed_at < LOOK_S:
            return
        if self._refused > MAX_REFUSED * self._tasks:
            self._limit = max(float(FIRST), BACK * min(self._limit, out))
            self._stepped_back, self._risen_at = True, now
            self._weighed_at = now + self._lease_s
        else:
            self._weighed_at = now
        self._tasks = self._refused = 0
