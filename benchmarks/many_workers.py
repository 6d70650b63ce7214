"""Measures one scheduler with 1024 workers: no-op slabs through the real schedule and ledger.

    python benchmarks/many_workers.py [slabs=100000] [workers=1024]

The scheduler has a process of its own. All workers share another: distributed.Worker instances of one thread on one
event loop, with eight threads for the tasks of all (a thousand would mostly wait for Python's lock), without nannies,
monitors and profilers. They cost less than 1024 machines would; scheduler and client are the real ones.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client, Worker
from noop_slabs import measure
from parts.dask_processes import environment, scheduler_address

from pipeline.cluster.connect import LOGS, connect
from pipeline.config.volume import ClusterConfig

_LIGHT = {
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
    "distributed.admin.system-monitor.interval": "1h",
    "distributed.admin.tick.interval": "1h",
    **LOGS,
    "distributed.worker.http.routes": [],
    "distributed.comm.timeouts.connect": "300s",
}


async def _hold(address: str, count: int, folder: str) -> None:
    threads = ThreadPoolExecutor(8)
    workers = [
        await Worker(address, nthreads=1, name=n, local_directory=folder, dashboard=False, executor=threads)
        for n in range(count)
    ]
    print("ready", flush=True)
    await asyncio.gather(*(worker.finished() for worker in workers))


@contextmanager
def many_workers(count: int) -> Iterator[Client]:
    """Yields the pipeline's own client of a scheduler with `count` workers."""
    dask_scheduler = [sys.executable, "-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "scheduler.json"
        quiet = {"stderr": subprocess.DEVNULL, "env": environment()}
        scheduler = subprocess.Popen(
            [*dask_scheduler, "--scheduler-file", str(place)], stdout=subprocess.DEVNULL, **quiet
        )  # type: ignore[call-overload]
        holder = None
        try:
            address = scheduler_address(place)
            command = [sys.executable, __file__, "hold", address, str(count), folder]
            holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **quiet)  # type: ignore[call-overload]
            assert holder.stdout.readline() == "ready\n"
            with connect(ClusterConfig(kind="address", address=address), 1) as client:
                yield client
        finally:
            for process in (holder, scheduler):
                if process is not None:
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == ["hold"]:
        with dask.config.set(_LIGHT):
            asyncio.run(_hold(sys.argv[2], int(sys.argv[3]), sys.argv[4]))
    else:
        slabs, workers = (int(a) for a in sys.argv[1:] + ["100000", "1024"][len(sys.argv) - 1 :])
        with many_workers(workers) as client:
            print({"workers": len(client.nthreads())} | measure(client, slabs))
