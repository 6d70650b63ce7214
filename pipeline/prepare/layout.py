"""Chunk, shard, slab and pyramid shapes: the user's where given, defaults with a reason where not. Arithmetic only.

Defaults follow measurements (docs/performance.md): chunks of 512 KiB, shards of at most 8 x 4096 x 4096 (128 MiB), one
slab a shard. Shapes of levels follow from chunk and shard, not from the slab: with both given, the target's tree is the
same for every slab shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from pipeline.base.errors import TargetError
from pipeline.base.geometry import ZYX
from pipeline.config.volume import TargetConfig
from pipeline.plan.plan import BLOCK_SIDE
from pipeline.plan.target_spec import LevelSpec
from pipeline.storage.precomputed_morton import shard_shapes

CHUNK = ZYX(8, 256, 256)
SHARD_SIDE = 4096


@dataclass(frozen=True)
class Layout:
    slab_shape: ZYX
    levels: tuple[LevelSpec, ...]
    fidelity: LevelSpec | None


def choose(region: ZYX, scale: int, target: TargetConfig, slab_shape: ZYX | None) -> Layout:
    """Shapes for a region of `region` LR voxels. Raises TargetError for shapes that contradict each other."""
    chunk, shard, slab = _shapes(region.lateral(scale), scale, target, slab_shape)
    _check(chunk, shard, slab, scale)
    shape = region.lateral(scale)
    levels = tuple(_level(shape, chunk, shard, k, target) for k in range(_count(shape, chunk, target)))
    fidelity = None
    if target.fidelity:
        piece = ZYX(shard.z, shard.y // scale, shard.x // scale)
        fidelity = LevelSpec(region, piece, piece)
    return Layout(slab, levels, fidelity)


def _shapes(extent: ZYX, scale: int, target: TargetConfig, slab: ZYX | None) -> tuple[ZYX, ZYX, ZYX]:
    """(chunk, shard, slab); chunk and shard in SR voxels, slab in LR voxels."""
    chunk, shard = target.chunk_shape, target.shard_shape
    own = slab.lateral(scale) if slab else None
    if shard is None and target.format == "precomputed":
        # Unsharded: Neuroglancer's viewers expect it, and sharded precomputed fixes shard shapes by Morton order.
        basis = own or ZYX(CHUNK.z, SHARD_SIDE, SHARD_SIDE)
        shard = chunk or _divisors(basis, CHUNK, ZYX(1, scale, scale))
    if shard is None:
        if own is not None:
            step = _lcm(chunk or ZYX(1, 1, 1), scale)
            shard = _divisors(own, ZYX(chunk.z if chunk else CHUNK.z, SHARD_SIDE, SHARD_SIDE), step)
        else:
            base = chunk or ZYX(min(CHUNK.z, extent.z), CHUNK.y, CHUNK.x)
            step = _lcm(base, scale)
            chunk, shard = base, _up_to(ZYX(base.z, SHARD_SIDE, SHARD_SIDE), step, extent)
    if chunk is None:
        chunk = (
            shard
            if target.shard_shape is None and target.format == "precomputed"
            else _divisors(shard, CHUNK, ZYX(1, 1, 1))
        )
    if slab is None:
        group = _up_to(ZYX(shard.z, SHARD_SIDE, SHARD_SIDE), _lcm(shard, scale), extent)
        slab = ZYX(group.z, group.y // scale, group.x // scale)
    return chunk, shard, slab


def _check(chunk: ZYX, shard: ZYX, slab: ZYX, scale: int) -> None:
    for axis in ("z", "y", "x"):
        c, s, b = getattr(chunk, axis), getattr(shard, axis), getattr(slab, axis)
        factor = 1 if axis == "z" else scale
        if s % c:
            raise TargetError(
                f"target.shard_shape {axis} = {s} is no multiple of target.chunk_shape {axis} = {c}",
                "shards hold whole chunks",
                f"Use {max(c, s // c * c)} or {(s // c + 1) * c}",
            )
        if s % factor:
            raise TargetError(
                f"target.shard_shape {axis} = {s} is no multiple of the scale {scale}",
                "shards hold whole LR voxels",
                f"Use {(s // scale + 1) * scale}",
            )
        if b * factor % s:
            step = s // factor
            low = max(step, b // step * step)
            raise TargetError(
                f"work.slab_shape {axis} = {b} gives {b * factor} SR voxels per slab, but the shard's {axis} is {s}",
                "slabs hold whole shards",
                f"Use a slab_shape {axis} of {low} or {low + step}",
            )


def _count(shape: ZYX, chunk: ZYX, target: TargetConfig) -> int:
    """Levels in all, mip 0 included: `auto` goes on until a section fits two chunks across."""
    most = max(shape.y, shape.x).bit_length()
    if target.mips == "auto":
        count = 1
        while max(shape.y, shape.x) > 2 ** (count - 1) * 2 * max(chunk.y, chunk.x) and count < most:
            count += 1
        return count
    if target.mips > most:
        raise TargetError(
            f"target.mips {target.mips} halves a section of {shape.y} x {shape.x} SR voxels below one voxel",
            f"at most {most}",
            "Lower target.mips or use auto",
        )
    return target.mips


def _level(shape: ZYX, chunk: ZYX, shard: ZYX, k: int, target: TargetConfig) -> LevelSpec:
    size = ZYX(shape.z, -(-shape.y // 2**k), -(-shape.x // 2**k))
    part = ZYX(shard.z, shard.y // 2**k, shard.x // 2**k)
    whole = shard.y % 2**k == shard.x % 2**k == 0 and part.y % chunk.y == part.x % chunk.x == 0
    if target.format == "precomputed":
        if target.shard_shape is None:
            return LevelSpec(size, chunk, chunk)
        return LevelSpec(size, chunk, _morton(size, chunk, shard, part if whole else None, k))
    return LevelSpec(
        size, chunk, part if whole else _up_to(shard.minimum(ZYX(shard.z, BLOCK_SIDE, BLOCK_SIDE)), chunk, size)
    )


def _morton(size: ZYX, chunk: ZYX, shard: ZYX, part: ZYX | None, k: int) -> ZYX:
    """The shard of a level among the shapes that precomputed's compressed Morton order allows for its grid."""
    allowed = [shape * chunk for shape in shard_shapes(size.ceil_div(chunk))]
    if k == 0:
        if shard not in allowed:
            raise TargetError(
                f"target.shard_shape {shard} is no shape that sharded precomputed can hold here",
                "one of " + ", ".join(map(str, allowed)),
                "Choose one of them, or remove shard_shape for an unsharded target",
            )
        return shard
    limit = part or shard.minimum(ZYX(shard.z, BLOCK_SIDE, BLOCK_SIDE))
    fitting = [a for a in allowed if limit.z % a.z == limit.y % a.y == limit.x % a.x == 0]
    return fitting[-1]


def _divisors(of: ZYX, at_most: ZYX, step: ZYX) -> ZYX:
    """Per axis the largest divisor not above `at_most` that is a multiple of `step` (the whole where there is none)."""
    return ZYX.of([_divisor(n, m, s) for n, m, s in zip(of, at_most, step, strict=True)])


def _divisor(n: int, at_most: int, step: int) -> int:
    fitting = [d for d in range(step, min(n, at_most) + 1, step) if n % d == 0]
    return fitting[-1] if fitting else n


def _up_to(limit: ZYX, step: ZYX, extent: ZYX) -> ZYX:
    """Per axis the largest multiple of `step` within `limit`, but no more than covers `extent`; at least one step."""
    return ZYX.of([max(1, min(m // s, -(-e // s))) * s for m, s, e in zip(limit, step, extent, strict=True)])


def _lcm(shape: ZYX, scale: int) -> ZYX:
    return ZYX(shape.z, lcm(shape.y, scale), lcm(shape.x, scale))
