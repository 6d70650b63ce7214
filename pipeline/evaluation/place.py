"""Where SR and its ground truth lie in one another: which voxels both have, by the positions that they state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.base.errors import UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.table import VolumeConfig
from pipeline.storage.volume import VolumeInfo

SAME = 1e-3
"""Voxel sizes that differ by a larger part are different."""
MAX_FRACTION = 0.01
"""Positions that differ by less than this part of a voxel are the same."""
SCALES = (8, 16)


@dataclass(frozen=True)
class Place:
    """`common` is what is scored, in SR's voxels counted from its first. There, truth = SR's voxel + `offset`.

    `remarks` are for the reader of the scores.
    """

    common: Box
    offset: ZYX
    remarks: tuple[str, ...]


def place(config: VolumeConfig, sr: VolumeInfo, truth: VolumeInfo) -> Place:
    """Where the two lie in one another. Raises UserError for other voxel sizes, where they have nothing in common, and
    without `crop` where either has voxels that the other has not.
    """
    remarks = _check_sizes(config.name, sr, truth)
    ours, theirs = sr.bounds.shape, truth.bounds.shape
    offset, more = _offset(config, sr, truth)
    whole = Box(ZYX(0, 0, 0), ours)
    common = Box(ZYX(0, 0, 0) - offset, theirs - offset).intersect(whole)
    if common.empty:
        raise UserError(
            f"{config.name}: SR begins at voxel {offset} (z, y, x) of a ground truth of {theirs} by the positions that "
            "they state: they have no voxel in common",
            "a ground truth of the same place",
            "Name its own truth; where a position is wrong, align: first_voxels compares voxel by voxel",
        )
    if not config.crop and ours != theirs:
        raise UserError(
            f"{config.name}: SR is {tuple(ours)}, ground truth {tuple(theirs)}",
            "one shape (z, y, x)",
            _hint(ours, theirs),
        )
    if not config.crop and offset != ZYX(0, 0, 0):
        raise UserError(
            f"{config.name}: SR begins at voxel {offset} (z, y, x) of the ground truth by the positions they state",
            "one place",
            "crop: true scores what they have in common; where a position is wrong, align: first_voxels compares voxel "
            "by voxel",
        )
    if common != whole:
        remarks.append(f"only voxels {common} of SR's {ours} lie in the ground truth")
    return Place(common, offset, (*remarks, *more))


def _hint(ours: ZYX, theirs: ZYX) -> str:
    if sorted(ours) == sorted(theirs):
        return "The same numbers in another order: the axes of one of them may be exchanged"
    if all(a <= b for a, b in zip(ours, theirs, strict=True)):
        return "crop: true leaves out what the truth has more"
    return "Name its own truth, or let crop: true score what they have in common"


def _check_sizes(name: str, sr: VolumeInfo, truth: VolumeInfo) -> list[str]:
    unsized = [key for key, info in (("sr", sr), ("gt", truth)) if not info.sized]
    if unsized:
        return [f"{' and '.join(unsized)} state no voxel size"]
    ours, theirs = sr.voxel_size_nm, truth.voxel_size_nm
    if not all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(ours, theirs, strict=True)):
        raise UserError(
            f"{name}: SR's voxels are {_nm(ours)}, the ground truth's {_nm(theirs)} (z, y, x)",
            "one voxel size, to a thousandth",
            "Name the truth of SR's size, or mend the metadata",
        )
    return []


def _nm(size: tuple[float, float, float]) -> str:
    return " x ".join(f"{v:g}" for v in size) + " nm"


def _offset(config: VolumeConfig, sr: VolumeInfo, truth: VolumeInfo) -> tuple[ZYX, list[str]]:
    """The voxel of the truth at which SR begins, and remarks."""
    start = ZYX(0, 0, 0)
    if config.align == "first_voxels":
        return start, ["compared voxel by voxel from the first of each (align: first_voxels)"]
    missing = [key for key, info in (("sr", sr), ("gt", truth)) if not (info.placed and info.sized)]
    if missing:
        if sr.bounds.shape != truth.bounds.shape and config.crop:
            raise UserError(
                f"{config.name}: {' and '.join(missing)} state no position, so nothing says which part of the truth SR "
                "is",
                "positions that both state",
                "Mend the metadata, or let align: first_voxels compare from the first voxel of each",
            )
        return start, [f"{' and '.join(missing)} state no position: compared from the first voxel of each"]
    apart = [
        (a + i * v - b - j * w) / v
        for a, i, v, b, j, w in zip(
            sr.corner_nm,
            sr.bounds.start,
            sr.voxel_size_nm,
            truth.corner_nm,
            truth.bounds.start,
            truth.voxel_size_nm,
            strict=True,
        )
    ]
    for scale in SCALES:
        # Many writers put the centre of every level's first voxel at 0: then LR's corner, and with it that of SR, lies
        # half an LR voxel less half an SR voxel before the truth's.
        half = (scale - 1) / 2
        shifted = [apart[0], apart[1] + half, apart[2] + half]
        if all(_whole(v) for v in shifted) and all(round(v) % scale == 0 for v in shifted[1:]):
            z, y, x = map(round, shifted)
            return ZYX(z, y, x), [
                f"positions are {half:g} voxels off, as where the first voxels of LR and truth have one centre: "
                "compared so"
            ]
    z, y, x = (math.floor(v + 0.5) for v in apart)
    if all(map(_whole, apart)):
        return ZYX(z, y, x), []
    off = ", ".join(f"{v - n:+.3g}" for v, n in zip(apart, (z, y, x), strict=True))
    return ZYX(z, y, x), [f"positions are off by ({off}) voxels (z, y, x): the nearest voxels are compared"]


def _whole(value: float) -> bool:
    return abs(value - round(value)) < MAX_FRACTION
