"""How a lease goes to a worker, and how its result comes back.

The worker tells the scheduler, which tells the client, before both hear that the task has ended. As results of Dask's
tasks they would have to be fetched: the scheduler connects to every worker that holds one and waits for those that
hang, and where a thousand workers answer slowly, what is fetched again makes them slower still.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import Client, get_worker

from pipeline.worker.job import Job, LeaseResult

TOPIC = "emsr-results"
"""One topic serves all runs: a scheduler keeps the last messages of every topic that it has heard of."""

Work = Callable[[Job, int, int, float], LeaseResult]
"""What a worker does with a lease: process_lease, or a stand-in with the same arguments."""


def pack(work: Work, job: Job, span: range, max_s: float) -> bytes:
    """The argument of `run_packed`.

    The scheduler keeps what it sends for a while and has no use for the objects themselves, which take eight times as
    much.
    """
    return pickle.dumps((work, job, span.start, span.stop, max_s))


def run_packed(packed: bytes) -> None:
    """Do the work in this worker and send its result to the client: this is what Dask's tasks are."""
    work, *arguments = pickle.loads(packed)
    result = work(*arguments)
    worker = get_worker()
    worker.log_event(TOPIC, {"key": worker.get_current_task(), "result": pickle.dumps(result)})


class Results:
    """The results of the tasks whose keys begin with `prefix`. They arrive in a thread of the client's."""

    def __init__(self, client: Client, prefix: str) -> None:
        self._client, self._prefix = client, prefix
        self._arrived: dict[str, bytes] = {}
        client.subscribe_topic(TOPIC, self._receive)

    def _receive(self, event: tuple[float, Any]) -> None:
        _, message = event
        if message["key"].startswith(self._prefix):
            self._arrived[message["key"]] = message["result"]

    def take(self, key: str) -> LeaseResult | None:
        """The result of this task, once; None where none has arrived: the task did not end well."""
        result = self._arrived.pop(key, None)
        return None if result is None else pickle.loads(result)

    def close(self) -> None:
        """Receive no more."""
        with suppress(Exception):  # a scheduler that is gone sends nothing
            self._client.unsubscribe_topic(TOPIC)
