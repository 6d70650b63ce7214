"""Questions to a scheduler that end where it is gone, or stands still and keeps its connections open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from distributed import Client

from pipeline.base.errors import ClusterError
from pipeline.base.waits import waiting

T = TypeVar("T")
HANDSHAKE_S = 5
"""Longer than Dask waits for a connection, so that its own reason is told where there was none."""


class PatientClient(Client):  # type: ignore[misc]
    """Whatever it asks of the scheduler is a wait of the command, which is said and ends."""

    def sync(self, *args: Any, **kwargs: Any) -> Any:
        with waiting("the Dask scheduler"):
            return super().sync(*args, **kwargs)

    async def _ensure_connected(self, timeout: float | None = None) -> None:
        """As Dask's, but whoever takes the connection has to answer in time too. Raises OSError."""
        try:
            await asyncio.wait_for(super()._ensure_connected(timeout), timeout and timeout + HANDSHAKE_S)
        except TimeoutError:
            told = "nothing of Dask's protocol came in time; perhaps another program listens there"
            raise TimeoutError(told) from None

    @property
    def dashboard_link(self) -> Any:
        with waiting("the Dask scheduler"):
            return super().dashboard_link

    def close(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the scheduler. One that is too busy to be left in time is no reason to fail: what was done is done."""
        with suppress(TimeoutError), waiting("the Dask scheduler, to be left"):
            return super().close(*args, **kwargs)

    def __del__(self) -> None:
        """Nothing: who has a client closes it. One that never began waits a minute for its own end, which fails."""


def call(question: Callable[..., T], *arguments: object) -> T:
    """What the scheduler answers. Raises ClusterError where it is gone."""
    try:
        return question(*arguments)
    except OSError as error:
        raise scheduler_gone(error) from None


def scheduler_gone(why: OSError | None = None) -> ClusterError:
    """The error of a command whose scheduler is gone."""
    saw = "the Dask scheduler is gone" + (f" ({why})" if why else "")
    return ClusterError(saw, "a running scheduler", "Run the same command again: finished slabs are not repeated")
