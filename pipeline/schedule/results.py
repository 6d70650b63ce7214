"""How work goes to a worker, and how what came of it comes back.

The worker tells the scheduler, which tells the client, before both hear that the task has ended. As results of Dask's
tasks they would have to be fetched: the scheduler connects to every worker that holds one and waits for those that
hang, and where a thousand workers answer slowly, what is fetched again makes them slower still. An error comes the same
way, with the process that raised it, which Dask would not say.
"""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distributed import Client, get_worker

from pipeline.base.errors import ClusterError, EmsrError
from pipeline.worker.job import Fitness, Job, LeaseResult, Process, Question

TOPIC = "emsr-results"
CHECKS = "emsr-checks"
"""Two topics serve all runs: a scheduler keeps the last messages of every topic that it has heard of."""

Work = Callable[[Job, int, int, float], LeaseResult]
"""What a worker does with a lease: process_lease, or a stand-in with the same arguments."""

Check = Callable[[Job, Question], Fitness]
"""What a worker does before it gets a lease: check_worker."""


@dataclass(frozen=True)
class Ended:
    """What came of a task, and of which process: its result, or the exception that it raised."""

    process: Process
    outcome: Any


run_packed = pickle.loads
"""What Dask's tasks are: it unpacks the call that `pack` made, and thereby makes it.

It is Python's own. A function of emsr would be looked for as soon as the worker reads the message, outside any task,
and a worker that has no emsr, or another, would end there instead of raising an error.
"""


def pack(topic: str, work: Callable[..., object], *arguments: object) -> bytes:
    """The argument of `run_packed`.

    The scheduler keeps what it sends for a while and has no use for the objects themselves, which take eight times as
    much.
    """
    return pickle.dumps(_Call((topic, work, arguments)))


@dataclass(frozen=True)
class _Call:
    """Becomes a call of `_run` where it is unpickled."""

    arguments: tuple[str, Callable[..., object], tuple[object, ...]]

    def __reduce__(self) -> tuple[Callable[..., None], tuple[object, ...]]:
        return _run, self.arguments


def _run(topic: str, work: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """Do the work in this worker and send its result to the client."""
    outcome: object
    try:
        outcome = work(*arguments)
    except EmsrError as error:
        outcome = error
    except Exception as error:  # as text: its class may be unknown to the client
        outcome = ClusterError(f"it failed outside any slab: {error!r}", "", "See the worker's log")
    worker = get_worker()
    where = worker.address, socket.gethostname(), os.getpid()
    worker.log_event(topic, {"key": worker.get_current_task(), "where": where, "ended": pickle.dumps(outcome)})


class Results:
    """What came of the tasks whose keys begin with `prefix`. It arrives in a thread of the client's."""

    def __init__(self, client: Client, prefix: str, topic: str = TOPIC) -> None:
        self._client, self._prefix, self._topic = client, prefix, topic
        self._arrived: dict[str, dict[str, Any]] = {}
        client.subscribe_topic(topic, self._receive)

    def _receive(self, event: tuple[float, Any]) -> None:
        _, message = event
        if message["key"].startswith(self._prefix):
            self._arrived[message["key"]] = message

    def take(self, key: str) -> Ended | None:
        """What came of this task, once; None where nothing has arrived: the task did not end well."""
        message = self._arrived.pop(key, None)
        if message is None:
            return None
        try:
            outcome = pickle.loads(message["ended"])
        except Exception as error:  # another emsr's: what it names may not exist here
            outcome = ClusterError(f"this emsr cannot read what it answers: {error!r}", "the same emsr there")
        return Ended(Process(*message["where"]), outcome)

    def close(self) -> None:
        """Receive no more."""
        with suppress(Exception):  # a scheduler that is gone sends nothing
            self._client.unsubscribe_topic(self._topic)
