"""How many slabs a mask touches, before anything is written: looked at in a sample where there are many."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.base import waits
from pipeline.base.errors import DataError, MissingChunkError, SourceError, TransientError
from pipeline.base.geometry import Box
from pipeline.prepare import fills
from pipeline.prepare.prepared import Prepared
from pipeline.storage.sources.open import open_mask
from pipeline.storage.volume import VolumeInfo
from pipeline.worker.mask import mask_box, touches

SAMPLE = 64
"""Slabs that are looked at."""
MAX_LOOKED = 1024
"""Slabs that are looked at where the mask touches none of the sample."""
GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, are spread evenly however many there are."""


@dataclass(frozen=True)
class Reach:
    """Of `looked` slabs, out of `slabs`, the mask touches `touched`. Counted among these are `holes` over which a chunk
    of the mask is absent; `unstored` is what the mask's own fill value is read as.
    """

    touched: int
    looked: int
    slabs: int
    holes: int = 0
    unstored: int | None = None

    def __str__(self) -> str:
        tried = "" if self.looked == self.slabs else f" that were looked at, of {self.slabs:,}"
        said = f"touches {self.touched:,} of {self.looked:,} slabs{tried}; the others are skipped"
        return said + f". {self.of_holes}" * bool(self.holes)

    @property
    def of_holes(self) -> str:
        """What is said of absent chunks."""
        return (
            f"Over {self.holes:,} of them a chunk of the mask is absent. "
            f"{fills.advice('source.mask.missing_chunks', self.unstored)}"
        )


def check_overlap(mask: VolumeInfo, source: VolumeInfo, region: Box) -> None:
    """Raises SourceError where no voxel of the mask lies over the region."""
    if mask_box(mask, source, region).empty:
        ends = [
            [
                f"{c + i * v:g}..{c + j * v:g}"
                for c, i, j, v in zip(info.corner_nm, box.start, box.stop, info.voxel_size_nm, strict=True)
            ]
            for info, box in ((mask, mask.bounds), (source, region))
        ]
        raise SourceError(
            f"source.mask {mask.url} covers {', '.join(ends[0])} nm (z, y, x), the region to do {', '.join(ends[1])} "
            "nm: no voxel of it lies there, so that every slab would be skipped",
            "a mask over the region",
            "Mend the mask's voxel size and position, or the box",
        )


def reach(prepared: Prepared) -> Reach | None:
    """What the mask of a plan touches; None without a mask. A slab whose mask cannot be read counts as touched.

    Raises SourceError where all slabs were looked at and the mask touches none.
    """
    config, plan = prepared.config.source.mask, prepared.job.plan
    if config is None:
        return None
    mask = open_mask(config, prepared.source)
    touched = looked = holes = 0
    began, say_s = time.monotonic(), waits.SAY_S
    for index in _spread(plan.slabs):
        if looked >= (SAMPLE if touched else MAX_LOOKED):
            break
        if (waited_s := time.monotonic() - began) >= say_s:
            waits.say(f"the mask {mask.info.url}: {looked:,} slabs looked at, {touched:,} of them touched", waited_s)
            say_s *= 2
        looked += 1
        try:
            touched += touches(mask, prepared.source, plan.slab(index).lr)
        except (DataError, TransientError) as error:
            touched += 1
            holes += isinstance(error, MissingChunkError)
    if not touched and looked == plan.slabs:
        raise nothing_touched(plan.slabs, mask.info.url)
    return Reach(touched, looked, plan.slabs, holes, mask.info.unstored if holes else None)


def nothing_touched(slabs: int, url: str) -> SourceError:
    """The error of a run whose mask leaves it nothing to do."""
    return SourceError(
        f"0 of {slabs} slabs written: the mask {url} touches nothing of the region",
        "a mask that is not 0 where there is something to do",
        "Mend the mask (its level, position, values), or the box",
    )


def _spread(count: int) -> Iterator[int]:
    if count <= MAX_LOOKED:
        yield from range(count) if count <= SAMPLE else sorted(range(count), key=lambda i: i * GOLDEN % 1)
        return
    yield from dict.fromkeys(int(i * GOLDEN % 1 * count) for i in range(MAX_LOOKED))
