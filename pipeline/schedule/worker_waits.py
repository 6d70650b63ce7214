"""What workers wait for, as they tell it: disks and servers that do not answer."""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from typing import Any

from distributed import Client

from pipeline.worker.job import WAITS

SHOWN = 3
"""So many workers are named of those that wait for one thing."""


class WorkerWaits:
    """What the workers of one run say, between its making and `close`. It arrives in a thread of the client's."""

    def __init__(self, client: Client, run: str) -> None:
        self._client, self._run = client, run
        self._told: dict[str, tuple[str, float]] = {}
        client.subscribe_topic(WAITS, self._receive)

    def _receive(self, event: tuple[float, Any]) -> None:
        _, message = event
        if message["run"] == self._run:
            self._told[message["who"]] = message["what"], message["seconds"]

    def take(self) -> list[str]:
        """A line for each thing that was waited for since this was last asked."""
        told, self._told = self._told, {}
        by_thing: dict[str, list[str]] = defaultdict(list)
        for worker, (what, seconds) in list(told.items()):  # the client's thread may be writing its last one
            by_thing[what].append(f"{worker} ({seconds:.0f} s so far)")
        return [
            f"{', '.join(workers[:SHOWN])}{f' and {len(workers) - SHOWN} more' if len(workers) > SHOWN else ''} "
            f"wait for {what}"
            for what, workers in by_thing.items()
        ]

    def close(self) -> None:
        """Receive no more."""
        with suppress(Exception):  # a scheduler that is gone sends nothing
            self._client.unsubscribe_topic(WAITS)
