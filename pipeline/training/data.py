"""Volumes to train on: opened, looked at, and refused before the first step where nothing can be learnt from them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from models.degrade import degrade
from models.training.crops import Volume
from pipeline.base.errors import DataError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.stage import VolumeConfig
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source
from pipeline.storage.volume import Source, Uint8Array

IN_MEMORY = 4 << 30
"""Bytes of HR up to which a volume is held whole; a larger one is read crop by crop."""
FLAT = 1.0
"""Standard deviation, in grey values, below which a section shows nothing."""
RELATED = 0.5
"""Least correlation of given LR with what its HR would give: less, and they show other tissue."""
LOOKED_AT = 512


def open_volume(config: VolumeConfig, scale: int, sections: int, crop: int, budget: int = IN_MEMORY) -> Volume:
    """The sections of one entry of data.train or data.validate_on. Raises UserError where they cannot serve.

    `sections` and `crop` are what one sample takes, in HR voxels.
    """
    source = open_source(
        SourceConfig(url=config.url, mip=config.mip, array=config.array, intensity_window=config.intensity_window)
    )
    bounds = source.info.bounds
    first, stop = config.sections or (0, bounds.shape.z)
    if stop > bounds.shape.z:
        raise UserError(
            f"{config.url} has {bounds.shape.z} sections",
            f"sections within [0, {bounds.shape.z}]",
            "Correct data's sections",
        )
    shape = (stop - first, bounds.shape.y, bounds.shape.x)
    origin = bounds.start + ZYX(first, 0, 0)
    read = _reader(source, origin)
    lr = None
    if config.lr is not None:
        lr_source = open_source(SourceConfig(url=config.lr, intensity_window=config.intensity_window))
        found, wanted = (
            lr_source.info.bounds.shape,
            ZYX(bounds.shape.z, bounds.shape.y // scale, bounds.shape.x // scale),
        )
        if found != wanted:
            raise UserError(
                f"LR {config.lr} is {tuple(found)}",
                f"{tuple(wanted)}, its HR divided by {scale} in y and x",
                "Name the LR of this HR volume",
            )
        shape = (shape[0], shape[1] // scale * scale, shape[2] // scale * scale)
        lr = _reader(lr_source, lr_source.info.bounds.start + ZYX(first, 0, 0))
    if min(shape[1:]) < crop:
        raise UserError(
            f"{config.url} has sections of {shape[1]} x {shape[2]} voxels",
            f"at least data.crop, {crop}",
            "Use a smaller crop or larger sections",
        )
    if np.prod(shape) <= budget:
        whole = _whole(read, shape, config.url)
        read = lambda z, y, x: whole[z, y, x]  # noqa: E731
    good = _good(read, shape, set(config.bad_sections), first, config.url)
    if lr is not None:
        _related(read, lr, shape, good, scale, config)
    volume = Volume(shape, read, good, lr)
    if not len(volume.starts(sections)):
        raise UserError(
            f"{config.url} has {int(good.sum())} usable of {shape[0]} sections",
            f"{sections} consecutive ones",
            "Give more sections, or fewer bad_sections",
        )
    return volume


def _reader(source: Source, origin: ZYX) -> Callable[[slice, slice, slice], Uint8Array]:
    def read(z: slice, y: slice, x: slice) -> Uint8Array:
        return source.read(Box(origin + ZYX(z.start, y.start, x.start), origin + ZYX(z.stop, y.stop, x.stop)))

    return read


def _whole(read: Callable[[slice, slice, slice], Uint8Array], shape: tuple[int, int, int], url: str) -> Uint8Array:
    try:
        return read(*(slice(0, n) for n in shape))
    except DataError as error:
        raise UserError(
            f"{url} cannot be read whole: {error}", "a volume without holes", "Mend it, or leave those sections out"
        ) from None


def _good(
    read: Callable[[slice, slice, slice], Uint8Array], shape: tuple[int, int, int], bad: set[int], first: int, url: str
) -> np.ndarray:
    """Per section: neither listed as bad nor flat. Looks at the middle of each."""
    z, height, width = shape
    y, x = max(0, (height - LOOKED_AT) // 2), max(0, (width - LOOKED_AT) // 2)
    good = np.zeros(z, bool)
    highest = 0
    for i in range(z):
        seen = read(slice(i, i + 1), slice(y, min(height, y + LOOKED_AT)), slice(x, min(width, x + LOOKED_AT)))
        good[i] = first + i not in bad and seen.std() >= FLAT
        highest = max(highest, int(seen.max()))
    if 0 < highest <= 1:
        raise UserError(
            f"{url} has grey values of 0 and 1 only",
            "EM images in 0..255",
            "Name the image, not its mask; scale values of 0..1 to 0..255",
        )
    if not good.any():
        raise UserError(
            f"{url} shows nothing: every section is constant, or listed as bad",
            "EM images",
            "Check the url, mip and intensity_window",
        )
    return good


def _related(
    hr: Callable[[slice, slice, slice], Uint8Array],
    lr: Callable[[slice, slice, slice], Uint8Array],
    shape: tuple[int, int, int],
    good: np.ndarray,
    scale: int,
    config: VolumeConfig,
) -> None:
    """The given LR is that of the given HR: in the middle section they show the same."""
    z = int(np.flatnonzero(good)[good.sum() // 2])
    side = [n // scale * scale for n in shape[1:]]
    section = slice(z, z + 1)
    wanted = degrade(hr(section, slice(0, side[0]), slice(0, side[1]))[0], scale)
    given = lr(section, slice(0, side[0] // scale), slice(0, side[1] // scale))[0]
    alike = float(np.corrcoef(wanted.ravel(), given.ravel())[0, 1]) if given.std() > 0 else 0.0
    if alike < RELATED:
        raise UserError(
            f"LR {config.lr} and HR {config.url} do not show the same (correlation {alike:.2f} in section {z})",
            f"at least {RELATED}",
            "Align them",
        )
