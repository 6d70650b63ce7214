"""Workers that the scheduler has not heard of for a while: frozen, suspended, or cut off."""

from __future__ import annotations

from distributed import Client

from pipeline.base.waits import SAY_S
from pipeline.cluster.patient_client import call

LOOK_S = 5.0
"""How often the scheduler is asked, or eight times within the patience: it tells all that it knows of all workers."""
SHOWN = 3


class Silent:
    """Call `look` often. Dask gives such a worker up after its `worker-ttl`, five minutes by default."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._heard: dict[str, tuple[float, float]] = {}
        self._next, self._say_s = float("-inf"), SAY_S
        self._said: list[str] = []

    def look(self, now: float) -> None:
        """See who has sent a heartbeat since the last look; no clock but this process's own is read."""
        if now < self._next:
            return
        known = call(self._client.scheduler_info, -1)["workers"]
        before = self._heard
        self._heard = {
            address: before[address]
            if before.get(address, (None, 0.0))[0] == info["last_seen"]
            else (info["last_seen"], now)
            for address, info in known.items()
        }
        patience_s = max(SAY_S, len(known) / 50)  # of many workers Dask hears less often
        self._next = now + max(LOOK_S, patience_s / 8)
        silent = {address: now - at for address, (_, at) in self._heard.items() if now - at > patience_s}
        if not silent:
            self._say_s = patience_s
        elif max(silent.values()) > self._say_s:
            self._say_s = 2 * max(silent.values())
            more = f" and {len(silent) - SHOWN} more" if len(silent) > SHOWN else ""
            named = ", ".join(f"{address} ({s:.0f} s)" for address, s in list(silent.items())[:SHOWN])
            self._said.append(f"nothing was heard of {named}{more}; Dask gives a worker up after its worker-ttl")

    def says(self) -> list[str]:
        """What there is to say since this was last asked."""
        said, self._said = self._said, []
        return said
