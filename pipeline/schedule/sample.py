"""The end of a run: some of what workers say they wrote is looked for where the client sees the target."""

from __future__ import annotations

from pipeline.base.retry import retrying
from pipeline.schedule.run_state import RunState
from pipeline.storage.targets.open import open_target
from pipeline.storage.targets.task_objects import checksum, object_keys

MAX_TASKS = 32
MAX_BYTES = 256 << 20


def look_for(run: RunState) -> list[str]:
    """Read the last task of each worker again, of MAX_TASKS workers and about MAX_BYTES at most.

    Returns a line for each that is not stored as its receipt says. Raises what storage raises.
    """
    target, plan = open_target(run.job.target), run.job.plan
    read, lost = 0, []
    for worker, receipt in list(run.totals.last_written.items())[-MAX_TASKS:]:
        keys = object_keys(target, plan, receipt.index)
        objects = retrying(lambda keys=keys: target.get(keys), run.job.retries)  # type: ignore[misc]
        absent = [key for key, value in objects.items() if value is None]
        whole = {key: value for key, value in objects.items() if value is not None}
        if absent or checksum(whole) != receipt.checksum:
            what = f"{absent[0]} is missing" if absent else "stored bytes differ"
            lost.append(f"task {receipt.index}, which {worker} wrote: {what}")
        read += receipt.bytes
        if read > MAX_BYTES:
            break
    return lost
