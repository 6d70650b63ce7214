"""Volumes to score: SR, its ground truth and, where given, its LR, opened and checked before anything is scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.base.errors import DataError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.table import VolumeConfig
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source
from pipeline.storage.volume import Source, Uint8Array

SR, BICUBIC = "SR", "bicubic"


@dataclass(frozen=True)
class SectionImages:
    """One section as uint8 images (y, x). `methods` are SR and, where there is LR, its bicubic enlargement."""

    methods: dict[str, Uint8Array]
    truth: Uint8Array
    lr: Uint8Array | None


@dataclass(frozen=True)
class ScoredVolume:
    """An SR volume, its truth and, if given, its LR. `sections` is the half-open range of z that is scored."""

    name: str
    sr: Source
    truth: Source
    lr: Source | None
    sections: range

    def read(self, z: int) -> SectionImages:
        """Section `z`, counted from each volume's first: SR, truth, LR, and LR enlarged by bicubic where there is LR.

        The truth is cut to the shape of SR. Raises UserError where one cannot be read.
        """
        shape = self.sr.info.bounds.shape
        methods, truth = {SR: _read_section(self.sr, z, shape)}, _read_section(self.truth, z, shape)
        if self.lr is None:
            return SectionImages(methods, truth, None)
        lr = _read_section(self.lr, z, self.lr.info.bounds.shape)
        enlarged = Image.fromarray(lr).resize((shape.x, shape.y), Image.Resampling.BICUBIC)
        return SectionImages(methods | {BICUBIC: np.asarray(enlarged)}, truth, lr)


def open_volume(config: VolumeConfig) -> ScoredVolume:
    """One entry of table.yaml's volumes. Raises UserError where the volumes do not fit one another."""

    def opened(url: str) -> Source:
        return open_source(SourceConfig(url=url, intensity_window=config.intensity_window))

    sr, truth = opened(config.sr), opened(config.gt)
    shape = sr.info.bounds.shape
    _check_truth(config, shape, truth.info.bounds.shape)
    lr = None if config.lr is None else opened(config.lr)
    if lr is not None:
        _check_lr(config, shape, lr.info.bounds.shape)
    first, stop = config.sections or (0, shape.z)
    if stop > shape.z:
        raise UserError(
            f"{config.name}: sections [{first}, {stop}] of a volume of {shape.z}",
            f"sections within [0, {shape.z}]",
            "Correct sections",
        )
    volume = ScoredVolume(config.name, sr, truth, lr, range(first, stop))
    _check_contrast(volume)
    return volume


def _check_truth(config: VolumeConfig, sr: ZYX, truth: ZYX) -> None:
    within = all(a <= b for a, b in zip(sr, truth, strict=True))
    if not (within if config.crop else sr == truth):
        hint = "Use crop: true to leave out what the truth has more" if within else "Name its own truth"
        raise UserError(f"{config.name}: SR is {tuple(sr)}, ground truth {tuple(truth)}", "one shape (z, y, x)", hint)


def _check_lr(config: VolumeConfig, sr: ZYX, lr: ZYX) -> None:
    scale = sr.y // max(1, lr.y)
    if lr.z != sr.z or scale < 2 or (lr.y * scale, lr.x * scale) != (sr.y, sr.x):
        raise UserError(
            f"{config.name}: LR is {tuple(lr)}, SR {tuple(sr)}",
            "the same sections, y and x smaller by one whole number",
            "Name its own LR",
        )


def _check_contrast(volume: ScoredVolume) -> None:
    """A constant section of the truth has no structure to compare with."""
    shape = volume.sr.info.bounds.shape
    for z in volume.sections:
        if _read_section(volume.truth, z, shape).std() == 0:
            raise UserError(
                f"{volume.name}: section {z} of the ground truth is constant",
                "an EM image",
                "Leave it out with sections, or correct the url",
            )


def _read_section(source: Source, z: int, shape: ZYX) -> Uint8Array:
    """Section z, counted from the volume's first, from its corner up to shape.y x shape.x voxels."""
    start = source.info.bounds.start + ZYX(z, 0, 0)
    try:
        whole = source.read(Box(start, start + ZYX(1, shape.y, shape.x)))
    except DataError as error:
        raise UserError(
            f"section {z} of {source.info.url} cannot be read: {error}",
            "",
            "Finish or mend the volume, or leave the section out",
        ) from None
    section: Uint8Array = whole[0]
    return section
