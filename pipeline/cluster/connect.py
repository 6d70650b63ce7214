"""The Dask client of a run: of workers on this machine, of a scheduler that is already there, or of a batch system.

Another batch system is an entry in `batch_systems`, and its keys in config/cluster.py.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Scheduler, Worker, WorkerPlugin

from pipeline.base.command import exhausted
from pipeline.base.errors import ClusterError, EmsrError
from pipeline.base.waits import closing, waiting
from pipeline.base.words import counted
from pipeline.cluster import batch, certificates, kubernetes, steady_clock
from pipeline.cluster.patient_client import PatientClient
from pipeline.cluster.site_settings import refuse_values_for_mappings, start_failed
from pipeline.config.cluster import BATCH_KINDS, ClusterConfig
from pipeline.config.volume import Config
from pipeline.process import descriptors
from pipeline.process.children import LOOPBACK, refuse_without_loopback, starting_processes

CONNECT_S = 30
DESCRIPTORS, LOCAL_DESCRIPTORS = 3, 11
"""Files and connections that a scheduler in this process takes for each worker: one for work, one for heartbeats, now
and then one for a question; on this machine also its nanny's pipes and connections. Counted."""
DESCRIPTORS_BESIDE = 256
"""Those of this process itself: libraries, volumes, log."""

LOGS = {
    # The scheduler's memory must not grow with the number of leases (distributed #3898, #2371): it would keep the last
    # 1000 messages to every worker.
    "distributed.admin.log-length": 100,
    "distributed.admin.low-level-log-length": 2,
}
_SETTINGS: dict[str, Any] = {
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
    # A site's configuration may end workers and schedulers by the clock. Nothing starts those of a local cluster again.
    "distributed.worker.lifetime.duration": None,
    "distributed.worker.lifetime.restart": False,
    "distributed.scheduler.idle-timeout": None,
    "distributed.scheduler.no-workers-timeout": None,
    "distributed.scheduler.worker-ttl": "5 minutes",
    # Encoded shards are fresh 100 MB blocks: huge pages make their page faults four times cheaper.
    "distributed.nanny.pre-spawn-environ.GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Certificates guard the ports of Dask's own protocol, not its web pages: there are none, nor a dashboard.
    "distributed.scheduler.http.routes": [],
    "distributed.worker.http.routes": [],
    "distributed.worker.multiprocessing-method": "spawn",
}


def worker_count(config: ClusterConfig) -> int:
    """How many workers there will be at most.

    Without cluster.workers there is one for each visible GPU of this machine, or for each core where it has no GPU. For
    kind address the number serves the price alone: the scheduler's workers are those that are there.
    """
    if config.kind not in ("local", "address"):
        return config.bounds()[1]
    gpus = 0 if config.gpus_per_worker == 0 else len(visible_gpus())
    return config.workers or gpus or len(os.sched_getaffinity(0))


def slabs_in_flight(config: Config) -> int:
    """How many slabs each worker runs: `work.in_flight`, or what keeps its device busy.

    On a GPU one slab is computed, one has been read and waits, and one is encoded and put. A core that computes has no
    time for a third.
    """
    return config.work.in_flight or (3 if has_gpu(config.cluster) else 2)


def has_gpu(config: ClusterConfig) -> bool:
    """Whether it is known that each worker has a GPU: jobs and pods ask for one, this machine has some."""
    if config.gpus_per_worker is None:
        return config.kind == "local" and bool(visible_gpus())
    return config.gpus_per_worker > 0


def visible_gpus() -> list[str]:
    """NVIDIA devices that a process here would see, as CUDA_VISIBLE_DEVICES names them, without asking torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [d.strip() for d in named.split(",") if d.strip() and d.strip() != "-1"]
    return sorted((d.name[6:] for d in Path("/dev").glob("nvidia[0-9]*") if d.name[6:].isdigit()), key=int)


@contextmanager
def connect(config: ClusterConfig, in_flight: int, to_read: bool = False) -> Iterator[Client]:
    """A client whose workers run `in_flight` slabs each. Raises ClusterError where none can be had.

    `to_read` says that they only wait for stores: for kind local that is done in threads of this process.
    """
    _quiet()
    steady_clock.install()
    descriptors.raise_limit()
    if config.kind in BATCH_KINDS or (config.kind == "local" and not to_read):
        each = LOCAL_DESCRIPTORS if config.kind == "local" else DESCRIPTORS
        descriptors.refuse_too_few(worker_count(config), each, DESCRIPTORS_BESIDE)
    refuse_values_for_mappings()
    if config.security is not None:
        certificates.refuse_unusable(config.security)
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(_SETTINGS))
        try:
            client = stack.enter_context(_clients(config, in_flight, to_read, stack))
        except EmsrError:
            raise
        except Exception as error:  # what Dask raises where it cannot start has no common ancestor
            if exhausted(error):
                raise  # no configuration is at fault
            raise start_failed(f"Dask does not start workers of cluster.kind {config.kind}", error) from None
        yield client


def _clients(config: ClusterConfig, in_flight: int, to_read: bool, stack: ExitStack) -> AbstractContextManager[Client]:
    if config.kind == "address":
        return _address_client(config)
    if config.kind in BATCH_KINDS:
        files = config.security or stack.enter_context(certificates.in_files(batch.shared_folder(config.kind)))
        return batch.jobs(config, in_flight, certificates.of_files(files))
    if config.kind == "kubernetes":
        return kubernetes.pods(config, in_flight)
    return _threads_client(config, in_flight) if to_read else _local_client(config, in_flight)


@contextmanager
def _threads_client(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    threads = max(worker_count(config) * in_flight, len(os.sched_getaffinity(0)))
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=threads,
            processes=False,
            protocol="inproc://",
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        PatientClient(cluster, set_as_default=False) as client,
    ):
        yield client


def batch_job(config: ClusterConfig, in_flight: int) -> str | None:
    """What a batch system is given for each worker: a job script or a manifest. None for other kinds."""
    if config.kind in BATCH_KINDS:
        files = config.security
        return batch.script(config, in_flight, certificates.of_files(files) if files else None)
    return kubernetes.manifest(config, in_flight) if config.kind == "kubernetes" else None


def may_come(client: Client) -> bool:
    """Whether a worker may still come where there is none: a batch system has a job of ours, Kubernetes looks for a
    node.

    Raises ClusterError where it is known that none will.
    """
    if type(client.cluster).__name__ == "KubeCluster":
        return kubernetes.may_come(client.cluster)
    return batch.is_ours(client.cluster) and batch.queued(client.cluster)


def why_none(client: Client) -> str:
    """Why no worker has come yet, in words of the batch system; "" where there is none, or it says nothing."""
    if type(client.cluster).__name__ == "KubeCluster":
        return kubernetes.why_none(client.cluster)
    return batch.why_none(client.cluster) if batch.is_ours(client.cluster) else ""


def tune(client: Client) -> None:
    """Change scheduler and workers for long runs, for as long as they live: docs/clusters.md says what for."""
    with suppress(Exception):  # a scheduler without emsr
        client.run_on_scheduler(descriptors.raise_limit)
    shorten_logs(client)
    stop_profiling(client)
    steady_clock.install_everywhere(client)


def stop_profiling(client: Client) -> None:
    """Switch Dask's profiler off in all workers, also in those that come later: see worker.check.may_freeze.

    It looks at every thread a hundred times a second.
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
    _warn_of_strangers(config.address)
    security = None if config.security is None else certificates.of_files(config.security)
    if security is None:  # then Dask's own configuration has the files
        certificates.refuse_unusable_of_site(config.address)
    try:
        with waiting(f"the Dask scheduler at {config.address}"):
            client = PatientClient(config.address, timeout=CONNECT_S, set_as_default=False, security=security)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ClusterError(
            f"no Dask scheduler answers at {config.address} ({why})",
            "a running scheduler",
            "Start one with certificates that fit these, or write tcp:// for one without TLS"
            if config.address.startswith("tls://")
            else "Start one with `dask scheduler`, write tls:// for one with TLS, or use kind: local",
        ) from None
    try:
        yield client
    finally:
        client.close(timeout=10)


def _warn_of_strangers(address: str) -> None:
    """One line where whoever reaches this scheduler can run code as its user: without TLS, and beyond this machine."""
    scheme, _, place = address.rpartition("://")
    if (scheme or dask.config.get("distributed.comm.default-scheme")) in ("tls", "wss"):
        return
    host = place.rpartition(":")[0].strip("[]")  # an IPv6 address stands in brackets
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host != "localhost":
        print(
            f"emsr: the scheduler at {address} is reached without TLS: whoever reaches it or its workers can run code "
            "as their user. docs/clusters.md says how to give it certificates.",
            file=sys.stderr,
        )


@contextmanager
def _local_client(config: ClusterConfig, in_flight: int) -> Iterator[Client]:
    workers, gpus = worker_count(config), visible_gpus()
    if config.gpus_per_worker and workers > len(gpus):
        raise ClusterError(
            f"{workers} workers are to have a GPU each, {len(gpus)} are visible",
            "a GPU for each",
            "Lower cluster.workers or gpus_per_worker",
        )
    refuse_without_loopback()
    # A folder that no other user can enter, or could have made before: Dask's own has one name for all users of /tmp.
    scratch = tempfile.TemporaryDirectory(
        prefix="emsr-", dir=dask.config.get("temporary-directory", None), ignore_cleanup_errors=True
    )
    with scratch as folder, dask.config.set({"temporary-directory": folder}), ExitStack() as stack:
        stack.enter_context(starting_processes(workers))
        with waiting(f"{counted(workers, 'worker')} to start on this machine"):
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=in_flight,
                processes=True,
                host=LOOPBACK,
                protocol="tls://",
                security=certificates.in_memory(),
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=logging.CRITICAL,
            )
        stack.enter_context(closing(cluster, "the workers of this machine to end"))
        client = stack.enter_context(PatientClient(cluster, set_as_default=False))
        client.register_plugin(_IgnoreInterrupts())
        client.register_plugin(_OneDevice(None if config.gpus_per_worker == 0 else gpus))
        yield client


def _quiet() -> None:
    """Dask's own logs and tracebacks are not for users; several of its loggers have levels of their own."""
    for name in ["distributed", "tornado", "asyncio", *logging.root.manager.loggerDict]:
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # where Dask does not start


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
