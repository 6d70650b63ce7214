"""Opens source volumes and masks: finds which format a url holds, and checks that its voxels can be super-resolved."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import numpy as np

from pipeline.base.errors import SourceError, TransientError, UserError
from pipeline.base.waits import waiting
from pipeline.config import access
from pipeline.config.urls import local_path, normalise, split_format
from pipeline.config.volume import FillConfig, MaskConfig, SourceConfig
from pipeline.storage import kv
from pipeline.storage.sources import grey_values, n5_volume, other_folder, precomputed_volume, zarr_volume
from pipeline.storage.sources.absent_answer import refuse_server
from pipeline.storage.sources.metadata import Folder, fingerprint
from pipeline.storage.sources.uint8_source import VolumeSource
from pipeline.storage.sources.voxel_array import Level, Voxels
from pipeline.storage.volume import Source, Uint8Array, VolumeInfo

# A new format gets a module with such a function, an entry here and in _WANTED, a prefix in config/urls.py,
# and a reader of what Neuroglancer makes of it in viewer/data_source.py.
_FINDERS: dict[str, Callable[[Folder, int, str | None], Level | None]] = {
    "precomputed": precomputed_volume.find,
    "zarr3": zarr_volume.find_v3,
    "zarr2": zarr_volume.find_v2,
    "n5": n5_volume.find,
}
_FORCED: dict[str | None, tuple[str, ...]] = {None: tuple(_FINDERS), "zarr": ("zarr3", "zarr2")} | {
    name: (name,) for name in _FINDERS
}
_WANTED = {
    "precomputed": "an info file",
    "zarr3": "a zarr.json",
    "zarr2": "a .zarray, or a .zattrs with multiscales",
    "n5": "an attributes.json, or folders s0 and s1",
}
_METADATA_FILES = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata", "attributes.json", "info")
_SAME = 1e-3
_KEY = re.compile(r"(?<![\w/.])source\.(\w+)")
"""A key of volume.yaml in a message, not in a path."""
_MASK_KEYS = {name: f"source.mask.{name}" for name in ("url", "mip", "missing_chunks")}


def open_source(config: SourceConfig, keys: Mapping[str, str] = MappingProxyType({}), sized: bool = True) -> Source:
    """The volume of `config.url`. Reads metadata only, but where a window is wanted that the error can propose.

    `keys` has, by key of volume.yaml's source, what messages call it where the file is another one. `sized` says that a
    voxel size is needed. Raises SourceError, TransientError.
    """
    missing = keys.get("missing_chunks", "source.missing_chunks")
    with _named(keys):
        url = _absolute(config.url)
        access.use(url, config.access)
        level = _find(url, config.mip, config.array)
        to_uint8 = grey_values.mapping(level, config.intensity_window, config.invert)
        any_size = level.voxel_size_nm or (1.0, 1.0, 1.0)
        size = _voxel_size(level, config.voxel_size_nm, "source.voxel_size_nm") if sized else any_size
        info = dataclasses.replace(_info(level, size), unstored=_unstored(level, to_uint8))
        fill = config.missing_chunks.fill if isinstance(config.missing_chunks, FillConfig) else None
        refuse_server(level, fill, missing)
        return VolumeSource(info, level, level.opener(level), to_uint8, fill, key=missing)


def open_scored(
    url: str, window: grey_values.Window | None, invert: bool, fill: int | None, keys: Mapping[str, str]
) -> Source:
    """A volume that is compared with another: `window` is not for uint8, and a voxel size is not needed.

    `keys` has, by key of volume.yaml's source, what messages call it. Raises SourceError, TransientError.
    """
    with _named(keys):
        level = _find(_absolute(url), 0, None)
        to_uint8 = grey_values.mapping(level, None if level.dtype == "uint8" else window, invert)
        info = _info(level, level.voxel_size_nm or (1.0, 1.0, 1.0))
        refuse_server(level, fill, keys["missing_chunks"])
        return VolumeSource(info, level, level.opener(level), to_uint8, fill, key=keys["missing_chunks"])


def open_mask(config: MaskConfig, like: VolumeInfo, keys: Mapping[str, str] = _MASK_KEYS) -> Source:
    """A mask over the volume `like`. Its `read` returns 1 where the stored value (bool or integer) is not zero, else 0.

    A mask without a voxel size has the extent of `like`. One that states the same position of the first voxel's centre
    as `like` begins at the same corner, as most writers of coarser levels mean it. `keys` is as in `open_scored`.
    Raises SourceError, TransientError.
    """
    url = _absolute(config.url)
    access.use(url, config.access)
    with _named(keys):
        level = _find(url, config.mip, None)
    if level.dtype != "bool" and np.dtype(level.dtype).kind not in "iu":
        raise SourceError(
            f"mask {level.place} holds {level.dtype}", "bool or whole numbers", "Store it as uint8 of 0 and 1"
        )
    info = _info(level, level.voxel_size_nm or _same_extent(level, like))
    centres = [[c + v / 2 for c, v in zip(i.corner_nm, i.voxel_size_nm, strict=True)] for i in (info, like)]
    if level.voxel_size_nm is None or all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(*centres, strict=True)):
        info = dataclasses.replace(info, corner_nm=like.corner_nm)
    info = dataclasses.replace(info, unstored=_unstored(level, _non_zero))
    fill = config.missing_chunks.fill if isinstance(config.missing_chunks, FillConfig) else None
    refuse_server(level, fill, keys["missing_chunks"])
    return VolumeSource(info, level, level.opener(level), _non_zero, fill, key=keys["missing_chunks"])


@contextmanager
def reached(key: str) -> Iterator[None]:
    """Within the block, a store that does not answer is a mistake in the url that `key` names."""
    try:
        yield
    except TransientError as error:
        raise SourceError(f"{key} cannot be reached: {error}", "", "Check the url and the network") from None


@contextmanager
def _named(keys: Mapping[str, str]) -> Iterator[None]:
    """Within the block, messages about keys of volume.yaml's source name those of `keys` in their place."""

    def name(found: re.Match[str]) -> str:
        return keys.get(found[1], found[0])

    try:
        yield
    except SourceError as error:
        raise SourceError(*(_KEY.sub(name, part) for part in (error.saw, error.wanted, error.do))) from None


def _same_extent(level: Level, like: VolumeInfo) -> tuple[float, float, float]:
    z, y, x = (v * n / m for v, n, m in zip(like.voxel_size_nm, like.bounds.shape, level.bounds.shape, strict=True))
    return (z, y, x)


def _absolute(url: str) -> str:
    try:
        return normalise(url, Path.cwd())
    except UserError as error:
        raise SourceError(error.saw, error.wanted, error.do) from None


def _find(url: str, mip: int, array: str | None) -> Level:
    """The level at `url`, of the first format that recognises it, or of the one that a format prefix names."""
    kind, bare = split_format(url)
    path = local_path(bare)
    if path is not None:
        _check_path(path, bare)
    folder = Folder(bare)
    for name in _FORCED[kind]:
        level = _FINDERS[name](folder, mip, array)
        if level is not None:
            return level
    if folder.refused is not None:
        raise folder.refused
    wanted = " or ".join(_WANTED[name] for name in _FORCED[kind])
    saw, do = f"no volume is at source.url {bare}", "Check the url, and the format before :// if one is given"
    inside = other_folder.instead(path) if path is not None else None
    if inside is not None:
        saw, do = f"{saw}. {inside[0]}", inside[1]
    raise SourceError(saw, wanted, do)


def _check_path(path: Path, url: str) -> None:
    """Raises SourceError where no folder is at this path."""
    wanted = "the folder of a Zarr, N5 or precomputed volume"
    try:
        kv.refuse_special(path)
    except UserError as error:
        raise SourceError(f"source.url: {error.saw}", wanted, error.do) from None
    with waiting(url):
        is_file, exists = path.is_file(), path.exists()
    if is_file:
        raise SourceError(f"source.url {url} is a file", wanted, _instead_of(path))
    if not exists:
        raise SourceError(f"nothing is at source.url {url}", wanted, "Check the path")


def _instead_of(file: Path) -> str:
    """What to do where a file was named."""
    if file.name in _METADATA_FILES:
        return f"Give the folder that it lies in, {file.parent}"
    if file.suffix.lower() == ".zip":
        return "Unpack it, and give the folder that comes out"
    return (
        "TIFF and PNG sections are brought in by python -m pipeline.convert; copy an array of another file, such as "
        "HDF5 or MRC, into a Zarr with zarr-python"
    )


def _unstored(level: Level, to_uint8: grey_values.ToUint8) -> int | None:
    """The grey value of the level's own fill value; None where that is none, such as NaN."""
    try:
        stored = np.full((1, 1, 1), np.dtype(level.dtype).type(level.fill_value or 0))
    except (TypeError, ValueError, OverflowError):
        return None
    return None if np.isnan(stored).any() else int(to_uint8(stored)[0, 0, 0])


def _non_zero(voxels: Voxels) -> Uint8Array:
    return np.not_equal(voxels, 0).astype(np.uint8)


def _voxel_size(level: Level, given: tuple[float, float, float] | None, key: str) -> tuple[float, float, float]:
    """The stored or the given voxel size (z, y, x) in nm. Raises SourceError where there is none, or the two differ."""
    stored = level.voxel_size_nm
    if stored is not None:
        if given is not None and not all(math.isclose(a, b, rel_tol=_SAME) for a, b in zip(stored, given, strict=True)):
            saw = f"{key} is {list(given)}, the metadata of {level.place} says {list(stored)} nm"
            raise SourceError(saw, "one voxel size", f"Take {key} away, or mend the metadata")
        return stored
    if given is None:
        seen = f" ({level.seen})" if level.seen else ""
        raise SourceError(
            f"the metadata of {level.place} has no voxel size with a unit of length{seen}",
            "one in nm",
            f"Give {key}: [z, y, x]"
            if level.unitless is None
            else f"If that is nm, give {key}: {list(level.unitless)}",
        )
    return given


def _info(level: Level, size: tuple[float, float, float]) -> VolumeInfo:
    at, notes = level.corner_voxels, level.notes
    if at is not None and level.unitless is not None and any(at):
        ratios = [s / u for s, u in zip(size, level.unitless, strict=True)]
        if not all(math.isclose(ratio, ratios[0], rel_tol=_SAME) for ratio in ratios):
            at, notes = (
                None,
                (*notes, f"its position is not taken: {level.seen}, and the voxel size is {list(size)} nm"),
            )
    corner = tuple(_rounded(c * s) for c, s in zip(at or (0.0, 0.0, 0.0), size, strict=True))
    return VolumeInfo(
        url=level.url,
        format=level.format,
        bounds=level.bounds,
        voxel_size_nm=(_rounded(size[0]), _rounded(size[1]), _rounded(size[2])),
        corner_nm=(corner[0], corner[1], corner[2]),
        dtype=level.dtype,
        chunk_shape=level.chunk,
        fingerprint=fingerprint({"format": level.format, "zyx": level.zyx, "voxels": level.identity}),
        reader=level.reader,
        sized=level.voxel_size_nm is not None,
        placed=at is not None,
        notes=tuple(f"{level.place}: {note}" for note in notes),
        zyx=level.zyx,
    )


def _rounded(value: float) -> float:
    """Rounded to 12 digits, without the rounding errors of unit conversions: 37.00000000000001 becomes 37."""
    return float(f"{value:.12g}") + 0.0
