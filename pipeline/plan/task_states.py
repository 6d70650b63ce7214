"""The state of every task, a byte each: counted, and searched lazily. A ledger is one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.receipt import STATES, Receipt

BLOCK = 1 << 16


class TaskStates:
    """The states of `tasks` tasks, all pending at first."""

    def __init__(self, tasks: int) -> None:
        self._state: NDArray[np.uint8] = np.zeros(tasks, np.uint8)

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return len(self._state)

    def counts(self) -> dict[str, int]:
        """Tasks by state; the four numbers add up to `tasks`."""
        return {name: self.count(state) for state, name in enumerate(STATES)}

    def state(self, index: int) -> int:
        """The state of one task."""
        return int(self._state[index])

    def where(self, state: int) -> NDArray[np.bool_]:
        """Which tasks are in this state."""
        found: NDArray[np.bool_] = self._state == state
        return found

    def indices(self, state: int, within: range | None = None) -> Iterator[int]:
        """Tasks in this state, ascending, found lazily a block at a time."""
        span = within or range(self.tasks)
        for start in range(span.start, span.stop, BLOCK):
            block = self._state[start : min(start + BLOCK, span.stop)]
            yield from (start + int(i) for i in np.flatnonzero(block == state))

    def count(self, state: int, within: range | None = None) -> int:
        """How many of the tasks, all or those `within`, are in this state."""
        span = within or range(self.tasks)
        return int(np.count_nonzero(self._state[span.start : span.stop] == state))


class TaskRecord(TaskStates, ABC):
    """States that follow from receipts."""

    @abstractmethod
    def record(self, receipts: Iterable[Receipt]) -> None:
        """Take up how tasks have ended."""

    @abstractmethod
    def tick(self) -> None:
        """Publish what is due. It is called often."""

    @abstractmethod
    def close(self) -> None:
        """Publish the rest."""
