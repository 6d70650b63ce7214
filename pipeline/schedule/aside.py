"""Which workers are set aside and for what, and the error of a run that has no other worker left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from pipeline.base.errors import ClusterError, EmsrError, UserError

RESTART_S = 60.0
"""A nanny that has started no new process after so long is not waited for: its machine is gone perhaps."""
MAX_RESTARTS = 3
"""A worker whose process died so often while it opened the job is set aside."""


class Aside:
    """`tell` is called with a worker and a reason whenever one is set aside; `reasons` keeps both.

    A worker is known by its nanny, which starts a new process at a new address where one has ended; one without a nanny
    is known by its address.
    """

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        self.tell = tell
        self.reasons: dict[str, str] = {}
        self._errors: dict[str, EmsrError] = {}
        self._nannies: set[str] = set()
        self._deaths: Counter[str] = Counter()
        self._restarting: dict[str, float] = {}

    @property
    def restarting(self) -> bool:
        """Whether a process has ended lately, and the next one of its worker has not answered yet."""
        late = time.monotonic() - RESTART_S
        while self._restarting and self._restarting[nanny := next(iter(self._restarting))] <= late:
            del self._restarting[nanny]
        return bool(self._restarting)

    def holds(self, nanny: str) -> bool:
        """Whether this worker was set aside, in whatever process."""
        return nanny in self._nannies

    def add(self, who: str, nanny: str | None, error: EmsrError) -> None:
        """Set `who` aside for `error`; the nanny is None where it is not known any more."""
        if nanny is not None:
            self._nannies.add(nanny)
        if who not in self.reasons:
            self.reasons[who], self._errors[who] = str(error), error
            self.tell(who, str(error))

    def answered(self, nanny: str) -> None:
        """Its process has opened the job."""
        self._deaths.pop(nanny, None)
        self._restarting.pop(nanny, None)

    def ended(self, address: str, nanny: str) -> None:
        """Its process ended. A worker without a nanny does not start again."""
        if nanny != address:
            self._restarting.pop(nanny, None)  # the one that ended last stands last
            self._restarting[nanny] = time.monotonic()

    def died(self, address: str, nanny: str, beside_leases: bool) -> None:
        """Its process ended before it had answered. That counts where no lease may have run in the process beside."""
        if beside_leases:
            return
        self._deaths[nanny] += 1
        if self._deaths[nanny] >= MAX_RESTARTS or nanny == address:
            error = ClusterError(
                f"its process ended {_times(self._deaths[nanny])} while it opened the job",
                "a worker with memory and time enough for the network",
                "See its log",
            )
            self.add(f"worker {address}", nanny, error)

    def error(self) -> EmsrError:
        """The error of a run whose workers are all set aside: their common fault, or what each was set aside for."""
        (who, error), *others = self._errors.items()
        if len({_kind(e) for e in self._errors.values()}) == 1:
            who += f" (and {len(others)} more, likewise)" if others else ""
            if isinstance(error, UserError):
                return type(error)(f"{who}: {error.saw}", error.wanted, error.do)
            return ClusterError(f"{who}: {error}")
        said = [f"{who}: {why}" for who, why in list(self.reasons.items())[:8]]
        more = f"\n  and {len(self.reasons) - 8} more" if len(self.reasons) > 8 else ""
        return ClusterError(
            "no worker is left that can do this run:\n  " + "\n  ".join(said) + more,
            "one that is fit",
            "Mend one of them, then run the same command again",
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _kind(error: EmsrError) -> str:
    """The error without its numbers, which differ where the fault is one."""
    return type(error).__name__ + "".join(c for c in str(error) if not c.isdigit())
