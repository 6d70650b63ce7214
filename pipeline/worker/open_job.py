"""A job with its volumes and its network open, once in a process."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from pipeline.base.errors import EmsrError
from pipeline.config import access
from pipeline.inference.network import Network
from pipeline.plan.plan import Plan
from pipeline.plan.requests import RequestRates
from pipeline.process import allocator, descriptors
from pipeline.process.device import load_libraries
from pipeline.process.resident_size import resident_bytes
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.targets.open import open_target
from pipeline.storage.volume import Source, Target
from pipeline.worker.check import refuse_other_emsr, refuse_other_precision
from pipeline.worker.job import Job


@dataclass(frozen=True)
class OpenJob:
    """`base_bytes` is the process's resident size with the job open, before the first slab."""

    job: Job
    source: Source
    target: Target
    mask: Source | None
    network: Network
    base_bytes: int

    @property
    def plan(self) -> Plan:
        return self.job.plan


_open: OpenJob | None = None
_open_lock = threading.Lock()


def open_job(job: Job) -> OpenJob:
    """The job with everything open. It is kept for the life of the process, for the last job only.

    A job is the same where everything in it is, but for the share of requests that this worker may make, which changes
    with the number of workers, and what other workers compute with. Its digest alone would not do: it holds neither the
    target's URL nor how often to retry.

    Raises ClusterError where this process has another emsr, computes with something else or lacks the plan's precision,
    EmsrError where the metadata of source or mask are not those that the client read, and UserError where the source,
    mask or network cannot be opened or the network is too large.
    """
    global _open
    refuse_other_emsr(job)
    job = replace(job, rates=RequestRates(), runtimes=())
    with _open_lock:
        if _open is None or _open.job != job:
            _open = None  # the last one's memory is free before this one takes its own
            _open = _opened(job)
        return _open


def _opened(job: Job) -> OpenJob:
    refuse_other_precision(job.network)
    descriptors.raise_limit()
    allocator.configure_malloc()
    access.use(job.target.url, job.access)
    source = open_source(job.source)
    if source.info.fingerprint != job.source_fingerprint:
        raise EmsrError(
            f"the metadata of {source.info.url} are not those that the client read: they changed while the run was "
            "going on, or another volume lies there; stop writing to the source and run again"
        )
    mask = open_mask(job.source.mask, source.info) if job.source.mask is not None else None
    if mask is not None and mask.info != job.mask:
        raise EmsrError(
            f"the metadata of the mask {mask.info.url} changed while the run was going on; "
            "stop writing to it and run again"
        )
    target, network = open_target(job.target), Network(job.network)
    load_libraries(network.device)  # before the process is measured: the promised memory counts them
    network.refuse_too_large(job.plan)
    return OpenJob(job, source, target, mask, network, resident_bytes())
