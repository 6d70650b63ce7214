"""Which task is which box, by formula: task number -> what is read, what is written. Nothing here opens a file.

Along z, the direction in which numbers run, so that a lease of consecutive numbers shares its halo (h, read only):

    z ->    |hhh|----- slab 0 ----|hhh|                       read box of slab 0
                              |hhh|----- slab 1 ----|hhh|     read box of slab 1
                |===== slab 0 ====|===== slab 1 ====|         write boxes touch and never overlap

Along y or x:

              |--- cell --|--- cell --|--- cell --|           the lattice
                  |--------- slab ---------|                  LR voxels that the slab owns
          |hhh|----------- whole cells -----------|hhh|       read box: cut at the volume's faces
                  |===== scale x slab =====|                  write box: SR voxels, whole shards

Read boxes are in the source's coordinates. Write boxes are in the target's, whose voxel (0, 0, 0) is the region's
corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from pipeline.base.geometry import ZYX, Box, grid_parts
from pipeline.plan.lattice import Lattice
from pipeline.plan.target_spec import FIDELITY, LevelSpec

BLOCK_SIDE = 2048
"""About how many rows and columns a block of the second pass has."""
STRIP_ROWS = 512
"""About how many rows of the finer level a block reads at a time."""


@dataclass(frozen=True)
class Slab:
    """One unit of work.

    `lr` are the source's voxels that it owns, `read` all those that it needs, both in the source's coordinates. `write`
    are its SR voxels in the array of mip 0, which starts at the region's corner.
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
    """The arithmetic of a run. Tasks 0 .. slabs-1 are slabs; the others are blocks of the levels that slabs do not
    write.

    `bounds` are the source's voxels, `region` those that are super-resolved, both in the source's coordinates;
    `slab_shape` is in LR voxels. `lossy` means that the encoding changes voxels: then every level is averaged from the
    stored level before it, never from a slab in memory, since the slab's shape must not show (law 1). `leave_empty`
    means that the output of a bad section is 0.
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
        """How many slabs there are."""
        return self.grid.product

    @property
    def levels_by_slabs(self) -> int:
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
        """How many tasks there are: slabs and blocks of the second pass."""
        return self.slabs + sum(self._blocks(k).product for k in self.second_pass)

    @property
    def second_pass(self) -> range:
        """Levels averaged from the level before, after all slabs are written."""
        return range(self.levels_by_slabs, len(self.levels))

    def _block(self, level: int) -> ZYX:
        """The shape of a block: as many whole shards as fit BLOCK_SIDE. It is made from four times as many voxels."""
        shard = self.levels[level].shard
        return ZYX(shard.z, *(n * max(1, BLOCK_SIDE // n) for n in (shard.y, shard.x)))

    def _blocks(self, level: int) -> ZYX:
        return self.levels[level].shape.ceil_div(self._block(level))

    def passes(self) -> list[range]:
        """Numbers of the tasks that may run at the same time: all slabs, then one level of the second pass after
        another.
        """
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
            self.lattice.with_halo(lr).intersect(self.bounds),
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
        """The block of this number. Raises IndexError where the number is a slab's, or none."""
        for stage, level in zip(self.passes()[1:], self.second_pass, strict=True):
            if index in stage:
                block, blocks = self._block(level), self._blocks(level)
                z, rest = divmod(index - stage.start, blocks.y * blocks.x)
                write = Box.at(ZYX(z, *divmod(rest, blocks.x)) * block, block).intersect(
                    Box(ZYX(0, 0, 0), self.levels[level].shape)
                )
                read = write.lateral(2).intersect(Box(ZYX(0, 0, 0), self.levels[level - 1].shape))
                return PyramidBlock(index, level, write, read)
        raise IndexError(f"task {index} of {self.tasks}")

    def block_at(self, level: int, voxel: ZYX) -> int:
        """The number of the second pass's block that owns this voxel of `level`."""
        stage = self.passes()[1 + level - self.levels_by_slabs]
        i, blocks = voxel // self._block(level), self._blocks(level)
        return stage.start + (i.z * blocks.y + i.y) * blocks.x + i.x

    def task_at(self, level: int, voxel: ZYX) -> int:
        """The number of the task that writes this voxel of `level`, or of the fidelity volume."""
        if level in self.second_pass:
            return self.block_at(level, voxel)
        lr = voxel if level == FIDELITY else voxel.lateral(2**level) // ZYX(1, self.scale, self.scale)
        return self.slab_at(self.region.start + lr)

    def averaged_from(self, index: int) -> list[int]:
        """The blocks of the second pass that are averaged from what this task writes."""
        if index < self.slabs:
            level = self.levels_by_slabs - 1
            made = self.level_box(self.slab(index), level)
        else:
            block = self.pyramid_block(index)
            level, made = block.level, block.write
        if level + 1 not in self.second_pass:
            return []
        parts = grid_parts(made.coarser(2), self._block(level + 1))
        return [self.block_at(level + 1, part.start) for part in parts]

    def box(self, index: int) -> Box:
        """What this task makes, as a box of mip 0 in the target's coordinates. A coarser block's may end beyond the
        volume.
        """
        if index < self.slabs:
            return self.slab(index).write
        block = self.pyramid_block(index)
        return block.write.lateral(2**block.level)

    def describe(self, index: int) -> str:
        """The task in words."""
        return (
            f"LR box {self.slab(index).lr}"
            if index < self.slabs
            else f"a block of mip {self.pyramid_block(index).level}"
        )

    def strips(self, block: PyramidBlock) -> list[Box]:
        """The parts of `block.read` that are read one after another: whole rows of chunks, an even number of voxel
        rows.
        """
        finer = self.levels[block.level - 1]
        step = lcm(finer.chunk.y, 2)
        rows = step * max(1, STRIP_ROWS // step)
        return list(grid_parts(block.read, ZYX(finer.shard.z, rows, finer.shape.x)))

    def column_end(self, index: int) -> int:
        """One past the last number in this task's column along z, or in its level: a lease ends there at the latest."""
        if index < self.slabs:
            return (index // self.grid.z + 1) * self.grid.z
        return next(stage.stop for stage in self.passes() if index in stage)

    def sections_left_empty(self, slab: Slab) -> list[int]:
        """Which of the slab's sections are left empty, counted from its first."""
        return (
            [z - slab.lr.start.z for z in self.bad_sections if slab.lr.start.z <= z < slab.lr.stop.z]
            if self.leave_empty
            else []
        )

    def section(self, z: int) -> int:
        """The section that the network is shown for `z`.

        Beyond the volume's ends that is the end section; for a bad section it is the nearest good one, of two the
        lower. Raises ValueError where every section is bad.
        """
        z = min(max(z, self.bounds.start.z), self.bounds.stop.z - 1)
        if z not in self.bad_sections:
            return z
        for d in range(1, self.bounds.shape.z):
            for near in (z - d, z + d):
                if self.bounds.start.z <= near < self.bounds.stop.z and near not in self.bad_sections:
                    return near
        raise ValueError("every section is bad")
