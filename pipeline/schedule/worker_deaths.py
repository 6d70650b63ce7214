"""Workers whose process dies with whatever it is given, while others finish the same tasks."""

from __future__ import annotations

import queue
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from distributed import Client

TOPIC = "all"
"""Dask's own: the scheduler says there which workers come and go."""
MAX_DEATHS = 3
"""A worker is set aside when its process died so often with tasks that others finished, and it finished none."""
MAX_OPEN = 1000
"""Deaths are forgotten of which this is not known after so many others."""


class WorkerDeaths:
    """Whose fault it is that processes die. A worker is known by its nanny, which starts the next process.

    A death speaks against the worker when all tasks that were with it have been finished by others. So a slab that
    kills every process speaks against none of them.
    """

    def __init__(self) -> None:
        self._open: deque[tuple[str, set[int]]] = deque(maxlen=MAX_OPEN)
        self._proven: Counter[str] = Counter()

    def died(self, worker: str, tasks: Iterable[int]) -> None:
        """A process of this worker has ended, and these tasks were with it."""
        if unfinished := set(tasks):
            self._open.append((worker, unfinished))

    def finished(self, worker: str, tasks: Iterable[int]) -> list[str]:
        """The worker has finished these. Returns the workers that this proves to be bad."""
        if not (done := set(tasks)):
            return []
        self._proven.pop(worker, None)
        if not self._open:
            return []
        still: list[tuple[str, set[int]]] = []
        for other, unfinished in self._open:
            if other == worker:
                continue
            unfinished -= done
            if unfinished:
                still.append((other, unfinished))
            else:
                self._proven[other] += 1
        self._open = deque(still, MAX_OPEN)
        proven = [other for other, deaths in self._proven.items() if deaths >= MAX_DEATHS]
        for other in proven:
            del self._proven[other]
        return proven


class Departures:
    """The processes of workers that have ended, with the keys of what they had been given where nobody asked them to.

    The scheduler tells of them between the making of this and `close`. It arrives in a thread of the client's.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._arrived: queue.SimpleQueue[tuple[str, list[str]]] = queue.SimpleQueue()
        client.subscribe_topic(TOPIC, self._receive)

    def _receive(self, event: tuple[float, Any]) -> None:
        _, message = event
        if not isinstance(message, dict) or message.get("action") != "remove-worker" or "worker" not in message:
            return  # of everything else, and what other users say there
        keys = () if message.get("expected") else message.get("processing-tasks", ())
        self._arrived.put((message["worker"], list(keys)))

    def take(self) -> list[tuple[str, list[str]]]:
        """(address, keys) of each that has ended since this was last asked."""
        return [self._arrived.get() for _ in range(self._arrived.qsize())]

    def close(self) -> None:
        """Receive no more."""
        with suppress(Exception):  # a scheduler that is gone sends nothing
            self._client.unsubscribe_topic(TOPIC)
