"""Volumes to score: SR, its ground truth and, where given, its LR, opened and checked before anything is scored."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.base.errors import DataError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.table import VolumeConfig
from pipeline.config.volume import FillConfig, MaskConfig
from pipeline.evaluation import scored_voxels
from pipeline.evaluation.place import SAME, Place, place
from pipeline.evaluation.scored_voxels import Valid, Written
from pipeline.storage.sources.open import open_mask, open_scored, reached
from pipeline.storage.volume import Source, Uint8Array

SR, BICUBIC = "SR", "bicubic"


@dataclass(frozen=True)
class SectionImages:
    """One section as uint8 images (y, x). `methods` are SR and, where there is LR, its bicubic enlargement.

    `valid` is True where a voxel is scored, None where all are.
    """

    methods: dict[str, Uint8Array]
    truth: Uint8Array
    lr: Uint8Array | None
    valid: Valid | None

    @property
    def scored(self) -> float:
        """The share of its voxels that is scored."""
        return 1.0 if self.valid is None else float(self.valid.mean())


@dataclass(frozen=True)
class ScoredVolume:
    """An SR volume, its truth and, if given, its LR. `sections` is the half-open range of z that is scored, counted
    from SR's first.
    """

    name: str
    sr: Source
    truth: Source
    lr: Source | None
    mask: Source | None
    written: Written | None
    place: Place
    sections: range

    def read(self, z: int) -> SectionImages:
        """Section `z`: SR, truth, LR, and LR enlarged by bicubic where there is LR, each cut to what is scored.

        Raises UserError where one cannot be read.
        """
        common = self.place.common
        box = Box(ZYX(z, common.start.y, common.start.x), ZYX(z + 1, common.stop.y, common.stop.x))
        sr, valid = self._sr(z, box)
        methods, truth = {SR: sr}, self.read_truth(z)
        if self.lr is None:
            return SectionImages(methods, truth, None, valid)
        whole, shape = self.sr.info.bounds.shape, self.lr.info.bounds.shape
        lr = _read(self.lr, Box(ZYX(z, 0, 0), ZYX(z + 1, shape.y, shape.x)))
        enlarged = np.asarray(Image.fromarray(lr).resize((whole.x, whole.y), Image.Resampling.BICUBIC))
        return SectionImages(methods | {BICUBIC: enlarged[box.slices()[1:]]}, truth, lr, valid)

    def read_truth(self, z: int) -> Uint8Array:
        """The truth of section `z`, cut to what is scored. Raises UserError where it cannot be read."""
        common = self.place.common
        box = Box(ZYX(z, common.start.y, common.start.x), ZYX(z + 1, common.stop.y, common.stop.x))
        return _read(self.truth, box.shift(self.place.offset))

    def _sr(self, z: int, box: Box) -> tuple[Uint8Array, Valid | None]:
        """SR in `box` of section `z`, 0 where nothing is stored, and what of it is scored."""
        valid = None if self.mask is None else self._masked(self.mask, z, box)
        parts = [box] if self.written is None else list(self.written.parts(z, box))
        if sum(part.shape.product for part in parts) == box.shape.product:
            return _read(self.sr, box), valid
        image, stored = np.zeros(tuple(box.shape)[1:], np.uint8), np.zeros(tuple(box.shape)[1:], np.bool_)
        for part in parts:
            here = part.slices(box.start)[1:]
            image[here], stored[here] = _read(self.sr, part), True
        return image, stored if valid is None else stored & valid

    def _masked(self, mask: Source, z: int, box: Box) -> Valid:
        try:
            return scored_voxels.masked(mask, self.sr.info, z, box)
        except (DataError, TransientError) as error:
            raise UserError(f"the mask of section {z} cannot be read: {error}") from None


def open_volume(config: VolumeConfig, index: int = 0) -> ScoredVolume:
    """One entry of table.yaml's volumes, the one number `index`. Raises UserError where the volumes do not fit one
    another.
    """
    fill = config.missing_chunks.fill if isinstance(config.missing_chunks, FillConfig) else None
    here = f"volumes.{index}"

    def opened(key: str, url: str) -> Source:
        invert = config.invert and key != "sr"
        with reached(f"{here}.{key}"):
            return open_scored(url, config.intensity_window, invert, fill, _keys(here, key))

    if config.sr == config.gt:
        raise UserError(f"{config.name}: sr and gt are one volume, {config.sr}", "two", "Name its own truth")
    sr, truth = opened("sr", config.sr), opened("gt", config.gt)
    windowed = [source.info.dtype for source in (sr, truth)]
    lr = None if config.lr is None else opened("lr", config.lr)
    if config.intensity_window and {*windowed, *([lr.info.dtype] if lr else [])} == {"uint8"}:
        raise UserError(
            f"{here}.intensity_window is given, and all its volumes are uint8",
            "a window for other types only",
            "Take intensity_window away",
        )
    found = place(config, sr.info, truth.info)
    if lr is not None:
        found = dataclasses.replace(found, remarks=(*found.remarks, *_check_lr(config, sr, lr)))
    mask = None
    if config.mask is not None:
        rule = MaskConfig(url=config.mask, missing_chunks=config.missing_chunks)
        with reached(f"{here}.mask"):
            mask = open_mask(rule, sr.info, _keys(here, "mask"))
    sections = _sections(config, found, sr.info.bounds.shape.z)
    written = scored_voxels.written(sr.info)
    if written is not None:
        start, stop = found.common.start, found.common.stop
        written.check(config.name, Box(ZYX(sections.start, start.y, start.x), ZYX(sections.stop, stop.y, stop.x)))
    return ScoredVolume(config.name, sr, truth, lr, mask, written, found, sections)


def _keys(here: str, key: str) -> dict[str, str]:
    """What messages call the keys of a source: those of table.yaml."""
    names = {"url": key, "mip": f"{key}'s level (the first)", "array": f"{key}, with its path appended"}
    return {
        k: f"{here}.{v}" for k, v in (names | {k: k for k in ("intensity_window", "missing_chunks", "mask")}).items()
    }


def _sections(config: VolumeConfig, found: Place, depth: int) -> range:
    low, high = found.common.start.z, found.common.stop.z
    first, stop = config.sections or (low, high)
    if not low <= first < stop <= high:
        saw = f"a volume of {depth}" if (low, high) == (0, depth) else f"which the truth has only [{low}, {high}]"
        raise UserError(
            f"{config.name}: sections [{first}, {stop}] of {saw}",
            f"sections within [{low}, {high}]",
            "Correct sections",
        )
    return range(first, stop)


def _check_lr(config: VolumeConfig, ours: Source, theirs: Source) -> list[str]:
    """Remarks about LR. Raises UserError where it is not SR's."""
    sr, lr = ours.info, theirs.info
    whole, small = sr.bounds.shape, lr.bounds.shape
    scale = whole.y // max(1, small.y)
    if small.z != whole.z or scale < 2 or (small.y * scale, small.x * scale) != (whole.y, whole.x):
        raise UserError(
            f"{config.name}: LR is {tuple(small)}, SR {tuple(whole)}",
            "the same sections, y and x smaller by one whole number",
            "Name its own LR",
        )
    if not (sr.sized and lr.sized):
        return []
    wanted = (sr.voxel_size_nm[0], sr.voxel_size_nm[1] * scale, sr.voxel_size_nm[2] * scale)
    if not all(math.isclose(a, b, rel_tol=SAME) for a, b in zip(wanted, lr.voxel_size_nm, strict=True)):
        return [f"LR's voxels are not {scale} times as large as SR's by their metadata"]
    first = [
        [c + i * v for c, i, v in zip(info.corner_nm, info.bounds.start, info.voxel_size_nm, strict=True)]
        for info in (sr, lr)
    ]
    far = any(abs(a - b) > v / 2 * (1 + SAME) for a, b, v in zip(*first, lr.voxel_size_nm, strict=True))
    if far and sr.placed and lr.placed and config.align == "positions":
        raise UserError(
            f"{config.name}: LR begins at {first[1]} nm, SR at {first[0]} (z, y, x)",
            "one place",
            "Name its own LR, or take it away",
        )
    return []


def _read(source: Source, box: Box) -> Uint8Array:
    """One section of the voxels of `box`, which are counted from the volume's first, as (y, x)."""
    try:
        whole = source.read(box.shift(source.info.bounds.start))
    except (DataError, TransientError) as error:
        raise UserError(
            f"section {box.start.z} of {source.info.url} cannot be read: {error}",
            "",
            "Finish or mend the volume, or leave the section out",
        ) from None
    section: Uint8Array = whole[0]
    return section
