"""Measures what one client takes of a core with ten thousand workers: CPU per answer, memory, bytes of its lock.

    python benchmarks/scheduler_at_size.py [workers=1000] [seconds=60]

Scheduler, client, exam, leases, ledger, receipts, lock and progress are the real ones, wired as a run wires them, over
TCP. The workers are stand-ins (benchmarks/parts/stand_in_workers.py): they speak Dask's protocol, run emsr's own code
for what they are sent, with a task that writes nothing, and answer LEASES_PER_S leases a second in all, as ten thousand
workers do. Measured is a window that begins when all threads have a lease.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from distributed import Client
from noop_slabs import planned
from parts.dask_processes import environment, scheduler_address, usage
from parts.stand_in_answers import SLABS, THREADS, answer, fit

from pipeline.cluster.connect import connect
from pipeline.config import urls
from pipeline.config.volume import ClusterConfig
from pipeline.run import callback
from pipeline.schedule import exam as exam_module
from pipeline.schedule.check_workers import check_workers
from pipeline.schedule.crew import Crew
from pipeline.schedule.exam import Exam
from pipeline.schedule.execute import execute
from pipeline.schedule.leases import LEASES_PER_S
from pipeline.schedule.progress import RunProgress
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import KEY, TargetLock


class _Enough(Exception):
    pass


def measure(client: Client, workers: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        job = planned(SLABS)
        target = dataclasses.replace(job.target, url=f"file://{folder}/sr")
        job = dataclasses.replace(job, target=target, run="bench", stall_s=600)
        store = Store(urls.sidecar(target.url))
        lock = TargetLock(store, "bench")
        exam = Exam(job, fit)
        exam_module._sample = lambda job: None  # type: ignore[assignment]  # its source exists nowhere
        crew = Crew(client, exam)
        exam.begin()
        first, began = usage(client), time.monotonic()
        check_workers(client, crew)
        while crew.capacity().workers < workers:
            crew.look()
            time.sleep(0.05)
        out: dict[str, Any] = {"workers": workers, "exam_s": round(time.monotonic() - began)}
        lock.acquire()
        ledger = Ledger(store, job.digest, job.plan.tasks, "bench", lock.hold)
        run = RunState(exam.job, ledger, lock)
        marks: list[tuple[dict[str, tuple[float, float]], float, float, int]] = []
        answers, began = 0, time.monotonic()
        slots = crew.capacity().threads

        with (Path(folder) / "progress").open("w") as stream, RunProgress(ledger.tasks, 0, stream) as progress:
            show = callback(progress, lock)

            def watch(totals: RunTotals) -> None:
                nonlocal answers
                show(totals)
                answers = totals.written
                now = time.monotonic()
                if not marks and len(client.futures) >= slots:
                    out["seconds_to_full"] = round(now - began)
                    marks.append((usage(client), now, time.thread_time(), totals.results))
                elif len(marks) == 1 and now - marks[0][1] > seconds:
                    marks.append((usage(client), now, time.thread_time(), totals.results))
                    raise _Enough

            with suppress(_Enough):
                execute(client, run, answer, watch, crew)
        (used, at, main, before), (used_then, then, main_then, after) = marks
        leases, wall = after - before, then - at
        for who in ("scheduler", "client"):
            cpu = used_then[who][0] - used[who][0]
            out[f"{who}_ms_per_answer"] = round(1e3 * cpu / leases, 2)
            out[f"{who}_share_of_a_core"] = round(cpu / wall, 3)
            out[f"{who}_mb"] = [round(first[who][1]), round(used_then[who][1])]
        out["main_thread_ms_per_answer"] = round(1e3 * (main_then - main) / leases, 2)
        out |= {"answers_per_s": round(leases / wall, 1), "tasks_written": answers}
        lock.release()
        value = store.get(KEY) or b""
        out |= {"lock_bytes": len(value), "workers_in_lock": len(json.loads(value)["workers"])}
        crew.close()
        exam.end()
    return out


@contextmanager
def stand_ins(count: int) -> Iterator[Client]:
    """The pipeline's own client of a scheduler with so many workers, which are processes of their own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    parts = Path(__file__).parent / "parts"
    dask_scheduler = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    dask_scheduler += ["--preload", str(parts / "quick_registration.py")]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "scheduler.json"
        quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL, "env": environment()}
        processes = [
            subprocess.Popen([*dask_scheduler, "--scheduler-file", str(place)], stdout=subprocess.DEVNULL, **quiet)
        ]
        try:
            address = scheduler_address(place)
            command = [
                sys.executable,
                str(parts / "stand_in_workers.py"),
                address,
                str(count),
                str(LEASES_PER_S),
                str(THREADS),
            ]
            began = time.monotonic()
            holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **quiet)
            processes.append(holder)
            assert holder.stdout.readline() == "ready\n"
            scheduler = psutil.Process(processes[0].pid)
            print({"registered_s": round(time.monotonic() - began), "scheduler_descriptors": scheduler.num_fds()})
            with connect(ClusterConfig(kind="address", address=address), THREADS) as client:
                yield client
        finally:
            for process in reversed(processes):
                process.kill()
                process.wait()


if __name__ == "__main__":
    import scheduler_at_size  # workers import it by this name, not as __main__

    workers, seconds = (int(a) for a in sys.argv[1:] + ["1000", "60"][len(sys.argv) - 1 :])
    with stand_ins(workers) as client:
        print(scheduler_at_size.measure(client, workers, seconds))
