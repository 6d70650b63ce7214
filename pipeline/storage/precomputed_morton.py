"""Compressed Morton codes, which number the chunks of a sharded precomputed volume; shapes and file names of its
shards.

The code takes the bits of the chunk's x, y and z in turn, lowest first, and leaves an axis out once the grid needs no
more bits of it (https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/sharded.md). A shard
holds 2^p consecutive numbers, hence always a box, and only certain shapes exist:

    a grid of 4 x 2 chunks (x, y): number = bits x1 y0 x0
        | 0  1 | 4  5 |
        | 2  3 | 6  7 |                   p = 2: shard 0 = {0..3}, shard 1 = {4..7}, each 2 x 2 chunks
"""

from __future__ import annotations

import math

from pipeline.base.geometry import ZYX

MAX_PRESHIFT_BITS = 9
"""The most chunks in a minishard, as a power of two. A reader fetches a whole minishard index, 24 bytes per chunk."""


def _axes(grid: ZYX) -> list[int]:
    """The axis (0 z, 1 y, 2 x) from which each bit of the chunk number comes, lowest bit first."""
    needed = [(n - 1).bit_length() for n in grid]
    return [axis for bit in range(max(needed)) for axis in (2, 1, 0) if bit < needed[axis]]


def shard_shapes(grid: ZYX) -> tuple[ZYX, ...]:
    """Shapes in chunks that a shard can have in a grid of that many chunks: entry p holds 2^p chunks.

    Shards lie on multiples of their own shape; at the grid's end they are clipped. The last entry holds the whole grid.
    """
    if min(grid) < 1:
        raise ValueError(f"a grid of {grid} chunks is empty")
    shape = [1, 1, 1]
    shapes = [ZYX(1, 1, 1)]
    for axis in _axes(grid):
        shape[axis] *= 2
        shapes.append(ZYX.of(shape))
    return tuple(shapes)


def nearest_shape(grid: ZYX, wanted: ZYX) -> ZYX:
    """The possible shard shape (in chunks) whose edges are nearest to `wanted` in ratio."""
    return min(
        shard_shapes(grid), key=lambda shape: sum(abs(math.log2(a / b)) for a, b in zip(shape, wanted, strict=True))
    )


def bits_for(grid: ZYX, shard_in_chunks: ZYX) -> tuple[int, int, int]:
    """(preshift_bits, minishard_bits, shard_bits) of shards of this shape.

    Raises ValueError where the grid has no such shards.
    """
    shapes = shard_shapes(grid)
    if shard_in_chunks not in shapes:
        raise ValueError(f"no shard of {shard_in_chunks} chunks exists in a grid of {grid}")
    inside = shapes.index(shard_in_chunks)
    preshift = min(inside, MAX_PRESHIFT_BITS)
    return preshift, inside - preshift, len(shapes) - 1 - inside


def chunk_number(grid: ZYX, chunk: ZYX) -> int:
    """The compressed Morton code of the chunk at this position (z, y, x) of the grid. Raises ValueError outside the
    grid.
    """
    if not all(0 <= c < n for c, n in zip(chunk, grid, strict=True)):
        raise ValueError(f"chunk {chunk} is outside a grid of {grid}")
    rest, number = list(chunk), 0
    for bit, axis in enumerate(_axes(grid)):
        number |= (rest[axis] & 1) << bit
        rest[axis] >>= 1
    return number


def chunk_at(grid: ZYX, number: int) -> ZYX:
    """The position (z, y, x) of the chunk of this number, which may lie outside the grid: the reverse of the above."""
    position = [0, 0, 0]
    seen = [0, 0, 0]
    for bit, axis in enumerate(_axes(grid)):
        position[axis] |= (number >> bit & 1) << seen[axis]
        seen[axis] += 1
    return ZYX.of(position)


def first_chunk(grid: ZYX, shard_in_chunks: ZYX, shard: int) -> ZYX:
    """The position of the first chunk of the shard of this number, which may lie outside the grid."""
    preshift, minishard, _ = bits_for(grid, shard_in_chunks)
    return chunk_at(grid, shard << (preshift + minishard))


def shard_name(grid: ZYX, shard_in_chunks: ZYX, chunk: ZYX) -> str:
    """The file name of the shard that holds this chunk: its number in as many hexadecimal digits as shard_bits need."""
    preshift, minishard, shard = bits_for(grid, shard_in_chunks)
    number = chunk_number(grid, chunk) >> (preshift + minishard)
    return f"{number:0{-(-shard // 4)}x}.shard"
