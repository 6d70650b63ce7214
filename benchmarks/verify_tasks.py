"""Measures what `emsr verify` itself takes at many tasks: the client's memory and time, without reading any object.

    python benchmarks/verify_tasks.py [tasks=1000000] [remembered=10000000]

`tasks` go through leases to threads of this process that answer at once with the right checksum; of `remembered` tasks
the ledger is loaded and everything is kept that a verification keeps. Each is done in a process of its own. Printed are
seconds, tasks a second, and by how many bytes a task the process's peak size grew.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from typing import Any

from noop_slabs import planned
from resume import Finished

from pipeline.cluster.connect import connect
from pipeline.config.volume import ClusterConfig
from pipeline.plan.receipt import WRITTEN, Receipt
from pipeline.schedule.execute import hand_out
from pipeline.schedule.findings import Findings
from pipeline.schedule.in_flight import InFlight
from pipeline.schedule.run_state import RunState
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.worker.job import Job, LeaseResult


def right(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
    """What a worker would say of objects that are as they were written; Finished records 0 as all checksums."""
    return LeaseResult(tuple(Receipt(i, WRITTEN, seconds=1e-4) for i in range(start, stop)), 0, 0)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(tasks: int, read: bool) -> dict[str, Any]:
    job = planned(tasks)
    tasks = job.plan.tasks
    with tempfile.TemporaryDirectory() as folder:
        Finished(Store(f"file://{folder}"), job.digest, tasks, "r").finish()
        small = Ledger(Store(f"file://{folder}-small"), job.digest, 1, "s")
        small.load()
        before, began = peak_bytes(), time.perf_counter()
        ledger = Ledger(Store(f"file://{folder}"), job.digest, tasks, "s")
        ledger.load()
        findings = Findings(job.plan, ledger, lambda word, task, why: None, requeue=False)
        loaded = time.perf_counter()
        out = {
            "tasks": tasks,
            "load_s": round(loaded - began, 1),
            "bytes_per_task": round((peak_bytes() - before) / tasks, 1),
        }
        if read:
            with connect(ClusterConfig(kind="local", workers=1), 1, to_read=True) as client:
                in_flight = InFlight(client, job, right)
                hand_out(RunState(job, ledger), in_flight, findings, job.plan.passes(), lambda totals: None)
            assert findings.right == tasks
            seconds = time.perf_counter() - loaded
            out |= {"read_s": round(seconds, 1), "tasks_per_s": round(tasks / seconds)}
            out["bytes_per_task_read"] = round((peak_bytes() - before) / tasks, 1)
    return out


def _child(tasks: int, read: bool, answers: Any) -> None:
    answers.put(measure(tasks, read))


if __name__ == "__main__":
    import sys

    many = [int(a) for a in sys.argv[1:] + ["1000000", "10000000"][len(sys.argv) - 1 :]]
    context = multiprocessing.get_context("spawn")
    for tasks, read in zip(many, (True, False), strict=True):
        answers = context.Queue()
        child = context.Process(target=_child, args=(tasks, read, answers))
        child.start()
        print(answers.get())
        child.join()
