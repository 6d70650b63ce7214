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
        self._last: dict[str, str] = {}
        self._kind = ""
        self._row: Counter[str] = Counter()

    def answered(self, receipts: Sequence[Receipt], counted: Sequence[Receipt]) -> None:
        """A lease has ended; those receipts that do not count are tried on another worker."""
        for receipt in receipts:
            if receipt.state == WRITTEN:
                self._proven.pop(receipt.worker, None)
                self._row.clear()
            elif receipt.state == QUARANTINED:
                self._tried_elsewhere[receipt.worker] += receipt not in counted
                self._failed(receipt)

    def _failed(self, receipt: Receipt) -> None:
        self._last[receipt.worker] = receipt.error.partition("\n")[0]
        if receipt.fault in _OF_DATA:
            return  # what is stored is at fault, here and there
        if receipt.fault != self._kind:
            self._row.clear()
        self._kind = receipt.fault
        self._row[receipt.worker] += 1

    def tried_again(self, failed_on: str, receipt: Receipt) -> bool:
        """A task that failed on `failed_on` has ended on another worker; whether that proves `failed_on` to be bad."""
        self._tried_elsewhere[failed_on] -= 1
        if receipt.state == WRITTEN:
            self._proven[failed_on] += 1
        else:
            self._proven.pop(failed_on, None)
        return self._proven[failed_on] >= MAX_PROVEN

    def undecided(self, failed_on: str) -> None:
        """Of a task that failed there it will not be known: it has ended on no other worker."""
        self._tried_elsewhere[failed_on] -= 1

    def doubtful(self) -> list[str]:
        """Workers that get nothing until it is known whose fault their failures are."""
        names = self._tried_elsewhere.keys() | self._proven.keys()
        return [n for n in names if self._tried_elsewhere[n] + self._proven[n] >= MAX_PROVEN]

    def why(self, worker: str) -> str:
        """What a worker that proved bad is set aside for."""
        return f"{MAX_PROVEN} tasks that failed there were written by others; the last: {self._last.get(worker)}"

    def refuse_row(self, workers: int) -> None:
        """Raises ClusterError where MAX_IN_A_ROW tasks failed of one kind and none was written meanwhile."""
        witnesses = sum(failed > 1 for failed in self._row.values())
        if self._row.total() >= MAX_IN_A_ROW and witnesses >= min(max(1, workers), MAX_WITNESSES):
            name = next(reversed(self._row))
            raise ClusterError(
                f"{self._row.total()} tasks in a row failed alike on {len(self._row)} workers, and none was written "
                f"meanwhile; one of them on {name}: {self._last[name]}",
                "a source and a target that workers can reach",
                "Mend the cause and run the same command again: what is written is kept",
            )
