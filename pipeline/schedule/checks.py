"""How a worker is asked whether it is fit for the run, and how its answer comes back."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from distributed import Client, Future

from pipeline.base.errors import ClusterError, EmsrError, TransientError
from pipeline.schedule.exam import Exam
from pipeline.schedule.results import CHECKS, Ended, Results, run_packed
from pipeline.worker.job import Fitness, Process

MAX_CHECKS = 64
"""So many workers are checked at a time: object stores refuse what rises faster than they add servers."""


@dataclass(frozen=True)
class Check:
    """One that a worker was sent; `reply` is the key of what it is to leave for the client."""

    address: str
    future: Future
    reply: str


class Checks:
    """The questions of an exam that are out."""

    def __init__(self, client: Client, exam: Exam) -> None:
        self._client, self.exam = client, exam
        self._prefix = f"check-{uuid.uuid4().hex[:8]}"
        self._answers = Results(client, self._prefix, CHECKS)
        self._number = 0
        self._forgetting: list[Future] = []

    def ask(self, address: str) -> Check:
        """Send this worker the questions."""
        packed, reply = self.exam.packed()
        return Check(address, self._send(address, packed), reply)

    def answer(self, check: Check) -> Ended | None:
        """What came of a check that is done: a Fitness or why there is none; None where it has to be asked again."""
        ended = self._answers.take(check.future.key)
        if ended is None:
            if check.future.status == "finished":  # asked again later, not at once for ever
                fault = TransientError("its answer to this run's questions did not come: perhaps it has another emsr")
                return Ended(Process(check.address, "", 0), fault)
            if check.future.status != "error":
                return None
            saw = f"it cannot do what this emsr asks: {check.future.exception()}"  # it could not even read it
            return Ended(Process(check.address, "", 0), ClusterError(saw, "the same emsr there"))
        try:
            if isinstance(ended.outcome, Fitness):
                self.exam.refuse_unseen(check.reply)
        except EmsrError as error:
            self._forgetting.append(self._send(check.address, self.exam.packed_forget(check.reply)))
            return Ended(ended.process, error)
        return ended

    def close(self, out: Iterable[Check]) -> None:
        """Cancel those that are out, and receive no more."""
        for check in out:
            check.future.cancel()
        self._answers.close()

    def _send(self, address: str, packed: bytes) -> Future:
        self._number += 1
        return self._client.submit(
            run_packed,
            packed,
            key=f"{self._prefix}-{self._number:x}",
            pure=False,
            workers=[address],
            priority=1,  # before the leases that wait there
        )
