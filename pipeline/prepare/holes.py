"""Whether chunks of the region are absent, before anything is written: looked at in a sample.

Many writers leave out chunks that hold nothing but the fill value. In the metadata such a volume looks like a whole
one, and its holes would be met slab by slab.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from pipeline.base.errors import EmsrError, MissingChunkError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import FillConfig
from pipeline.prepare import fills
from pipeline.prepare.mask_reach import GOLDEN
from pipeline.prepare.prepared import Prepared
from pipeline.storage.sources.open import open_mask, open_source
from pipeline.storage.volume import Source, VolumeInfo
from pipeline.worker.mask import touches

MAX_CHUNKS = 512
"""Chunks that are looked at, by reading one voxel of each."""
MAX_DECODED_BYTES = 256 << 20
"""Of larger chunks fewer are looked at."""
MAX_LOOK_S = 10.0


@dataclass(frozen=True)
class Holes:
    """Of `looked` chunks, out of `chunks` of the region, `absent` are not stored. `advice` says what that may mean."""

    absent: int
    looked: int
    chunks: int
    advice: str

    def __str__(self) -> str:
        tried = "" if self.looked == self.chunks else f" that were looked at, of {self.chunks:,},"
        return f"{self.absent:,} of {self.looked:,} chunks{tried} are absent" + f". {self.advice}" * bool(self.absent)


def look(prepared: Prepared) -> Holes | None:
    """What is absent of the region; None where a fill is stated. A chunk that no mask touches counts as there.

    It refuses nothing: what cannot be read is left out.
    """
    config, info = prepared.config.source, prepared.source
    if isinstance(config.missing_chunks, FillConfig):
        return None
    source = open_source(config)
    mask = open_mask(config.mask, info) if config.mask is not None else None
    region = prepared.job.plan.region
    origin, chunk = info.bounds.start, info.chunk_shape
    first = (region.start - origin) // chunk
    grid = (region.stop - origin).ceil_div(chunk) - first
    looked = absent = 0
    end = time.monotonic() + MAX_LOOK_S
    for index in _spread(grid.product, info):
        if time.monotonic() > end:
            break
        z, y, x = np.unravel_index(index, tuple(grid))
        start = origin + (first + ZYX(int(z), int(y), int(x))) * chunk
        box = Box.at(start, chunk).intersect(region)
        try:
            source.read(Box.at(box.start, ZYX(1, 1, 1)))
        except MissingChunkError:
            absent += mask is None or _touched(mask, info, box)
        except EmsrError:
            continue
        looked += 1
    return Holes(absent, looked, grid.product, fills.advice("source.missing_chunks", info.unstored))


def _spread(count: int, info: VolumeInfo) -> list[int]:
    """The numbers of the chunks to look at, of 0 .. count-1, in an order of which every beginning is spread evenly."""
    most = max(1, min(MAX_CHUNKS, MAX_DECODED_BYTES // (info.chunk_shape.product * np.dtype(info.dtype).itemsize)))
    chosen = range(count) if count <= most else {int(i * GOLDEN % 1 * count) for i in range(most)}
    return sorted(chosen, key=lambda i: i * GOLDEN % 1)


def _touched(mask: Source, info: VolumeInfo, box: Box) -> bool:
    try:
        return touches(mask, info, box)
    except EmsrError:
        return True
