"""How a task can end, and the receipt that says how one did."""

from __future__ import annotations

from dataclasses import dataclass

PENDING, WRITTEN, SKIPPED, QUARANTINED = range(4)
"""The states of a task, as the ledger stores them."""
STATES = ("pending", "written", "skipped", "quarantined")
"""Their names, by state."""


@dataclass(frozen=True)
class Receipt:
    """One task's end.

    `checksum` is the CRC-32 over the task's stored objects, keys and bytes in key order; `bytes` is their total size.
    `error` is why a task was quarantined; `fault` is the kind of that error where another worker might do better, and
    empty elsewhere. `worker` (HOST:PID) is the process that ran it. The other fields are for the report: seconds in all
    and by part, and how many SR voxels of mip 0 were made.
    """

    index: int
    state: int
    checksum: int = 0
    bytes: int = 0
    seconds: float = 0.0
    error: str = ""
    fault: str = ""
    worker: str = ""
    read_s: float = 0.0
    network_s: float = 0.0
    write_s: float = 0.0
    voxels: int = 0
