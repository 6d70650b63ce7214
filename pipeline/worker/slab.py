"""One slab: read with halo, super-resolve, encode, put, receipt. This is the product; the rest schedules it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.base.errors import DiskError, TargetError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.retry import retrying
from pipeline.base.waits import heartbeat
from pipeline.inference.tiles import SectionCaches, begin
from pipeline.plan.plan import Plan, PyramidBlock, Slab
from pipeline.plan.receipt import SKIPPED, WRITTEN, Receipt
from pipeline.plan.target_spec import FIDELITY
from pipeline.process.watchdog import holding
from pipeline.storage import requests
from pipeline.storage.targets.task_objects import checksum
from pipeline.storage.volume import Encoded, Uint8Array
from pipeline.worker.device_queue import DeviceQueue
from pipeline.worker.fidelity import back_projection_error
from pipeline.worker.mask import touches
from pipeline.worker.open_job import OpenJob
from pipeline.worker.pyramid import halve

T = TypeVar("T")

DEVICE = DeviceQueue()

ENCODE_LOCK = threading.Lock()
"""One slab encodes at a time, so that memory stays as promised. One thread encodes faster than a GPU computes
(docs/performance.md).
"""


def process_slab(opened: OpenJob, index: int, caches: SectionCaches | None = None) -> Receipt:
    """Read a slab with its halo, run the network, write whole shards. The receipt comes when every object is durable.

    `caches` are the encoded sections that the slab before in z left, and that this one leaves for the next.

    Raises DataError where the source's voxels cannot be had, TransientError after `retries` further tries, TargetError
    where the target takes nothing, TooLargeError where the device has no memory for a tile.
    """
    slab = opened.plan.slab(index)
    began = time.perf_counter()
    mask = opened.mask
    if mask is not None and not _retrying(opened, lambda: touches(mask, opened.source.info, slab.lr)):
        return Receipt(index, SKIPPED, seconds=time.perf_counter() - began)
    lr, sections = read_with_halo(opened, slab)
    owned = owned_voxels(opened.plan, slab, lr)
    if opened.job.source.skip_empty and owned.min() == owned.max():
        return Receipt(index, SKIPPED, seconds=time.perf_counter() - began)
    read = time.perf_counter()
    sr, network_s = DEVICE.compute(partial(begin, opened.network, lr, sections, slab, caches))
    computed = time.perf_counter()
    for z in opened.plan.sections_left_empty(slab):
        sr[z] = owned[z] = 0  # both, so that the fidelity volume claims nothing there
    with holding(ENCODE_LOCK):
        objects = encode_slab(opened, slab, owned, sr)
    voxels = sr.size
    del sr, lr, owned
    _put(opened, objects)
    done = time.perf_counter()
    parts = {"read_s": read - began, "network_s": network_s, "write_s": done - computed}
    return _written(index, objects, began, voxels=voxels, **parts)


def process_pyramid_block(opened: OpenJob, index: int) -> Receipt:
    """Whole shards of a level of the second pass, averaged from the level before, whose absent shards were skipped."""
    began = time.perf_counter()
    block = opened.plan.pyramid_block(index)
    coarser = _read_halved(opened, block)
    read = time.perf_counter()
    with holding(ENCODE_LOCK):
        objects = opened.target.encode(block.level, block.write, coarser)
    del coarser
    _put(opened, objects)
    return _written(index, objects, began, read_s=read - began, write_s=time.perf_counter() - read)


def read_with_halo(opened: OpenJob, slab: Slab) -> tuple[Uint8Array, list[int]]:
    """The slab's LR sections with their halo, (D + 2 z_halo, h, w) in z order, and the number of each.

    Sections beyond the volume's ends, and bad ones, are replaced as Plan.section says.
    """
    plan, halo = opened.plan, opened.plan.lattice.z_halo
    wanted = [plan.section(z) for z in range(slab.lr.start.z - halo, slab.lr.stop.z + halo)]
    low, high = min(wanted), max(wanted) + 1
    box = Box(ZYX(low, slab.read.start.y, slab.read.start.x), ZYX(high, slab.read.stop.y, slab.read.stop.x))
    voxels = _retrying(opened, lambda: opened.source.read(box))
    return (voxels if wanted == list(range(low, high)) else voxels[[z - low for z in wanted]]), wanted


def owned_voxels(plan: Plan, slab: Slab, lr: Uint8Array) -> Uint8Array:
    """The LR voxels that the slab owns, out of those that `read_with_halo` gave."""
    halo = plan.lattice.z_halo
    _, rows, cols = slab.lr.slices(slab.read.start)
    return lr[halo : len(lr) - halo, rows, cols]


def encode_slab(opened: OpenJob, slab: Slab, owned: Uint8Array, sr: Uint8Array) -> dict[str, Encoded]:
    """Every object that the slab stores: mip 0, levels in which it owns whole shards, its part of the fidelity
    volume.

    `owned` is (D, h, w), `sr` (D, rh, rw).
    """
    plan, target = opened.plan, opened.target
    objects = dict(target.encode(0, slab.write, sr))
    if plan.fidelity is not None:
        error = back_projection_error(owned, sr, plan.scale)
        objects |= target.encode(FIDELITY, plan.fidelity_box(slab), error)
    for level in range(1, plan.levels_by_slabs):
        heartbeat()
        sr = halve(sr)
        objects |= target.encode(level, plan.level_box(slab, level), sr)
    return objects


def _read_halved(opened: OpenJob, block: PyramidBlock) -> Uint8Array:
    """The block's averages. The finer level is four times as large; it is read in strips and never held whole."""
    absent = 0 if opened.mask is not None or opened.job.source.skip_empty else None
    coarser = np.empty(tuple(block.write.shape), np.uint8)

    def read(strip: Box) -> Uint8Array:
        return _retrying(opened, lambda: opened.target.read(block.level - 1, strip, absent))

    for strip in opened.plan.strips(block):
        coarser[strip.coarser(2).slices(block.write.start)] = halve(read(strip))
    return coarser


def _written(index: int, objects: Mapping[str, Encoded], began: float, **parts: Any) -> Receipt:
    size = sum(map(len, objects.values()))
    return Receipt(index, WRITTEN, checksum(objects), size, time.perf_counter() - began, **parts)


def _put(opened: OpenJob, objects: Mapping[str, Encoded]) -> None:
    try:
        _retrying(opened, lambda: opened.target.put(objects))
    except UserError as error:
        raise TargetError(error.saw, error.wanted, error.do) from None
    except DiskError as error:
        raise TargetError(str(error), "a disk that takes files", "Mend it, then run the same command again") from None


def _retrying(opened: OpenJob, call: Callable[[], T]) -> T:
    def once() -> T:
        heartbeat()
        return call()

    return retrying(once, opened.job.retries, requests.COUNTER.retry)
