"""Whose fault a failed task is: its worker's, the slab's, or that of what all workers use. Decisions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from pipeline.base.errors import ClusterError, DamagedChunkError, DataError, MissingChunkError
from pipeline.plan.receipt import QUARANTINED, WRITTEN, Receipt

MAX_PROVEN = 3
"""A worker is set aside when so many tasks that failed on it were written by others, and it wrote none in between."""
MAX_IN_A_ROW = 8
"""A run ends when so many tasks in a row fail of one kind, ..."""
MAX_WITNESSES = 4
"""... two or more on each of so many workers, or on all where there are fewer."""
_OF_DATA = tuple(kind.__name__ for kind in (DataError, MissingChunkError, DamagedChunkError))


class Faults:
    """What failed where. Workers are named HOST:PID."""

    def __init__(self) -> None:
        self._tried_elsewhere: Counter[str] = Counter()
        self._proven: Counter[str] = Counter()
        self._doubtful: dict[str, None] = {}
        self._last: dict[str, str] = {}
        self._kind = ""
        self._row: Counter[str] = Counter()
        self._length = self._twice = 0
        """How many failures the row has, and on how many workers more than one of the row failed."""

    def answered(self, receipts: Sequence[Receipt], counted: Sequence[Receipt]) -> None:
        """A lease has ended; those receipts that do not count are tried on another worker."""
        for receipt in receipts:
            if receipt.state == WRITTEN:
                if self._proven.pop(receipt.worker, None):
                    self._weigh(receipt.worker)
                self._end_row()
            elif receipt.state == QUARANTINED:
                if receipt not in counted:
                    self._tried_elsewhere[receipt.worker] += 1
                    self._weigh(receipt.worker)
                self._failed(receipt)

    def _failed(self, receipt: Receipt) -> None:
        self._last[receipt.worker] = receipt.error.partition("\n")[0]
        if receipt.fault in _OF_DATA:
            return  # what is stored is at fault, here and there
        if receipt.fault != self._kind:
            self._end_row()
        self._kind = receipt.fault
        self._row[receipt.worker] += 1
        self._length += 1
        self._twice += self._row[receipt.worker] == 2

    def _end_row(self) -> None:
        self._row.clear()
        self._length = self._twice = 0

    def tried_again(self, failed_on: str, receipt: Receipt) -> bool:
        """A task that failed on `failed_on` has ended on another worker; whether that proves `failed_on` to be bad."""
        self.undecided(failed_on)
        if receipt.state == WRITTEN:
            self._proven[failed_on] += 1
        else:
            self._proven.pop(failed_on, None)
        self._weigh(failed_on)
        return self._proven[failed_on] >= MAX_PROVEN

    def undecided(self, failed_on: str) -> None:
        """Of a task that failed there it will not be known: it has ended on no other worker."""
        self._tried_elsewhere[failed_on] -= 1
        if not self._tried_elsewhere[failed_on]:
            del self._tried_elsewhere[failed_on]
        self._weigh(failed_on)

    def doubtful(self) -> list[str]:
        """Workers that get nothing until it is known whose fault their failures are."""
        return list(self._doubtful)

    def _weigh(self, name: str) -> None:
        """Its failures have changed: see whether it is doubtful."""
        if self._tried_elsewhere[name] + self._proven[name] >= MAX_PROVEN:
            self._doubtful[name] = None
        else:
            self._doubtful.pop(name, None)

    def why(self, worker: str) -> str:
        """What a worker that proved bad is set aside for."""
        return f"{MAX_PROVEN} tasks that failed there were written by others; the last: {self._last.get(worker)}"

    def refuse_row(self, workers: int) -> None:
        """Raises ClusterError where MAX_IN_A_ROW tasks failed of one kind and none was written meanwhile."""
        if self._length >= MAX_IN_A_ROW and self._twice >= min(max(1, workers), MAX_WITNESSES):
            name = next(reversed(self._row))
            raise ClusterError(
                f"{self._length} tasks in a row failed alike on {len(self._row)} workers, and none was written "
                f"meanwhile; one of them on {name}: {self._last[name]}",
                "a source and a target that workers can reach",
                "Mend the cause and run the same command again: what is written is kept",
            )
