"""Volumes to train on: opened, checked, and refused before the first step where nothing can be learnt from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.degrade import degrade
from models.training.crops import Volume
from pipeline.base.errors import DataError, TransientError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.stage import VolumeConfig
from pipeline.config.volume import SourceConfig
from pipeline.storage.sources.open import open_source, reached
from pipeline.storage.volume import Source, Uint8Array

IN_MEMORY = 4 << 30
"""Bytes of HR up to which a volume is held whole; a larger one is read crop by crop."""
FLAT = 1.0
"""Standard deviation, in grey values, below which a section has no structure to learn from."""
MIN_CORRELATION = 0.5
"""Of given LR with what its HR would give: less, and they show other tissue."""
SAMPLE = 512
"""Voxels across the part of each section, in its middle, that is checked."""

Read = Callable[[slice, slice, slice], Uint8Array]
"""Voxels (z, y, x) of a volume, counted from its first used section."""


@dataclass(frozen=True)
class OpenVolume:
    """A volume, and by the z of every usable section the SHA-256 of its voxels: the whole section of a volume in
    memory, otherwise its middle. `lr` is that of given LR, empty without.
    """

    config: VolumeConfig
    volume: Volume
    sections: dict[int, str]
    lr: str

    def digest(self) -> str:
        """SHA-256 over all usable sections, in their order."""
        return hashlib.sha256("".join(self.sections.values()).encode()).hexdigest()


def shared_sections(train: list[OpenVolume], validate_on: list[OpenVolume]) -> int:
    """How many sections of `validate_on` are also trained on: at the same place, or with the same voxels elsewhere."""

    def names(opened: OpenVolume, z: int, voxels: str) -> set[object]:
        return {voxels, (opened.config.url, opened.config.array, opened.config.mip, z)}

    seen = {name for opened in train for z, voxels in opened.sections.items() for name in names(opened, z, voxels)}
    return sum(bool(names(o, z, voxels) & seen) for o in validate_on for z, voxels in o.sections.items())


def open_volume(
    config: VolumeConfig, scale: int, sections: int, crop: int, budget: int = IN_MEMORY, here: str = "data.train.0"
) -> OpenVolume:
    """The sections of the entry `here` of stage.yaml. Raises UserError where they cannot serve.

    `sections` and `crop` are what one sample takes, in HR voxels. Volumes of up to `budget` bytes are held in memory.
    """
    names = _keys(here) | {key: f"{here}.{key}" for key in ("url", "mip", "array")}
    stated = _source(config, url=config.url, mip=config.mip, array=config.array)
    with reached(f"{here}.url"):
        source = open_source(stated, names, sized=False)
    whole = source.info.bounds.shape
    first, stop = config.sections or (0, whole.z)
    if stop > whole.z:
        raise UserError(
            f"{config.url} has {whole.z} sections", f"sections within [0, {whole.z}]", "Correct data's sections"
        )
    if absent := [z for z in config.bad_sections if not 0 <= z < whole.z]:
        raise UserError(
            f"bad_sections {absent} of {config.url}, which has {whole.z} sections",
            f"numbers from 0 to {whole.z - 1}",
            "Correct data's bad_sections",
        )
    shape = (stop - first, whole.y, whole.x)
    lr = None
    if config.lr is not None:
        lr = _reader(_open_lr(config, whole, scale, here), first)
        shape = (shape[0], whole.y // scale * scale, whole.x // scale * scale)
    if min(shape[1:]) < crop:
        raise UserError(
            f"{config.url} has sections of {shape[1]} x {shape[2]} voxels",
            f"at least data.crop, {crop}",
            "Use a smaller crop or larger sections",
        )
    hr, held = _reader(source, first), bool(np.prod(shape) <= budget)
    if held:
        hr = _in_memory(hr, shape)
    good, digests = _usable(hr, shape, {z - first for z in config.bad_sections}, config.url, held)
    if lr is not None:
        z, (y, x) = int(np.flatnonzero(good)[good.sum() // 2]), shape[1:]
        wanted = degrade(hr(slice(z, z + 1), slice(0, y), slice(0, x))[0], scale)
        given = lr(slice(z, z + 1), slice(0, y // scale), slice(0, x // scale))[0]
        _check_correlation(config, wanted, given, z)
    volume = Volume(shape, hr, good, lr)
    if not len(volume.starts(sections)):
        raise UserError(
            f"{config.url} has {int(good.sum())} usable of {shape[0]} sections",
            f"{sections} consecutive ones",
            "Give more sections, or fewer bad_sections",
        )
    usable = {first + int(z): digests[z] for z in np.flatnonzero(good)}
    return OpenVolume(config, volume, usable, _digest_of(lr, [z - first for z in usable], shape, scale) if lr else "")


def _keys(here: str) -> dict[str, str]:
    """What messages call those keys of a source that HR and LR have in common."""
    return {key: f"{here}.{key}" for key in ("intensity_window", "missing_chunks")}


def _source(config: VolumeConfig, **place: Any) -> SourceConfig:
    return SourceConfig(
        **place,
        intensity_window=config.intensity_window,
        invert=config.invert,
        missing_chunks=config.missing_chunks,
    )


def _open_lr(config: VolumeConfig, hr: ZYX, scale: int, here: str) -> Source:
    """The LR volume that config.lr names. Raises UserError where its shape is not that of HR, y and x divided by
    `scale`.
    """
    assert config.lr is not None
    names = _keys(here) | {
        "url": f"{here}.lr",
        "mip": f"{here}.lr's level (the first)",
        "array": f"{here}.lr, with its path appended",
    }
    with reached(f"{here}.lr"):
        source = open_source(_source(config, url=config.lr), names, sized=False)
    found, wanted = source.info.bounds.shape, ZYX(hr.z, hr.y // scale, hr.x // scale)
    if found != wanted:
        raise UserError(
            f"LR {config.lr} is {tuple(found)}",
            f"{tuple(wanted)}, its HR divided by {scale} in y and x",
            "Name the LR of this HR volume",
        )
    return source


def _reader(source: Source, first: int) -> Read:
    """Reads of `source`, with z counted from its section `first`. They raise UserError where voxels cannot be had."""
    origin = source.info.bounds.start + ZYX(first, 0, 0)

    def read(z: slice, y: slice, x: slice) -> Uint8Array:
        box = Box(origin + ZYX(z.start, y.start, x.start), origin + ZYX(z.stop, y.stop, x.stop))
        try:
            return source.read(box)
        except (DataError, TransientError) as error:
            raise UserError(
                f"{source.info.url} cannot be read: {error}",
                "a volume that is there, without holes",
                "Mend it, leave those sections out, or state missing_chunks beside its url",
            ) from None

    return read


def _in_memory(read: Read, shape: tuple[int, int, int]) -> Read:
    whole = read(*(slice(0, n) for n in shape))
    return lambda z, y, x: whole[z, y, x]


def _middle(shape: tuple[int, int, int]) -> list[slice]:
    """The rows and columns of each section that are checked."""
    starts = [max(0, (n - SAMPLE) // 2) for n in shape[1:]]
    return [slice(start, min(n, start + SAMPLE)) for start, n in zip(starts, shape[1:], strict=True)]


def _digest_of(lr: Read, sections: list[int], shape: tuple[int, int, int], scale: int) -> str:
    """SHA-256 of the middle of the given LR sections; `shape` is that of HR."""
    middle = _middle((shape[0], shape[1] // scale, shape[2] // scale))
    total = hashlib.sha256()
    for z in sections:
        total.update(lr(slice(z, z + 1), *middle).tobytes())
    return total.hexdigest()


def _usable(
    read: Read, shape: tuple[int, int, int], bad: set[int], url: str, held: bool
) -> tuple[np.ndarray, list[str]]:
    """Per section, whether it is neither among the `bad` nor flat, and the SHA-256 of its voxels: all where the volume
    is `held` in memory, otherwise the middle, which is what is read.
    """
    middle = _middle(shape)
    good = np.zeros(shape[0], bool)
    digests = []
    highest = 0
    for z in range(shape[0]):
        sample = read(slice(z, z + 1), *middle)
        whole = read(slice(z, z + 1), slice(0, shape[1]), slice(0, shape[2])) if held else sample
        digests.append(hashlib.sha256(whole.tobytes()).hexdigest())
        good[z] = z not in bad and sample.std() >= FLAT
        highest = max(highest, int(sample.max()))
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
    return good, digests


def _check_correlation(config: VolumeConfig, wanted: np.ndarray, given: np.ndarray, z: int) -> None:
    """Raises UserError where the `given` LR of section z does not show the tissue of what its HR gives, `wanted`."""
    correlation = float(np.corrcoef(wanted.ravel(), given.ravel())[0, 1]) if given.std() > 0 else 0.0
    if correlation < MIN_CORRELATION:
        raise UserError(
            f"LR {config.lr} and HR {config.url} do not show the same (correlation {correlation:.2f} in section {z})",
            f"at least {MIN_CORRELATION}",
            "Align them",
        )
