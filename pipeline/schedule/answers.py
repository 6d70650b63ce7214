"""What a worker is asked, and how a lease's receipts come back: it tells the scheduler, which tells the client, before both hear that the task has ended.

As results they would have to be fetched: the scheduler connects to every worker that holds one and waits for those that hang, and
where a thousand workers answer slowly, what is fetched again makes them slower still.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from distributed import Client, get_worker

from pipeline.worker.slab import Job, LeaseResult

TOPIC = "emsr-answers"
"""One for all runs: a scheduler keeps the last messages of every topic."""

Work = Callable[[Job, int, int, float], LeaseResult]


def asked(work: Work, job: Job, span: range, most_s: float) -> bytes:
    """For `answer`. The scheduler, which keeps what it sends for a while, has no use for the objects themselves: they take eight times as much."""
    return pickle.dumps((work, job, span.start, span.stop, most_s))


def answer(question: bytes) -> None:
    """What a task is: the work asked for, and its result on the way. Runs in a worker."""
    work, *arguments = pickle.loads(question)
    result = work(*arguments)
    worker = get_worker()
    worker.log_event(TOPIC, {"key": worker.get_current_task(), "result": pickle.dumps(result)})


class Answers:
    """Of the tasks whose keys begin with `prefix`; they come in a thread of the client's."""

    def __init__(self, client: Client, prefix: str) -> None:
        self._client, self._prefix = client, prefix
        self._come: dict[str, bytes] = {}
        client.subscribe_topic(TOPIC, self._hear)

    def _hear(self, event: tuple[float, Any]) -> None:
        _, message = event
        if message["key"].startswith(self._prefix):
            self._come[message["key"]] = message["result"]

    def take(self, key: str) -> LeaseResult | None:
        """Once; None where none has come: the task did not end well."""
        result = self._come.pop(key, None)
        return None if result is None else pickle.loads(result)

    def close(self) -> None:
        with suppress(Exception):  # a scheduler that is gone has nothing to tell
            self._client.unsubscribe_topic(TOPIC)
