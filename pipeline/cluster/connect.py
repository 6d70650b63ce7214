"""The Dask client of a run: of workers on this machine, of a scheduler that is already there, or of a batch system.

Another batch system is a file beside `slurm`, a line in `connect`, `batch_job`, `worker_count` and `may_come`, and its
keys in config/cluster.py.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dask
from distributed import Client, LocalCluster, Scheduler, Security, Worker, WorkerPlugin

from pipeline import __version__
from pipeline.base.errors import ClusterError
from pipeline.cluster import kubernetes, slurm
from pipeline.config.cluster import ClusterConfig
from pipeline.process.children import starting_processes

CONNECT_S = 30

LOGS = {
    # The scheduler's memory must not grow with the number of leases (distributed #3898, #2371): it would keep the last
    # 1000 messages to every worker.
    "distributed.admin.log-length": 100,
    "distributed.admin.low-level-log-length": 2,
}
_SETTINGS = {
    **LOGS,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.comm.timeouts.connect": "30s",
    # A minute without network must not cost the workers: their leases would run again.
    "distributed.comm.timeouts.tcp": "300s",
    # LocalCluster looks once, this long after a worker's death, and ends the worker for good if it is restarting just
    # then. Nannies restart their workers; a run must not be left without any.
    "distributed.deploy.lost-worker-timeout": "1000 days",
    # Encoded shards are fresh 100 MB blocks: huge pages make their page faults four times cheaper.
    "distributed.nanny.pre-spawn-environ.GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def worker_count(config: ClusterConfig) -> int:
    """How many workers there will be at most.

    Without cluster.workers there is one for each visible GPU of this machine, or for each core where it has no GPU. For
    kind address the number serves the price alone: the scheduler's workers are those that are there.
    """
    if config.kind in ("slurm", "kubernetes"):
        return config.bounds()[1]
    gpus = 0 if config.gpus_per_worker == 0 else len(visible_gpus())
    return config.workers or gpus or len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """NVIDIA devices that a process here would see, as CUDA_VISIBLE_DEVICES names them, without asking torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [d.strip() for d in named.split(",") if d.strip() and d.strip() != "-1"]
    return sorted((d.name[6:] for d in Path("/dev").glob("nvidia[0-9]*") if d.name[6:].isdigit()), key=int)


@contextmanager
def connect(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    """A client whose workers run `in_flight` slabs each. Raises ClusterError where none can be had."""
    _quiet()
    for key, path in config.security.model_dump().items() if config.security is not None else ():
        if not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise ClusterError(f"cluster.security.{key} {path} cannot be read", "a PEM file", "See docs/clusters.md")
    with dask.config.set(_SETTINGS):
        if config.kind == "address":
            clients = _address_client(config)
        elif config.kind == "slurm":
            clients = slurm.jobs(config, in_flight, _security(config))
        elif config.kind == "kubernetes":
            clients = kubernetes.pods(config, in_flight)
        else:
            clients = _local_client(config, in_flight)
        with clients as client:
            yield client


def batch_job(config: ClusterConfig, in_flight: int) -> str | None:
    """What a batch system is given for each worker: a job script or a manifest. None for other kinds."""
    if config.kind == "slurm":
        return slurm.script(config, in_flight, _security(config))
    return kubernetes.manifest(config, in_flight) if config.kind == "kubernetes" else None


def may_come(client: Client) -> bool:
    """Whether a worker may still come where there is none: Slurm has a job of ours, Kubernetes looks for a node."""
    kind = type(client.cluster).__name__
    return kind == "KubeCluster" or (kind == "SLURMCluster" and slurm.queued(client.cluster))


def refuse_other_versions(client: Client) -> None:
    """Raises ClusterError where a worker has another version of emsr, or none. Workers can answer without having it."""
    found = client.run(eval, "__import__('pipeline').__version__", on_error="return")
    for address, version in found.items():
        if version != __version__:
            theirs = f"emsr {version}" if isinstance(version, str) else f"no emsr ({version})"
            raise ClusterError(
                f"the worker at {address} has {theirs}, this is emsr {__version__}",
                "the same version in every process",
                "Install it there",
            )


def stop_profiling(client: Client) -> None:
    """Switch Dask's profiler off in all workers, also in those that come later.

    It looks at every thread a hundred times a second. Under Python 3.11 that can stop a worker for good (cpython
    #106883): what the profiler allocates may start a garbage collection, and one that ends a `threading.local` waits
    for the lock that the profiler holds.
    """
    client.register_plugin(_NoProfile())


def shorten_logs(client: Client) -> None:
    """Set LOGS in a scheduler that was already there, if it has emsr."""
    with suppress(Exception):
        client.run_on_scheduler(_shorten_logs)


def _shorten_logs(dask_scheduler: Scheduler) -> None:
    dask.config.set(LOGS)
    for sent in (*dask_scheduler.stream_comms.values(), *dask_scheduler.client_comms.values()):
        sent.recent_message_log = deque(sent.recent_message_log, maxlen=LOGS["distributed.admin.low-level-log-length"])


@contextmanager
def _address_client(config: ClusterConfig) -> Iterator[Client]:
    assert config.address is not None
    try:
        client = Client(config.address, timeout=CONNECT_S, set_as_default=False, security=_security(config))
    except (OSError, TimeoutError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(
            f"no Dask scheduler answers at {config.address} ({why})",
            "a running scheduler",
            "Start one with `dask scheduler`, or use kind: local",
        ) from None
    try:
        yield client
    finally:
        client.close(timeout=10)


@contextmanager
def _local_client(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    workers, gpus = worker_count(config), visible_gpus()
    if config.gpus_per_worker and workers > len(gpus):
        raise ClusterError(
            f"{workers} workers are to have a GPU each, {len(gpus)} are visible",
            "a GPU for each",
            "Lower cluster.workers or gpus_per_worker",
        )
    with (
        starting_processes(),
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
        client.register_plugin(_OneDevice(None if config.gpus_per_worker == 0 else gpus))
        yield client


def _security(config: ClusterConfig) -> Security | None:
    """TLS with one certificate for whichever part this process plays; None where the file says nothing, for Dask's own
    configuration.
    """
    files = config.security
    if files is None:
        return None
    parts = {
        f"tls_{part}_{what}": path
        for part in ("client", "scheduler", "worker")
        for what, path in (("cert", files.cert_file), ("key", files.key_file))
    }
    return Security(require_encryption=True, tls_ca_file=files.ca_file, **parts)


def _quiet() -> None:
    """Dask's own logs and tracebacks are not for users; several of its loggers have levels of their own."""
    for name in ["distributed", "tornado", "asyncio", *logging.root.manager.loggerDict]:
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class _OneDevice(WorkerPlugin):  # type: ignore[misc]
    """Local workers are numbered; each sees the GPU of its number and no other, or none where `gpus` is None."""

    name = "emsr-device"

    def __init__(self, gpus: list[str] | None) -> None:
        self.gpus = gpus

    def setup(self, worker: Worker) -> None:
        if self.gpus is None:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        elif self.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = device = self.gpus[int(worker.name) % len(self.gpus)]
            _stay_near(device)
        else:
            os.environ["EMSR_DEVICE"] = str(worker.name)  # of those that torch alone knows, if any


def _stay_near(device: str) -> None:
    """With dask-cuda, run on the cores that the GPU is wired to."""
    try:
        from dask_cuda.utils import get_cpu_affinity
    except ImportError:
        return
    with suppress(OSError, TypeError):
        os.sched_setaffinity(0, get_cpu_affinity(int(device) if device.isdigit() else device))


class _NoProfile(WorkerPlugin):  # type: ignore[misc]
    """Without statistics of where tasks spend their time, for workers that are there and those that come."""

    name = "emsr-no-profile"

    def setup(self, worker: Worker) -> None:
        for name in ("profile", "profile-cycle"):
            if (callback := worker.periodic_callbacks.pop(name, None)) is not None:
                callback.stop()


class _IgnoreInterrupts(WorkerPlugin):  # type: ignore[misc]
    """Ctrl-C and the end of a terminal reach all its processes; only the client may act on them: workers drain."""

    name = "emsr-interrupts"

    def setup(self, worker: Worker) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
