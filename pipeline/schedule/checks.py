"""How workers are asked whether they are fit for the run, and how their answers come back."""

from __future__ import annotations

import queue
import uuid
from dataclasses import dataclass

from distributed import Client, Future

from pipeline.base.errors import ClusterError, EmsrError, TransientError
from pipeline.schedule.exam import Exam
from pipeline.schedule.results import CHECKS, Ended, Results, run_packed
from pipeline.storage.same_place import LOOK_S
from pipeline.worker.job import Fitness, Process

MAX_CHECKS = 64
"""So many workers are checked at a time at first, and one more for each that has answered well, so that ten thousand
are asked in a few rounds: object stores refuse what rises faster than they add servers.
"""
LOOKED_FOR = 256
"""So many of the workers' replies are looked for at a time."""
AGAIN_S = 1.0
"""A reply that is not there yet is looked for again after so long."""


@dataclass(frozen=True)
class Check:
    """One that a worker was sent; `reply` is the key of what it is to leave for the client."""

    address: str
    future: Future
    reply: str


@dataclass
class _Answered:
    """`since` is when the answer came; its reply is looked for from `again` on."""

    check: Check
    ended: Ended
    since: float
    again: float


class Checks:
    """The questions of an exam that are out."""

    def __init__(self, client: Client, exam: Exam) -> None:
        self._client, self.exam = client, exam
        self._prefix = f"check-{uuid.uuid4().hex[:8]}"
        self._answers = Results(client, self._prefix, CHECKS)
        self._done: queue.SimpleQueue[Check] = queue.SimpleQueue()
        self._out: dict[str, Check] = {}
        self._unseen: dict[str, _Answered] = {}
        self._most = MAX_CHECKS
        self._number = 0
        self._forgetting: list[Future] = []

    @property
    def free(self) -> int:
        """How many workers may be asked now."""
        return self._most - len(self._out)

    def ask(self, address: str) -> Check:
        """Send this worker the questions."""
        packed, reply = self.exam.packed()
        check = Check(address, self._send(address, packed), reply)
        self._out[reply] = check
        check.future.add_done_callback(lambda future: self._done.put(check))
        return check

    def forget(self, check: Check) -> None:
        """Its worker has gone."""
        check.future.cancel()
        self._out.pop(check.reply, None)
        self._unseen.pop(check.reply, None)

    def take(self, now: float) -> list[tuple[Check, Ended | None]]:
        """What came of checks since this was last asked: a Fitness or why there is none; None where it has to be asked
        again. A reply that is not found is looked for during LOOK_S seconds: others are not kept waiting.
        """
        ended: list[tuple[Check, Ended | None]] = []
        for check in [self._done.get() for _ in range(self._done.qsize())]:
            if check.reply not in self._out:
                continue
            answer = self._answer(check)
            if answer is not None and isinstance(answer.outcome, Fitness):
                self._unseen[check.reply] = _Answered(check, answer, now, now)
            else:
                ended.append((check, answer))
        ended += self._seen(now)
        for check, answer in ended:
            self._out.pop(check.reply, None)
            if answer is None or isinstance(answer.outcome, TransientError):
                self._most = max(MAX_CHECKS, self._most // 2)
            elif isinstance(answer.outcome, Fitness):
                self._most += 1
        return ended

    def close(self) -> None:
        """Cancel those that are out, and receive no more."""
        for check in self._out.values():
            check.future.cancel()
        self._answers.close()

    def _seen(self, now: float) -> list[tuple[Check, Ended]]:
        """Those whose reply was found, could not be looked for, or is not there after LOOK_S."""
        due = [one for one in self._unseen.values() if now >= one.again][:LOOKED_FOR]
        if not due:
            return []
        ended: list[tuple[Check, Ended]] = []
        fault: EmsrError | None = None
        seen: set[str] = set()
        try:
            seen = self.exam.seen([one.check.reply for one in due])
        except EmsrError as error:
            fault = error
        for one in due:
            reply = one.check.reply
            if reply in seen:
                ended.append((one.check, one.ended))
            elif fault is not None or now - one.since >= LOOK_S:
                self._forgetting.append(self._send(one.check.address, self.exam.packed_forget(reply)))
                ended.append((one.check, Ended(one.ended.process, fault or self.exam.unseen())))
            else:
                one.again = now + AGAIN_S
                continue
            del self._unseen[reply]
        return ended

    def _answer(self, check: Check) -> Ended | None:
        ended = self._answers.take(check.future.key)
        if ended is not None:
            return ended
        if check.future.status == "finished":  # asked again later, not at once for ever
            fault = TransientError("its answer to this run's questions did not come: perhaps it has another emsr")
            return Ended(Process(check.address, "", 0), fault)
        if check.future.status != "error":
            return None
        saw = f"it cannot do what this emsr asks: {check.future.exception()}"  # it could not even read it
        return Ended(Process(check.address, "", 0), ClusterError(saw, "the same emsr there"))

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
