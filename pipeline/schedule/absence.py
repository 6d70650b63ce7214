"""How long a run goes on where there is no worker that it can use, what it says meanwhile, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Collection

from distributed import Client

from pipeline.base.errors import ClusterError
from pipeline.cluster.connect import may_come, why_none
from pipeline.schedule.aside import Aside
from pipeline.schedule.paused import Paused

NO_WORKER_S = 300.0
"""A run ends after so many seconds without a worker, unless a batch system may still give one."""
SAY_S = 20.0
"""Why there is no worker is said after so many seconds, and after twice as many each time."""
RETURN_S = 60.0
"""After a fit worker is gone, so long is it waited for, where only workers that were set aside are left."""


class Absence:
    """Since when there has been no worker. Those that are paused count as absent."""

    def __init__(self, client: Client, paused: Paused, aside: Aside) -> None:
        self._client, self._paused, self._aside = client, paused, aside
        self._had_one, self._lost = time.monotonic(), float("-inf")
        self._say_s = SAY_S
        self._said: list[str] = []

    def lost(self, now: float) -> None:
        """A fit worker has gone."""
        self._lost = now

    def refuse(self, possible: Collection[str], now: float) -> None:
        """`possible` are the workers that are there and were not set aside.

        Raises ClusterError where there was none for NO_WORKER_S and none may come; and where all are set aside, what
        each was set aside for.
        """
        if any(address not in self._paused.addresses for address in possible):
            self._had_one, self._say_s = now, SAY_S
            return
        if not possible and self._aside.reasons and now - self._lost > RETURN_S and not may_come(self._client):
            raise self._aside.error()
        alone_s = now - self._had_one
        if alone_s > self._say_s:
            self._say_s *= 2
            why = why_none(self._client)
            self._said.append(f"no worker for {alone_s:.0f} s{why and ': '}{why}")
        if alone_s > NO_WORKER_S:
            if not may_come(self._client):
                if possible:
                    raise self._paused.error(alone_s)
                raise self._aside.error() if self._aside.reasons else _no_worker()
            self._had_one, self._say_s = now, SAY_S

    def says(self) -> list[str]:
        """What there is to say since this was last asked."""
        said, self._said = self._said, []
        return said

    def none_came(self) -> ClusterError:
        """The error of a run that has had no worker, or only paused ones, for NO_WORKER_S."""
        return self._paused.error(NO_WORKER_S) if self._paused.addresses else _no_worker()

    def none_answered(self, seconds: float) -> ClusterError:
        """The error of a run whose workers have said nothing for so long."""
        if self._paused.addresses:
            return self._paused.error(seconds)
        return ClusterError(
            f"no worker answered in {seconds:.0f} s",
            "at least one Dask worker",
            "Start workers, then run the same command again",
        )


def _no_worker() -> ClusterError:
    return ClusterError(
        f"no worker for {NO_WORKER_S:.0f} s",
        "at least one Dask worker",
        "Start workers, or see the logs of those that ended; then run the same command again",
    )
