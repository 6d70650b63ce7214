"""One run of one target: what is to be done, where it is recorded, who holds the target, and what came of it so far."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from pipeline.schedule.totals import RunTotals
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import TargetLock
from pipeline.worker.job import Job


@dataclass
class RunState:
    """`lock` is None where nobody else can write the target. Setting `stop` lets the leases in flight end, and no more
    begin.

    `interrupted` says whether the run ended because of that. `began` is Unix time.
    """

    job: Job
    ledger: Ledger
    lock: TargetLock | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    totals: RunTotals = field(default_factory=RunTotals)
    interrupted: bool = False
    began: float = field(default_factory=time.time)

    def hold(self) -> None:
        """Returns while this run holds the target; raises what TargetLock.hold raises."""
        if self.lock is not None:
            self.lock.hold()
