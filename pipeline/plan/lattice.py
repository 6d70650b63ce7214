"""The tile lattice: the fixed grid of network inputs, which makes a voxel independent of how the work is cut.

Along y or x, in LR voxels:

        face of the volume, voxel 0 of the source's grid
                |
                |--- cell 0 ---|--- cell 1 ---|--- cell 2 ---|   cells touch and cover the volume
            pppp|vvvvvvvvvvvvvv|hhh|                             p padding, v cell, h halo
            |------- tile 0 -------|                             makes the output of cell 0 alone
                           |------- tile 1 -------|              makes the output of cell 1 alone
                                          |------- tile 2 -------|

A tile is one network input: a cell and `halo` voxels on every side of it. What the network makes of the halo is thrown
away. Where a tile leaves the volume it is filled with invented voxels, the padding. The network sees whole tiles only,
so a voxel's value depends on the tile of its cell and on nothing else.

Along z a window of consecutive sections makes one output section:

    z ->     0     1     2     3     4     5     6
             |------ window of 5 ------|                  makes section 2; z_halo = 2 sections lie on either side of it
                   |------ window of 5 ------|            makes section 3
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.base.geometry import ZYX, Box, grid_parts


@dataclass(frozen=True)
class Lattice:
    """The lattice's sizes in LR voxels, and `window` in sections.

    They are part of the network's definition, since another lattice gives other bytes. The grid's origin is voxel (0,
    0) of the source's grid. `padding` says which lateral voxels are invented where a tile leaves the volume: `mirror`
    reflects about the volume's face, `edge` repeats the end voxel.
    """

    cell: int
    halo: int
    window: int
    padding: str

    @property
    def z_halo(self) -> int:
        """Sections that are read beyond each end of a box."""
        return self.window // 2

    @property
    def tile(self) -> int:
        """Rows, and columns, of a tile."""
        return self.cell + 2 * self.halo

    def with_halo(self, box: Box) -> Box:
        """All voxels that the tiles of `box` see, as one box, `z_halo` sections included. It may leave the volume."""
        return self.whole_cell(box).grow(ZYX(self.z_halo, self.halo, self.halo))

    def whole_cell(self, box: Box) -> Box:
        """The cells in which `box` lies, as one box. It may leave the volume."""
        cells = ZYX(1, self.cell, self.cell)
        return Box((box.start // cells) * cells, box.stop.ceil_div(cells) * cells)

    def tiles(self, box: Box) -> int:
        """How many tiles a section of `box` takes."""
        cells = ZYX(1, self.cell, self.cell)
        count = box.stop.ceil_div(cells) - box.start // cells
        return count.y * count.x

    def cells(self, box: Box) -> Iterator[Box]:
        """The parts of `box` that lie in one cell each, in y, x order. Each keeps the whole z range of `box`."""
        first = Box(ZYX(0, box.start.y, box.start.x), ZYX(1, box.stop.y, box.stop.x))
        for cell in grid_parts(first, ZYX(1, self.cell, self.cell)):
            yield Box(ZYX(box.start.z, cell.start.y, cell.start.x), ZYX(box.stop.z, cell.stop.y, cell.stop.x))
