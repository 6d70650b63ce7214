"""What a run has done so far: sums over receipts and results of leases, in all and for each worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pipeline.plan.price import Footprint
from pipeline.plan.receipt import QUARANTINED, STATES, WRITTEN, Receipt
from pipeline.plan.requests import RequestCounts
from pipeline.worker.job import LeaseResult


@dataclass
class WorkerTotals:
    """What one worker process did: tasks, how many of them were quarantined, seconds, Unix time of the last."""

    tasks: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    last: float = 0.0


@dataclass
class RunTotals:
    """What one run did.

    `results` counts the leases that have come back, `started_again` late leases that a second worker was given,
    `dropped_lines` lines of progress that could not be written. `requests` are those that failed for the moment.
    `peak_bytes` and `base_bytes` are the largest of any worker's process, `network` is the last one's (see
    LeaseResult). `seconds` are those of all tasks by part. `voxels` are SR voxels of mip 0, `bytes` what was stored.
    `workers` are named HOST:PID, the one heard of last stands last; `aside` says why workers were set aside.
    `last_written` is each worker's last receipt of a task that it wrote. `notes` are lines of how the network is
    computed, each with the first worker that said it. `waits` says what is waited for and was not said before.
    """

    written: int = 0
    skipped: int = 0
    quarantined: int = 0
    results: int = 0
    started_again: int = 0
    dropped_lines: int = 0
    requests: RequestCounts = field(default_factory=RequestCounts)
    peak_bytes: int = 0
    base_bytes: int = 0
    network: Footprint = field(default_factory=Footprint)
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "network": 0.0, "write": 0.0})
    voxels: int = 0
    bytes: int = 0
    workers: dict[str, WorkerTotals] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    last_written: dict[str, Receipt] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)

    @property
    def closed(self) -> int:
        """Tasks that ended, however they did."""
        return self.written + self.skipped + self.quarantined

    def add_receipt(self, receipt: Receipt) -> None:
        """Count a task that has ended."""
        state = STATES[receipt.state]
        setattr(self, state, getattr(self, state) + 1)
        for part in self.seconds:
            self.seconds[part] += getattr(receipt, f"{part}_s")
        self.voxels += receipt.voxels
        self.bytes += receipt.bytes
        if receipt.worker:
            totals = self.workers[receipt.worker] = self.workers.pop(receipt.worker, WorkerTotals())
            totals.tasks += 1
            totals.quarantined += receipt.state == QUARANTINED
            totals.seconds += receipt.seconds
            totals.last = time.time()
            if receipt.state == WRITTEN:
                self.last_written[receipt.worker] = receipt

    def add_result(self, result: LeaseResult) -> None:
        """Count what a result says of its worker's process, also where its receipts do not count."""
        self.results += 1
        self.peak_bytes, self.base_bytes = (
            max(self.peak_bytes, result.peak_bytes),
            max(self.base_bytes, result.base_bytes),
        )
        self.requests += result.requests
        if result.receipts:
            self.network = result.network
            for note in result.notes:
                self.notes.setdefault(note, result.receipts[0].worker)
