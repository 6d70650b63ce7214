"""One slab: read, super-resolve, write, receipt. What a Dask worker runs."""

from __future__ import annotations

import itertools
import math
import os
import resource
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from pipeline import __version__
from pipeline.base.errors import ClusterError, DataError, EmsrError, TargetError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.retry import retrying
from pipeline.config.volume import SourceConfig
from pipeline.inference.network import DEVICE_LOCK, Network, NetworkSpec, Rings, back_projection_error, super_resolve
from pipeline.plan.plan import Plan, PyramidBlock, Slab
from pipeline.plan.price import NOTHING, Footprint
from pipeline.process import allocator, watchdog
from pipeline.storage import requests
from pipeline.storage.ledger import QUARANTINED, SKIPPED, WRITTEN, Entry
from pipeline.storage.requests import NO_LIMIT, NO_TROUBLES, Rates, Troubles
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.targets.open import open_target
from pipeline.storage.volume import FIDELITY, Source, Target, TargetSpec, Uint8Array
from pipeline.worker.pyramid import halve

T = TypeVar("T")

ENCODE_LOCK = threading.Lock()
"""One slab encodes at a time: the encoder already uses every core of the worker, and memory stays as promised."""


@dataclass(frozen=True)
class Job:
    """All that a worker must know, as plain values: no open file, no array. Pickles to a few kB."""

    digest: str
    source: SourceConfig
    source_fingerprint: str
    network: NetworkSpec
    plan: Plan
    target: TargetSpec
    retries: int
    stall_s: float
    emsr: str = __version__
    """The client's version: the worker's must be the same."""
    rates: Rates = NO_LIMIT
    run: str = ""
    """The run that wants it. A worker opens everything anew for another run: what was mended since is read again."""


@dataclass(frozen=True)
class Receipt(Entry):
    """A ledger entry with what the report wants to know: seconds by part and the SR voxels made."""

    read_s: float = 0.0
    network_s: float = 0.0
    write_s: float = 0.0
    voxels: int = 0


@dataclass(frozen=True)
class LeaseResult:
    receipts: tuple[Receipt, ...]
    peak_bytes: int
    """Largest resident size of the worker's process so far."""
    base_bytes: int
    """Its resident size when the job was open and no slab had been read."""
    network: Footprint = NOTHING
    """What the network holds of the process's memory."""
    troubles: Troubles = NO_TROUBLES
    """Of its process since the last lease that ended there."""


@dataclass(frozen=True)
class Sample:
    """What one slab cost: seconds by part, stored over raw bytes by level, resident bytes before it, what the network holds of the
    process's memory, and the bytes of its weights where a GPU has them.
    """

    read_s: float
    network_s: float
    write_s: float
    stored_share: dict[int, float]
    base_bytes: int
    network: Footprint
    gpu_weights: int | None


@dataclass
class OpenJob:
    """A job with its volumes and network open, once per process."""

    job: Job
    source: Source
    target: Target
    mask: Source | None
    network: Network
    base_bytes: int = field(default=0)

    @property
    def plan(self) -> Plan:
        return self.job.plan


def process_slab(job: OpenJob, index: int, rings: Rings | None = None) -> Receipt:
    """Read a halo-padded slab, run the network, write whole shards. Receipt first when every object is durable.

    `rings` are the encoded sections that the slab before in z left, and that this one leaves.
    """
    slab = job.plan.slab(index)
    began = time.perf_counter()
    mask = job.mask
    if mask is not None and not _retrying(job, lambda: mask.read(_mask_box(job, slab))).any():
        return Receipt(index, SKIPPED, seconds=time.perf_counter() - began)
    lr, sections = read_padded(job, slab)
    owned = _owned(job.plan, slab, lr)
    if job.job.source.skip_empty and owned.min() == owned.max():
        return Receipt(index, SKIPPED, seconds=time.perf_counter() - began)
    read = time.perf_counter()
    with watchdog.turn(DEVICE_LOCK):
        locked = time.perf_counter()
        sr = super_resolve(job.network, lr, sections, job.plan, slab, rings)
        computed = time.perf_counter()
    for z in job.plan.empty_sections(slab):
        sr[z] = owned[z] = 0  # both, so that the fidelity volume claims nothing there
    with watchdog.turn(ENCODE_LOCK):
        objects = encode_slab(job, slab, owned, sr)
    voxels = sr.size
    del sr, lr, owned
    _put(job, objects)
    done = time.perf_counter()
    return _receipt(
        index, objects, began, read_s=read - began, network_s=computed - locked, write_s=done - computed, voxels=voxels
    )


def process_pyramid_block(job: OpenJob, index: int) -> Receipt:
    """Whole shards of a second-pass level, averaged from the level before. Absent shards there are slabs that were skipped."""
    began = time.perf_counter()
    block = job.plan.pyramid_block(index)
    coarser = _read_halved(job, block)
    read = time.perf_counter()
    with watchdog.turn(ENCODE_LOCK):
        objects = job.target.encode(block.level, block.write, coarser)
    del coarser
    _put(job, objects)
    return _receipt(index, objects, began, read_s=read - began, write_s=time.perf_counter() - read)


def process_lease(job: Job, start: int, stop: int, most_s: float = math.inf) -> LeaseResult:
    """Tasks start .. stop-1, one after another. A task that fails for good is a quarantined receipt, never an exception.

    A task that stalls is one too; then this process ends soon. After `most_s` seconds no further task is begun. In both cases there
    are fewer receipts, of the first tasks.

    Raises UserError where this worker cannot open the job at all (a path it does not see, weights it lacks, too little memory) or may
    not write the target (a full disk, no permission): that is no slab's fault, and no slab would fare better.
    """
    requests.limit(job.rates)
    opened = open_job(job)
    end = time.monotonic() + most_s
    rings: Rings | None = {} if job.plan.lattice.window > 1 else None
    receipts: list[Receipt] = []
    here = f"{socket.gethostname()}:{os.getpid()}"

    def tasks() -> None:
        for index in range(start, stop):
            if receipts and time.monotonic() >= end:
                break
            receipts.append(replace(_attempt(opened, index, rings), worker=here))
            allocator.give_back()

    stuck_at = watchdog.watch(tasks, job.stall_s)
    ended = tuple(receipts)
    if stuck_at:
        why = f"no progress for {job.stall_s:.0f} s (work.stall_s), given up\n\n{stuck_at}"
        ended += (Receipt(start + len(ended), QUARANTINED, error=why, seconds=job.stall_s, worker=here),)
        watchdog.leave()
    return LeaseResult(ended, _peak_bytes(), opened.base_bytes, opened.network.resident, requests.RECORD.take())


def rehearse(job: Job) -> int:
    """Open the job as every worker will, before anything is written. UserError where this worker cannot; else its resident bytes."""
    return open_job(job).base_bytes


def read_padded(job: OpenJob, slab: Slab) -> tuple[Uint8Array, list[int]]:
    """The slab's sections with z-halo, in order, and their numbers; plan.section replaces those beyond the ends and bad ones."""
    plan, halo = job.plan, job.plan.lattice.z_halo
    wanted = [plan.section(z) for z in range(slab.lr.start.z - halo, slab.lr.stop.z + halo)]
    low, high = min(wanted), max(wanted) + 1
    box = Box(ZYX(low, slab.read.start.y, slab.read.start.x), ZYX(high, slab.read.stop.y, slab.read.stop.x))
    voxels = _retrying(job, lambda: job.source.read(box))
    return (voxels if wanted == list(range(low, high)) else voxels[[z - low for z in wanted]]), wanted


def encode_slab(job: OpenJob, slab: Slab, owned: Uint8Array, sr: Uint8Array) -> dict[str, bytes]:
    """Every stored object of this slab: mip 0, the levels it fills with whole shards, and its part of the fidelity volume."""
    plan, target = job.plan, job.target
    objects = target.encode(0, slab.write, sr)
    if plan.fidelity is not None:
        objects |= target.encode(FIDELITY, plan.fidelity_box(slab), back_projection_error(owned, sr, plan.scale))
    for level in range(1, plan.in_memory):
        watchdog.beat()
        sr = halve(sr)
        objects |= target.encode(level, plan.level_box(slab, level), sr)
    return objects


def object_keys(target: Target, plan: Plan, index: int) -> list[str]:
    """The keys that task `index` writes, sorted: what `verify` reads again."""
    if index >= plan.slabs:
        block = plan.pyramid_block(index)
        return target.keys(block.level, block.write)
    slab = plan.slab(index)
    keys = [key for level in range(plan.in_memory) for key in target.keys(level, plan.level_box(slab, level))]
    return sorted(keys + (target.keys(FIDELITY, plan.fidelity_box(slab)) if plan.fidelity is not None else []))


def checksum(objects: dict[str, bytes]) -> int:
    """CRC-32 over keys and bytes in key order."""
    crc = 0
    for key in sorted(objects):
        crc = zlib.crc32(objects[key], zlib.crc32(key.encode(), crc))
    return crc


def try_slab(job: Job) -> Sample:
    """The slab in the middle of the region, read, computed and encoded but not written: what `--dry-run` measures."""
    opened = open_job(job)
    plan = job.plan
    slab = plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2))
    with DEVICE_LOCK:  # once unmeasured: the first call builds caches
        super_resolve(opened.network, *read_padded(opened, slab), plan, slab)
    marks = [time.perf_counter()]
    lr, sections = read_padded(opened, slab)
    marks.append(time.perf_counter())
    sr = super_resolve(opened.network, lr, sections, plan, slab)
    marks.append(time.perf_counter())
    objects = encode_slab(opened, slab, _owned(plan, slab, lr), sr)
    marks.append(time.perf_counter())
    share = {}
    for level in [*range(plan.in_memory), *([FIDELITY] if plan.fidelity is not None else [])]:
        box = plan.fidelity_box(slab) if level == FIDELITY else plan.level_box(slab, level)
        share[level] = sum(len(objects[key]) for key in opened.target.keys(level, box)) / box.size
    read_s, network_s, write_s = (b - a for a, b in itertools.pairwise(marks))
    gpu_weights = opened.network.weight_bytes if opened.network.device.type == "cuda" else None
    return Sample(read_s, network_s, write_s, share, opened.base_bytes, opened.network.resident, gpu_weights)


def _owned(plan: Plan, slab: Slab, lr: Uint8Array) -> Uint8Array:
    """The LR voxels that the slab owns, without halo."""
    halo = plan.lattice.z_halo
    _, rows, cols = slab.lr.slices(slab.read.start)
    return lr[halo : len(lr) - halo, rows, cols]


def _read_halved(job: OpenJob, block: PyramidBlock) -> Uint8Array:
    """The block's averages, from strips of the finer level: that is four times as large and never held whole."""
    skips = job.mask is not None or job.job.source.skip_empty
    coarser = np.empty(tuple(block.write.shape), np.uint8)
    for strip in job.plan.strips(block):
        finer = _retrying(job, lambda strip=strip: job.target.read(block.level - 1, strip, absent=0 if skips else None))  # type: ignore[misc]
        coarser[strip.coarser(2).slices(block.write.start)] = halve(finer)
    return coarser


def _mask_box(job: OpenJob, slab: Slab) -> Box:
    """The mask's voxels that touch the slab: both are volumes over the same space, the mask perhaps coarser."""
    assert job.mask is not None
    fine, coarse = job.source.info, job.mask.info
    start, stop = [], []
    for axis in range(3):
        lo = fine.corner_nm[axis] + list(slab.lr.start)[axis] * fine.voxel_size_nm[axis]
        hi = fine.corner_nm[axis] + list(slab.lr.stop)[axis] * fine.voxel_size_nm[axis]
        size = coarse.voxel_size_nm[axis]
        start.append(int(np.floor((lo - coarse.corner_nm[axis]) / size + 1e-6)))
        stop.append(int(np.ceil((hi - coarse.corner_nm[axis]) / size - 1e-6)))
    return Box.of(start, stop).intersect(coarse.bounds)


def _receipt(index: int, objects: dict[str, bytes], began: float, **parts: Any) -> Receipt:
    size = sum(map(len, objects.values()))
    return Receipt(index, WRITTEN, checksum(objects), size, time.perf_counter() - began, **parts)


def _put(job: OpenJob, objects: dict[str, bytes]) -> None:
    try:
        _retrying(job, lambda: job.target.put(objects))
    except UserError as error:
        raise TargetError(error.saw, error.wanted, error.do) from None


def _retrying(job: OpenJob, call: Callable[[], T]) -> T:
    def once() -> T:
        watchdog.beat()
        return call()

    return retrying(once, job.job.retries, requests.RECORD.retry)


def _attempt(job: OpenJob, index: int, rings: Rings | None = None) -> Receipt:
    """The task's receipt, whatever happens: bad data at once, anything unforeseen after `retries` more tries."""
    began = time.perf_counter()
    for left in range(job.job.retries, -1, -1):
        watchdog.beat()
        try:
            return process_slab(job, index, rings) if index < job.plan.slabs else process_pyramid_block(job, index)
        except TargetError:
            raise
        except (DataError, TransientError, UserError) as error:
            return Receipt(index, QUARANTINED, error=_why(error), seconds=time.perf_counter() - began)
        except Exception as error:
            if not left:
                return Receipt(index, QUARANTINED, error=_why(error), seconds=time.perf_counter() - began)
    raise AssertionError("unreachable")


def _why(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}\n\n" + "".join(traceback.format_exception(error))


_open: OpenJob | None = None
_open_lock = threading.Lock()


def open_job(job: Job) -> OpenJob:
    """The job with everything open. It is kept for the life of the process, for the last job only.

    A job is the same where everything in it is, but for the share of requests that this worker may make, which changes
    with the number of workers. Its digest alone would not do: it holds neither the target's URL nor how often to retry.
    """
    global _open
    if job.emsr != __version__:
        raise ClusterError(
            f"the client has emsr {job.emsr}, a worker has {__version__}",
            "the same version in every process",
            "Install it there",
        )
    job = replace(job, rates=NO_LIMIT)
    with _open_lock:
        if _open is None or _open.job != job:
            _open = None  # the memory of the last one, before this one takes more
            allocator.settle()
            source = open_source(job.source)
            if source.info.fingerprint != job.source_fingerprint:
                raise EmsrError(
                    f"the metadata of {source.info.url} changed while the run was going on; "
                    "stop writing to the source and run again"
                )
            mask = open_mask(job.source.mask, source.info) if job.source.mask is not None else None
            opened = OpenJob(job, source, open_target(job.target), mask, Network(job.network))
            opened.network.refuse_too_large(job.plan)
            opened.base_bytes = _rss_bytes()
            _open = opened
        return _open


def _rss_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak_bytes() -> int:
    """Largest resident size so far. Not ru_maxrss where /proc tells: a child inherits that from the process that started it."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
