"""The end of a run: some of what workers say they wrote is looked for where the client sees the target."""

from __future__ import annotations

from pipeline.base.errors import EmsrError
from pipeline.base.retry import retrying
from pipeline.plan.receipt import Receipt
from pipeline.schedule.run_state import RunState
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import checksum, object_keys
from pipeline.storage.volume import Target

MAX_TASKS = 32
MAX_BYTES = 256 << 20


def look_for(run: RunState) -> list[str]:
    """Read the last task of each worker again, of MAX_TASKS workers and about MAX_BYTES at most.

    Returns a line for each that is not stored as its receipt says.
    """
    target, read, lost = open_target(run.job.target), 0, []
    for worker, receipt in list(run.totals.last_written.items())[-MAX_TASKS:]:
        if what := _fault(run, target, receipt):
            lost.append(f"task {receipt.index}, which {worker} wrote: {what}")
        read += receipt.bytes
        if read > MAX_BYTES:
            break
    return lost


def _fault(run: RunState, target: Target, receipt: Receipt) -> str:
    keys = object_keys(target, run.job.plan, receipt.index)
    try:
        objects = retrying(lambda: dict(target.get(keys)), run.job.retries)
    except EmsrError as error:
        return f"it cannot be read ({error})"
    whole = {key: value for key, value in objects.items() if value is not None}
    if len(whole) < len(objects):
        return f"{next(key for key, value in objects.items() if value is None)} is missing"
    return "" if checksum(whole) == receipt.checksum else "stored bytes differ from those written"
