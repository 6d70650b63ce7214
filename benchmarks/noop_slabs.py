"""What the control plane costs: no-op slabs through a real local cluster, ledger included.

    python benchmarks/noop_slabs.py [slabs=100000] [workers=2]

Prints scheduler and client CPU per slab, and how much resident memory each grew after the first tenth.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from typing import Any

import psutil
from distributed import Client

from pipeline.cluster import connect
from pipeline.config import ClusterConfig, NetworkConfig, SourceConfig, TargetConfig
from pipeline.geometry import ZYX, Box
from pipeline.inference import describe
from pipeline.layout import choose
from pipeline.plan import Plan
from pipeline.schedule import Outcome, drive
from pipeline.storage.kv import Store
from pipeline.storage.ledger import WRITTEN, Ledger
from pipeline.storage.volume import TargetSpec
from pipeline.worker import Job, LeaseResult, Receipt


def noop(job: Job, start: int, stop: int) -> LeaseResult:
    return LeaseResult(tuple(Receipt(i, WRITTEN, seconds=1e-4) for i in range(start, stop)), 0, 0)


def planned(slabs: int) -> Job:
    """A job of about this many slabs in z columns of 100 (its volume exists nowhere)."""
    side = max(1, round((slabs / 100) ** 0.5))
    shape = ZYX(800, 512 * side, 512 * -(-slabs // (100 * side)))
    box = Box.at(ZYX(0, 0, 0), shape)
    network = describe(NetworkConfig(name="nearest", scale=8))
    shapes = choose(shape, 8, TargetConfig(url="x", mips=1), ZYX(8, 512, 512))
    plan = Plan(box, box, shapes.slab_shape, 8, network.lattice, shapes.levels, shapes.fidelity)
    target = TargetSpec("file:///nowhere", "ome-zarr", "raw", 8, (1, 1, 1), (0, 0, 0), plan.levels, plan.fidelity)
    return Job("0" * 64, SourceConfig(url="file:///nowhere"), "", network, plan, target, 0)


def usage(client: Client) -> dict[str, tuple[float, float]]:
    """(CPU seconds, resident MB) of scheduler and client."""

    def of(process: psutil.Process) -> tuple[float, float]:
        times = process.cpu_times()
        return times.user + times.system, process.memory_info().rss / 1e6

    return {"scheduler": client.run_on_scheduler(lambda: of(psutil.Process())), "client": of(psutil.Process())}


def measure(slabs: int, workers: int) -> dict[str, Any]:
    job = planned(slabs)
    marks: list[tuple[int, dict[str, tuple[float, float]]]] = []
    with tempfile.TemporaryDirectory() as folder, scheduler_apart(workers) as client:
        ledger = Ledger(Store(f"file://{folder}"), job.digest, job.plan.tasks, "bench")

        def watch(outcome: Outcome) -> None:
            if outcome.written >= len(marks) * job.plan.tasks // 10:
                marks.append((outcome.written, usage(client)))

        began, first = time.perf_counter(), usage(client)
        drive(client, job, ledger, threading.Event(), progress=watch, work=noop)
        wall, last = time.perf_counter() - began, usage(client)
        assert ledger.counts()["written"] == job.plan.tasks
    tenth = marks[min(2, len(marks) - 1)][1]
    out: dict[str, Any] = {"slabs": job.plan.tasks, "wall_s": round(wall, 1), "slabs_per_s": round(job.plan.tasks / wall)}
    for who in ("scheduler", "client"):
        out[f"{who}_cpu_ms_per_slab"] = round(1e3 * (last[who][0] - first[who][0]) / job.plan.tasks, 3)
        out[f"{who}_growth_mb"] = round(last[who][1] - tenth[who][1], 1)
    return out


class scheduler_apart:  # noqa: N801
    """A scheduler and workers in processes of their own, so that client and scheduler are measured apart."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __enter__(self) -> Client:
        import subprocess

        self.folder = tempfile.TemporaryDirectory()
        place = f"{self.folder.name}/scheduler.json"
        dask = [sys.executable, "-m", "dask"]
        common = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": _environ()}
        self.processes = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", place], **common)]
        for _ in range(self.workers):
            self.processes.append(subprocess.Popen([*dask, "worker", "--scheduler-file", place, "--nthreads", "2", "--no-dashboard"], **common))
        client = Client(scheduler_file=place, timeout=60)
        client.wait_for_workers(self.workers, timeout=60)
        address = client.scheduler.address
        client.close()
        self.context = connect(ClusterConfig(kind="address", address=address), 2)
        return self.context.__enter__()

    def __exit__(self, *exc: object) -> None:
        self.context.__exit__(None, None, None)
        for process in self.processes[::-1]:
            process.terminate()
            process.wait(20)
        self.folder.cleanup()


def _environ() -> dict[str, str]:
    import os
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    short = {"DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "100", "DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "100"}
    return {**os.environ, **short, "PYTHONPATH": f"{root}:{root / 'benchmarks'}"}


if __name__ == "__main__":
    import noop_slabs  # workers import it by this name, not as __main__

    print(noop_slabs.measure(*(int(a) for a in (sys.argv[1:] + ["100000", "2"][len(sys.argv) - 1 :]))))
