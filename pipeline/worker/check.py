"""What a worker finds out about itself before it gets a lease, and what it computes with."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import PackageNotFoundError, version

from distributed import get_worker

from pipeline import __version__
from pipeline.base.errors import ClusterError, SourceError, TargetError, UserError
from pipeline.config import urls
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process import device
from pipeline.process.installed import sources_digest
from pipeline.storage import same_place
from pipeline.storage.kv import Store
from pipeline.storage.volume import Source
from pipeline.worker.job import Job, Question, Runtime

_LIBRARIES = ("torchvision", "numpy", "tensorstore")
"""Beside torch they make the bytes of a target: the network's operators, its arrays, the encoder."""
_ENCODERS = {"jxl": ("imagecodecs",)}
"""Those that encode besides. Only their own targets name them: a runtime is compared with those of earlier runs."""


@functools.cache
def runtime(encoding: str) -> Runtime:
    """What this process computes a target of this encoding with."""
    found = [f"torch {device.torch_version()}"]
    for name in (*_LIBRARIES, *_ENCODERS.get(encoding, ())):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return Runtime(", ".join(found), device.describe(device.pick()))


def device_facts() -> device.Facts:
    """The facts of this process's device."""
    return device.facts(device.pick())


def may_freeze() -> bool:
    """Whether Dask's profiler may stop this process for good, with all of its threads: cpython #106883.

    Before Python 3.12 what the profiler allocates may start a garbage collection, and one that ends a `threading.local`
    waits for the lock that the profiler holds.
    """
    return sys.version_info < (3, 12) and "profile" in get_worker().periodic_callbacks


def refuse_other_emsr(job: Job) -> None:
    """Raises ClusterError where this process is not what the job was made for: version, sources, libraries, device."""
    if job.emsr != __version__:
        raise ClusterError(
            f"it has emsr {__version__}, the client has emsr {job.emsr}",
            "the same version in every process",
            "Install it there",
        )
    if job.sources and job.sources != sources_digest():
        raise ClusterError(
            f"its emsr {__version__} has other sources (digest {sources_digest()[:12]}) "
            f"than the client's (digest {job.sources[:12]})",
            "the same commit in every process",
            "Install it there, and restart the worker",
        )
    if job.runtimes and runtime(job.target.encoding) not in job.runtimes:
        raise ClusterError(
            f"it computes with {runtime(job.target.encoding)}, this run with {' or '.join(map(str, job.runtimes))}",
            "the same libraries and kind of device in every worker",
            "Leave it out, or set cluster.mixed: true",
        )


def refuse_other_precision(network: NetworkSpec) -> None:
    """Raises ClusterError where this process's device does not compute in the plan's precision."""
    here = device_facts()
    if network.precision not in here.precisions:
        raise ClusterError(
            f"network.precision of this target is {network.precision}, and the device here is {here.kind}, "
            f"which computes in {', '.join(here.precisions)}",
            f"a GPU that computes in {network.precision}",
            "Leave this worker out, or choose one of its precisions for another target",
        )


def refuse_other_place(job: Job, question: Question, source: Source) -> None:
    """Raises SourceError or TargetError where source or sidecar are not what the client sees. Leaves a reply there."""
    sample = question.sample
    if sample is not None and same_place.voxels_checksum(source, sample.box) != sample.checksum:
        raise SourceError(
            f"{source.info.url} holds other voxels here than the client reads, in {sample.box}",
            "one source for client and workers",
            "Check what is mounted there",
        )
    store = Store(urls.sidecar(job.target.url))
    if not same_place.is_seen(store, question.token, job.run):
        raise TargetError(
            f"{store.url} is not the client's: what the client has just written is not there",
            "a target that client and workers see in one place",
            "Mount the target's disk there, or take a target.url that all of them see",
        )
    try:
        store.put(question.reply, job.run.encode())
    except UserError as error:
        raise TargetError(error.saw, error.wanted, error.do) from None
