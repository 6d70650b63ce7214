"""Workers that Dask has paused, since they hold too much memory: they begin nothing until they hold less."""

from __future__ import annotations

import time

from distributed import Client

from pipeline.base.errors import ClusterError
from pipeline.schedule.seldom import Seldom

LOOK_S = 5.0
"""How often the scheduler is asked: its answer grows with the number of workers."""
MIN_PAUSE_S = 8.0
"""A pause that is shorter costs a worker nothing: what waits there stays there."""
_DO = (
    "Start its worker with more memory, fewer threads, or with --memory-limit 0 where something else bounds it; "
    "work.in_flight and work.slab_shape make slabs cost less"
)


class Paused:
    """`addresses` are the workers that have been paused for MIN_PAUSE_S."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._said: list[str] = []
        self._since: dict[str, float] = {}
        self._why: dict[str, str] = {}
        self._looks = Seldom(LOOK_S)
        self.addresses: frozenset[str] = frozenset()

    def look(self) -> frozenset[str]:
        """Ask the scheduler, every LOOK_S at most: who runs, and all that it knows only where somebody does not.

        Returns the workers whose pause has just reached MIN_PAUSE_S.

        Raises OSError where the scheduler is gone.
        """
        now = time.monotonic()
        if not self._looks.due(now):
            return frozenset()
        idle = self._client.nthreads().keys() - self._client.sync(self._client.scheduler.ncores_running).keys()
        known = self._client.scheduler_info(n_workers=-1)["workers"] if idle else {}
        paused = {address: known[address] for address in idle & known.keys() if known[address]["status"] == "paused"}
        self._looks.took(now, time.monotonic())
        self._since = {address: self._since.get(address, now) for address in paused}
        self._why = {
            address: f"it holds {_gib(worker['metrics'].get('memory', 0))} of {_gib(worker['memory_limit'])} GiB"
            for address, worker in paused.items()
        }
        long = frozenset(address for address, since in self._since.items() if now - since >= MIN_PAUSE_S)
        new, self.addresses = long - self.addresses, long
        for address in sorted(new):
            self._said.append(f"worker {address} begins nothing: Dask has paused it, {self._why[address]}. {_DO}.")
        return new

    def says(self) -> list[str]:
        """A line for each worker whose pause has reached MIN_PAUSE_S since this was last asked."""
        said, self._said = self._said, []
        return said

    def error(self, seconds: float) -> ClusterError:
        """The error of a run whose workers have all been paused for so long."""
        shown = [f"{address}: {self._why[address]}" for address in sorted(self.addresses)[:3]]
        more = f", and {len(self.addresses) - 3} more" if len(self.addresses) > 3 else ""
        return ClusterError(
            f"all workers were paused by Dask for {seconds:.0f} s ({'; '.join(shown)}{more})",
            "a worker with memory for a slab",
            f"{_DO}. Then run the same command again: what is done is kept",
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
