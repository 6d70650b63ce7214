"""Which Dask client: workers of our own on this machine, or a scheduler that is already there."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
from distributed import Client, LocalCluster, Worker, WorkerPlugin

from pipeline.config import ClusterConfig
from pipeline.errors import ClusterError

CONNECT_S = 30

_SETTINGS = {
    # Short logs: the scheduler's memory must not grow with the number of leases (distributed #3898, #2371).
    "distributed.admin.log-length": 100,
    "distributed.admin.low-level-log-length": 100,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.comm.timeouts.connect": "30s",
    # LocalCluster looks once, this long after a worker's death, and ends the worker for good if it is restarting just then.
    # Nannies restart their workers; a run must not be left without any.
    "distributed.deploy.lost-worker-timeout": "1000 days",
    # Encoded shards are fresh 100 MB blocks: huge pages make their page faults four times cheaper.
    "distributed.nanny.pre-spawn-environ.GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def worker_count(config: ClusterConfig) -> int:
    """Local workers: as asked, else one per visible GPU, else one per core."""
    return config.workers or visible_gpus() or len(os.sched_getaffinity(0))


def visible_gpus() -> int:
    """NVIDIA devices that a process here would see, without asking torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return len([d for d in named.split(",") if d.strip() and d.strip() != "-1"])
    return len([d for d in Path("/dev").glob("nvidia[0-9]*") if d.name[6:].isdigit()])


@contextmanager
def connect(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    """A client whose workers run `in_flight` slabs each. Raises ClusterError where no scheduler answers."""
    _quiet()
    with dask.config.set(_SETTINGS):
        if config.kind == "address":
            assert config.address is not None
            try:
                client = Client(config.address, timeout=CONNECT_S, set_as_default=False)
            except (OSError, TimeoutError, ValueError) as error:
                why = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ClusterError(
                    f"no Dask scheduler answers at {config.address} ({why})", "a running scheduler", "Start one with `dask scheduler`, or use kind: local"
                ) from None
            try:
                yield client
            finally:
                client.close(timeout=10)
            return
        workers = worker_count(config)
        with (
            LocalCluster(
                n_workers=workers,
                threads_per_worker=in_flight,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.register_plugin(_IgnoreInterrupts())
            client.register_plugin(_OneDevice())
            yield client


def _quiet() -> None:
    """Dask's own logs and tracebacks are not for users; several of its loggers have levels of their own."""
    for name in ["distributed", "tornado", "asyncio", *logging.root.manager.loggerDict]:
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class _OneDevice(WorkerPlugin):  # type: ignore[misc]
    """Local workers are numbered; each takes the GPU of its number."""

    name = "emsr-device"

    def setup(self, worker: Worker) -> None:
        os.environ["EMSR_DEVICE"] = str(worker.name)


class _IgnoreInterrupts(WorkerPlugin):  # type: ignore[misc]
    """Ctrl-C reaches every process of the terminal; only the client may act on it, so that workers drain."""

    name = "emsr-interrupts"

    def setup(self, worker: Worker) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
