"""Measures the control plane: no-op slabs through a real local cluster, ledger included.

    python benchmarks/noop_slabs.py [slabs=100000] [workers=2] [tls]

Printed are CPU per slab of scheduler and client, their resident memory at the start and after 10^4, 10^5, ... slabs,
and how many names Dask keeps. With `tls` the same cluster is measured three times without certificates and three times
with them, in turn, and the ratios of the medians are printed.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from typing import Any

from distributed import Client, Scheduler
from parts.dask_processes import HANGING_S, Usage, apart, usage

from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import NetworkConfig, SourceConfig, TargetConfig
from pipeline.inference.describe import describe
from pipeline.plan.plan import Plan
from pipeline.plan.receipt import WRITTEN, Receipt
from pipeline.plan.target_spec import TargetSpec
from pipeline.prepare.layout import choose
from pipeline.schedule.execute import execute
from pipeline.schedule.run_state import RunState
from pipeline.schedule.totals import RunTotals
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.worker.job import Job, LeaseResult


def noop(job: Job, start: int, stop: int, max_s: float) -> LeaseResult:
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
    return Job("0" * 64, SourceConfig(url="file:///nowhere"), "", network, plan, target, 0, 600)


def measure(client: Client, slabs: int) -> dict[str, Any]:
    job = planned(slabs)
    marks: dict[int, dict[str, Usage]] = {}
    due = [10**n for n in range(4, 8) if 10**n < job.plan.tasks]
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Store(f"file://{folder}"), job.digest, job.plan.tasks, "bench")

        def watch(totals: RunTotals) -> None:
            if due and totals.written >= due[0]:
                marks[due.pop(0)] = usage(client)

        began, first = time.perf_counter(), usage(client)
        execute(client, RunState(job, ledger), noop, watch)
        wall, last = time.perf_counter() - began, usage(client)
        assert ledger.counts()["written"] == job.plan.tasks
    marks[job.plan.tasks] = last
    out: dict[str, Any] = {
        "slabs": job.plan.tasks,
        "wall_s": round(wall, 1),
        "slabs_per_s": round(job.plan.tasks / wall),
    }
    for who in ("scheduler", "client"):
        out[f"{who}_cpu_ms_per_slab"] = round(1e3 * (last[who][0] - first[who][0]) / job.plan.tasks, 3)
        out[f"{who}_mb"] = {0: round(first[who][1], 1)} | {done: round(used[who][1], 1) for done, used in marks.items()}
    out["names_that_stay"] = settled(client)
    return out


def settled(client: Client) -> dict[str, int]:
    """`names_that_stay` once the scheduler has dropped the tasks, of whose release it hears with a delay."""
    deadline = time.monotonic() + HANGING_S
    while (kept := client.run_on_scheduler(names_that_stay))["tasks"] and time.monotonic() < deadline:
        time.sleep(0.1)
    return dict(kept)


def names_that_stay(dask_scheduler: Scheduler) -> dict[str, int]:
    """Counts what the scheduler keeps for ever. The counts must not grow with the number of slabs."""
    spans = dask_scheduler.extensions["spans"].spans if "spans" in dask_scheduler.extensions else {}
    return {
        "prefixes": len(dask_scheduler.task_prefixes),
        "groups": len(dask_scheduler.task_groups),
        "spans": len(spans),
        "tasks": len(dask_scheduler.tasks),
    }


if __name__ == "__main__":
    import noop_slabs  # workers import it by this name, not as __main__

    arguments = [a for a in sys.argv[1:] if a != "tls"]
    slabs, workers = (int(a) for a in arguments + ["100000", "2"][len(arguments) :])
    runs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for secured in (False, True) * 3 if "tls" in sys.argv else (False,):
        with apart(workers, secured=secured) as client:
            runs[secured].append(noop_slabs.measure(client, slabs))
        print("tls" if secured else "tcp", runs[secured][-1], flush=True)
    for key in ("wall_s", "scheduler_cpu_ms_per_slab", "client_cpu_ms_per_slab") if runs[True] else ():
        plain, secret = (statistics.median(run[key] for run in runs[secured]) for secured in (False, True))
        print(f"{key}: {plain} without TLS, {secret} with it, ratio {secret / plain:.2f}")
