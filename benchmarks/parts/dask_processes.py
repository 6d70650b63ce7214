"""Runs a Dask scheduler and workers in processes of their own, so that each can be measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psutil
from distributed import Client

from pipeline.cluster import certificates
from pipeline.cluster.connect import LOGS, connect
from pipeline.config.volume import ClusterConfig

BENCHMARKS = Path(__file__).resolve().parents[1]
Usage = tuple[float, float]
"""CPU seconds and resident MB of a process."""
HANGING_S = 1200
"""A guard against processes that hang. It is longer than anything takes on a loaded machine."""


def environment() -> dict[str, str]:
    """Environment of scheduler and workers: logs as short as in the pipeline's clusters, and a path to benchmarks."""
    short = {f"DASK_{key}".upper().replace(".", "__").replace("-", "_"): str(length) for key, length in LOGS.items()}
    return {**os.environ, **short, "PYTHONPATH": f"{BENCHMARKS.parent}{os.pathsep}{BENCHMARKS}"}


def scheduler_address(place: Path) -> str:
    """The address of the scheduler that writes this file when it is ready. Waits for it."""
    while not (place.exists() and place.read_text().rstrip().endswith("}")):
        time.sleep(0.05)
    return str(json.loads(place.read_text())["address"])


@contextmanager
def apart(workers: int, threads: int = 2, preload: str = "", secured: bool = False) -> Iterator[Client]:
    """Yields the pipeline's own client of such a cluster. `preload` is a module that every worker imports first.

    With `secured` they talk by TLS, with certificates as a run makes them.
    """
    environ = environment()
    dask = [sys.executable, "-m", "dask"]
    with (
        tempfile.TemporaryDirectory() as folder,
        certificates.in_files(Path(folder)) if secured else nullcontext() as files,
    ):
        place = Path(folder) / "scheduler.json"
        common = ["--scheduler-file", str(place), "--no-dashboard"]
        if files is not None:
            names = {"ca-file": files.ca_file, "cert": files.cert_file, "key": files.key_file}
            common += ["--protocol", "tls", *(f"--tls-{name}={path}" for name, path in names.items())]
        commands = [[*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *common]]
        preloads = ["--preload", preload] if preload else []
        commands += [
            [*dask, "worker", "--nthreads", str(threads), "--local-directory", folder, *common, *preloads]
        ] * workers
        processes = [
            subprocess.Popen(c, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in commands
        ]
        try:
            address = scheduler_address(place)
            security = None if files is None else certificates.of_files(files)
            with Client(address, timeout=HANGING_S, security=security) as first:
                first.wait_for_workers(workers, timeout=HANGING_S)
            with connect(ClusterConfig(kind="address", address=address, security=files), threads) as client:
                yield client
        finally:
            for process in processes[::-1]:
                process.terminate()
            for process in processes:
                process.wait(HANGING_S)


def usage(client: Client) -> dict[str, Usage]:
    """Usage of scheduler and client."""
    return {"scheduler": client.run_on_scheduler(_usage), "client": _usage()}


def _usage() -> Usage:
    process = psutil.Process()
    times = process.cpu_times()
    return times.user + times.system, process.memory_info().rss / 1e6


def worker_memory(client: Client) -> dict[str, tuple[int, int]]:
    """(resident, peak) bytes of each worker."""
    found: dict[str, tuple[int, int]] = client.run(_memory)
    return found


def _memory() -> tuple[int, int]:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024
