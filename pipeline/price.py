"""What a plan costs, by formula alone: voxels read with halo, bytes of memory, voxels written."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.geometry import ZYX
from pipeline.plan import Plan, Slab


@dataclass(frozen=True)
class Input:
    """Source voxels in all: owned, requested with halo, decoded because chunks are read whole (without a cache's help)."""

    owned: int
    requested: int
    decoded: int


def input_voxels(plan: Plan, chunk: ZYX) -> Input:
    """Sums over all slabs; boxes are products of axes, so each sum is a product of three short ones."""
    owned = requested = decoded = 1
    for axis in ("z", "y", "x"):
        origin, size = getattr(plan.bounds.start, axis), getattr(chunk, axis)
        spans = [(getattr(s.read.start, axis), getattr(s.read.stop, axis)) for s in _along(plan, axis)]
        owned *= getattr(plan.region.shape, axis)
        requested *= sum(stop - start for start, stop in spans)
        decoded *= sum((-(-(stop - origin) // size) - (start - origin) // size) * size for start, stop in spans)
    return Input(owned, requested, decoded)


def _along(plan: Plan, axis: str) -> list[Slab]:
    """One slab per step along `axis`, at the region's start on the others."""
    count, step = getattr(plan.grid, axis), getattr(plan.slab_shape, axis)
    shift = {"z": ZYX(step, 0, 0), "y": ZYX(0, step, 0), "x": ZYX(0, 0, step)}[axis]
    return [plan.slab(plan.slab_at(plan.region.start + shift * i)) for i in range(count)]


def memory_bytes(plan: Plan, in_flight: int, base: int) -> int:
    """Peak resident bytes promised for one worker: `base` (the process with its network) and the slabs in flight.

    One slab computes (its LR voxels and its SR voxels), one encodes (its SR voxels, the level being encoded staged in the
    store's buffers, and the encoded objects of all levels), any others hold encoded objects or LR voxels.
    """
    slab = plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2))
    sr, lr = slab.write.size, slab.read.shape.product
    encoded = int(sr * ENCODED_SHARE)
    computing = lr + sr
    encoding = sr + sr + encoded + slab.lr.size
    waiting = max(0, in_flight - 2) * (encoded + lr)
    return base + (computing + encoding + waiting if in_flight > 1 else max(computing, encoding))


ENCODED_SHARE = 0.7
"""Encoded over raw bytes assumed in the memory promise (lossless EM: 0.6 to 0.8)."""


def output_voxels(plan: Plan) -> int:
    """Voxels (= bytes before compression) of all levels and the fidelity volume."""
    sizes: list[ZYX] = [level.shape for level in plan.levels] + ([plan.fidelity.shape] if plan.fidelity else [])
    return sum(size.product for size in sizes)
