"""What `verify` finds of each task: its objects right, damaged, or not to be read. It takes 6 bytes a task."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.plan import Plan
from pipeline.plan.receipt import PENDING, QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.plan.task_states import TaskRecord
from pipeline.storage.ledger import Ledger

RIGHT, UNREADABLE, DAMAGED = WRITTEN, QUARANTINED, 4
"""States of a task here; PENDING is not looked at yet, SKIPPED not to be looked at."""


class Findings(TaskRecord):
    """The written tasks of a loaded ledger are to be looked at, or `sample` of them.

    One without a checksum is damaged from the start: the segment that held its record is lost, and a snapshot says no
    more than that it was written. So are coarser tasks that were averaged from a damaged one. `say` is given a word
    ("damaged", "unreadable"), the task and the reason. With `requeue` damaged tasks are recorded as pending.
    """

    def __init__(
        self, plan: Plan, ledger: Ledger, say: Callable[[str, int, str], None], requeue: bool, sample: int | None = None
    ) -> None:
        super().__init__(ledger.tasks)
        self._plan, self._ledger, self._say, self._requeue = plan, ledger, say, requeue
        self._checksums, known = ledger.checksums()
        self._state[:] = SKIPPED
        self.right = self.damaged = self.unreadable = 0
        written = ledger.where(WRITTEN)
        self.written = ledger.count(WRITTEN)
        lost = np.flatnonzero(written & ~known)
        chosen: NDArray[np.bool_] | NDArray[np.int64] = written & known
        if sample is not None:
            chosen = np.random.default_rng().permutation(np.flatnonzero(chosen))[: max(0, sample)]
        self._state[chosen] = PENDING
        self.chosen = self.count(PENDING) + len(lost)
        for index in lost.tolist():
            if self._state[index] != DAMAGED:
                self._found_damaged(index, "the ledger has lost its checksum with a segment")

    @property
    def looked_at(self) -> int:
        """Of how many tasks something is known."""
        return self.right + self.damaged + self.unreadable

    def record(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            index = receipt.index
            if self._state[index] == DAMAGED:
                continue
            if receipt.state == QUARANTINED:
                self._state[index] = UNREADABLE
                self.unreadable += 1
                self._say("unreadable", index, receipt.error.splitlines()[0])
            elif receipt.error:
                self._found_damaged(index, receipt.error)
            elif receipt.checksum != self._checksums[index]:
                self._found_damaged(index, "stored bytes differ from those written")
            else:
                self._state[index] = RIGHT
                self.right += 1

    def tick(self) -> None:
        if self._requeue:
            self._ledger.tick()

    def close(self) -> None:
        if self._requeue:
            self._ledger.close()

    def _found_damaged(self, index: int, why: str) -> None:
        self._state[index] = DAMAGED
        self.damaged += 1
        if self._requeue:
            self._ledger.record([Receipt(index, PENDING)])
        self._say("damaged", index, why)  # queued by now: whoever reads it may interrupt
        for block in self._plan.averaged_from(index):
            if self._state[block] != DAMAGED and self._ledger.state(block) == WRITTEN:
                self._found_damaged(block, f"it was averaged from task {index}, which is damaged")
