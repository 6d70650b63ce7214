"""Task number <-> boxes by formula. Nothing here opens a file or holds a list of slabs.

One column of slabs along z (the order in which numbers run, so that a lease of consecutive numbers shares its z-halo):

    z ->   |hh|----slab 0----|hh|
                          |hh|----slab 1----|hh|         h: halo, read only; the write boxes touch and never overlap
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

from pipeline.base.geometry import ZYX, Box, tiles

BLOCK_SIDE = 2048
"""Rows and columns of a second-pass block, about."""
STRIP_ROWS = 512
"""Rows of the finer level that a block reads at a time, about."""


@dataclass(frozen=True)
class Lattice:
    """The fixed grid of network inputs: laterally `cell` + `halo` on each side, anchored at global voxel (0, 0) of the
    source's grid, and `window` sections in z. All LR voxels. Part of the model's definition: it changes the bytes.
    """

    cell: int
    halo: int
    window: int
    padding: str
    """`mirror` (about the volume's face) or `edge`: what lateral voxels are invented where a tile leaves the volume."""

    @property
    def z_halo(self) -> int:
        return self.window // 2

    @property
    def tile(self) -> int:
        return self.cell + 2 * self.halo

    def padded(self, box: Box) -> Box:
        """All voxels that the tiles owning `box` see, padding included (it may leave the volume)."""
        cells = ZYX(1, self.cell, self.cell)
        start, stop = (box.start // cells) * cells, box.stop.ceil_div(cells) * cells
        return Box(start, stop).grow(ZYX(self.z_halo, self.halo, self.halo))

    def cells(self, box: Box) -> Iterator[Box]:
        """The parts of `box` by owning cell, in y, x order; each keeps the whole z range of `box`."""
        first = Box(ZYX(0, box.start.y, box.start.x), ZYX(1, box.stop.y, box.stop.x))
        for cell in tiles(first, ZYX(1, self.cell, self.cell)):
            yield Box(ZYX(box.start.z, cell.start.y, cell.start.x), ZYX(box.stop.z, cell.stop.y, cell.stop.x))


@dataclass(frozen=True)
class LevelSpec:
    """One stored array: shape, chunk and shard in voxels (shard == chunk: not sharded). Coordinates start at (0, 0, 0)."""

    shape: ZYX
    chunk: ZYX
    shard: ZYX


@dataclass(frozen=True)
class Slab:
    """One unit of work. `lr` are the source voxels it owns (volume coordinates), `read` what it needs of the real volume,
    `write` its SR voxels in the target's mip 0 array (which starts at the region's corner).
    """

    index: int
    lr: Box
    read: Box
    write: Box


@dataclass(frozen=True)
class PyramidBlock:
    """Whole shards of a level that is averaged in the second pass: `write` at `level` from `read` at `level` - 1."""

    index: int
    level: int
    write: Box
    read: Box


@dataclass(frozen=True)
class Plan:
    """Numbers 0 .. slabs-1 are slabs, the rest are blocks of the levels that slabs do not write.

    `lossy`: the encoding changes voxels. Then every level is averaged from the stored one before it, not from the slab in
    memory: how far a slab's own memory reaches must not show (law 1). `leave_empty`: a bad section's own output is 0.
    """

    bounds: Box
    region: Box
    slab_shape: ZYX
    scale: int
    lattice: Lattice
    levels: tuple[LevelSpec, ...]
    fidelity: LevelSpec | None
    bad_sections: tuple[int, ...] = ()
    lossy: bool = False
    leave_empty: bool = False

    @property
    def grid(self) -> ZYX:
        """Slabs along each axis."""
        return self.region.shape.ceil_div(self.slab_shape)

    @property
    def slabs(self) -> int:
        return self.grid.product

    @property
    def in_memory(self) -> int:
        """How many levels a slab writes itself: those in which its voxels are whole shards."""
        count = 0
        for k, level in enumerate(self.levels[:1] if self.lossy else self.levels):
            if not self._owns_whole_shards(k, level):
                break
            count += 1
        return count

    def _owns_whole_shards(self, k: int, level: LevelSpec) -> bool:
        sr = self.slab_shape.lateral(self.scale)
        whole = self.region.shape.lateral(self.scale)
        for axis in ("z", "y", "x"):
            size, total, shard = getattr(sr, axis), getattr(whole, axis), getattr(level.shard, axis)
            step = 1 if axis == "z" else 2**k
            if size < total and (size % step or (size // step) % shard):
                return False
        return True

    @property
    def tasks(self) -> int:
        return self.slabs + sum(self._blocks(k).product for k in self.second_pass)

    @property
    def second_pass(self) -> range:
        """Levels averaged from the level before, after all slabs are written."""
        return range(self.in_memory, len(self.levels))

    def _block(self, level: int) -> ZYX:
        """As many whole shards as fit BLOCK_SIDE: a block and the four times larger part it is made from stay small."""
        shard = self.levels[level].shard
        return ZYX(shard.z, *(n * max(1, BLOCK_SIDE // n) for n in (shard.y, shard.x)))

    def _blocks(self, level: int) -> ZYX:
        return self.levels[level].shape.ceil_div(self._block(level))

    def stages(self) -> list[range]:
        """Task numbers that may run at the same time: all slabs, then one second-pass level after another."""
        out, start = [range(self.slabs)], self.slabs
        for level in self.second_pass:
            count = self._blocks(level).product
            out.append(range(start, start + count))
            start += count
        return out

    def slab(self, index: int) -> Slab:
        """The slab of this number; z runs fastest."""
        if not 0 <= index < self.slabs:
            raise IndexError(f"slab {index} of {self.slabs}")
        grid = self.grid
        column, iz = divmod(index, grid.z)
        iy, ix = divmod(column, grid.x)
        lr = Box.at(self.region.start + ZYX(iz, iy, ix) * self.slab_shape, self.slab_shape).intersect(self.region)
        return Slab(
            index,
            lr,
            self.lattice.padded(lr).intersect(self.bounds),
            lr.shift(ZYX(0, 0, 0) - self.region.start).lateral(self.scale),
        )

    def slab_at(self, voxel: ZYX) -> int:
        """The number of the slab that owns this LR voxel (volume coordinates, inside the region)."""
        i = (voxel - self.region.start) // self.slab_shape
        return (i.y * self.grid.x + i.x) * self.grid.z + i.z

    def level_box(self, slab: Slab, level: int) -> Box:
        """The slab's write box at an in-memory level, rounded outwards at the volume's odd end."""
        return slab.write.coarser(2**level).intersect(Box(ZYX(0, 0, 0), self.levels[level].shape))

    def fidelity_box(self, slab: Slab) -> Box:
        """The slab's write box in the LR-sized fidelity volume."""
        return slab.lr.shift(ZYX(0, 0, 0) - self.region.start)

    def pyramid_block(self, index: int) -> PyramidBlock:
        for stage, level in zip(self.stages()[1:], self.second_pass, strict=True):
            if index in stage:
                block, blocks = self._block(level), self._blocks(level)
                z, rest = divmod(index - stage.start, blocks.y * blocks.x)
                write = Box.at(ZYX(z, *divmod(rest, blocks.x)) * block, block).intersect(
                    Box(ZYX(0, 0, 0), self.levels[level].shape)
                )
                read = write.lateral(2).intersect(Box(ZYX(0, 0, 0), self.levels[level - 1].shape))
                return PyramidBlock(index, level, write, read)
        raise IndexError(f"task {index} of {self.tasks}")

    def box(self, index: int) -> Box:
        """What this task makes, in SR voxels of mip 0 (the target's, from its corner); a coarser block's may reach over the volume's end."""
        if index < self.slabs:
            return self.slab(index).write
        block = self.pyramid_block(index)
        return block.write.lateral(2**block.level)

    def place(self, index: int) -> str:
        """The task in words."""
        return (
            f"LR box {self.slab(index).lr}"
            if index < self.slabs
            else f"a block of mip {self.pyramid_block(index).level}"
        )

    def strips(self, block: PyramidBlock) -> list[Box]:
        """`block.read` in strips of whole rows of chunks, each about STRIP_ROWS high and of an even number of rows."""
        finer = self.levels[block.level - 1]
        step = lcm(finer.chunk.y, 2)
        rows = step * max(1, STRIP_ROWS // step)
        return list(tiles(block.read, ZYX(finer.shard.z, rows, finer.shape.x)))

    def column_end(self, index: int) -> int:
        """One past the last number of the z column that holds this task: where a lease must end."""
        if index < self.slabs:
            return (index // self.grid.z + 1) * self.grid.z
        return next(stage.stop for stage in self.stages() if index in stage)

    def empty_sections(self, slab: Slab) -> list[int]:
        """Which of the slab's own sections, counted from its first, are left empty."""
        return (
            [z - slab.lr.start.z for z in self.bad_sections if slab.lr.start.z <= z < slab.lr.stop.z]
            if self.leave_empty
            else []
        )

    def section(self, z: int) -> int:
        """The source section that stands in for `z`: the end section beyond the volume, the nearest good one for a bad one
        (of two as near, the lower).
        """
        z = min(max(z, self.bounds.start.z), self.bounds.stop.z - 1)
        if z not in self.bad_sections:
            return z
        for d in range(1, self.bounds.shape.z):
            for near in (z - d, z + d):
                if self.bounds.start.z <= near < self.bounds.stop.z and near not in self.bad_sections:
                    return near
        raise ValueError("every section is bad")
