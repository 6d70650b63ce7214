"""Neuroglancer precomputed volumes as levels to read. In their metadata x comes first."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.base.errors import SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.limits import MAX_MINISHARD_BITS
from pipeline.config.urls import local_path
from pipeline.storage import jpeg_xl
from pipeline.storage.sources.cloud_volume_array import SUFFIXES, chunk_names, open_by_cloud_volume
from pipeline.storage.sources.metadata import MAX_COORDINATE, Folder, Metadata
from pipeline.storage.sources.precomputed_jpeg_xl import open_jpeg_xl
from pipeline.storage.sources.precomputed_sharded_array import open_sharded
from pipeline.storage.sources.voxel_array import Level, VoxelArray, open_array

_DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32")
_IMAGES = ("raw", "jpeg", "png", "jxl")
_PACKAGES = {
    "fpzip": "fpzip",
    "kempressed": "fpzip",
    "zfpc": "zfpc",
    "compresso": "compresso",
    "crackle": "crackle-codec",
}
"""Encodings of cloud-volume's that are not read, with the packages that it needs for them."""
_SHARDING = (
    "@type",
    "preshift_bits",
    "hash",
    "minishard_bits",
    "shard_bits",
    "minishard_index_encoding",
    "data_encoding",
)
_MAX_ENTRIES = 10_000
"""File names of a scale among which a compression suffix is looked for."""


def find(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The scale that `mip` names; None where no info is at the url. Raises SourceError, TransientError."""
    info = folder.metadata("info")
    if info is None:
        return None
    kind = info.values.get("@type", "neuroglancer_multiscale_volume")
    if kind != "neuroglancer_multiscale_volume":
        raise info.wrong(
            "@type",
            "a volume (neuroglancer_multiscale_volume)",
            "Give the url of the image, not of annotations, meshes or skeletons",
        )
    if "scales" not in info:
        raise info.wrong("scales", "those of an image volume", "Give the url of the folder whose info has scales")
    if array is not None:
        raise SourceError(
            f"source.array is {array!r}, and {folder.url} is precomputed",
            "levels chosen by source.mip",
            "Take source.array away",
        )
    content = info.text("type", "image or segmentation").lower() if "type" in info else "image"
    if content not in ("image", "segmentation"):
        raise info.wrong("type", "image or segmentation")
    dtype = info.text("data_type").lower()
    if dtype not in _DTYPES:
        raise info.wrong("data_type", f"one of {', '.join(_DTYPES)}")
    if "num_channels" in info and info.integer("num_channels", low=1) != 1:
        raise info.wrong(
            "num_channels", "1: one grey volume, no colour image", "Store one channel as a volume of its own"
        )
    scales = info.children("scales")
    if mip >= len(scales):
        raise SourceError(
            f"{folder.url} has {len(scales)} level{'s' * (len(scales) > 1)}, source.mip is {mip}",
            f"0 to {len(scales) - 1}",
        )
    volume = {"type": content, "data_type": dtype, "num_channels": 1}
    return _level(folder, _with_numbers(scales[mip]), mip, info, volume)


def _with_numbers(scale: Metadata) -> Metadata:
    """The scale with numbers in place of the texts that Neuroglancer takes for them ("4.0")."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(v) for v in value]
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    keys = ("resolution", "size", "voxel_offset", "chunk_sizes")
    return Metadata(dict(scale.values) | {key: number(scale.values[key]) for key in keys if key in scale}, scale.place)


def _level(folder: Folder, scale: Metadata, mip: int, info: Metadata, volume: dict[str, Any]) -> Level:
    key = scale.text("key").strip("/")
    encoding = scale.text("encoding").lower()
    labels, dtype = volume["type"] == "segmentation", volume["data_type"]
    known = (*_IMAGES, "compressed_segmentation") if labels else _IMAGES
    if encoding not in known:
        package = f" (which needs pip install {_PACKAGES[encoding]})" if encoding in _PACKAGES else ""
        do = f"Copy it with cloud-volume{package}: vol.transfer_to(new_url, vol.bounds, encoding='raw')"
        raise scale.wrong("encoding", f"one of {', '.join(known)}", do)
    if encoding == "jxl" and dtype not in jpeg_xl.DTYPES:
        raise info.wrong("data_type", f"{' or '.join(jpeg_xl.DTYPES)} in JPEG XL")
    size = scale.integers("size", 3, low=1)
    offset = scale.integers("voxel_offset", 3, low=-MAX_COORDINATE) if "voxel_offset" in scale else [0, 0, 0]
    chunk = _chunk(scale)
    z, y, x = reversed(scale.numbers("resolution", 3, positive=True))
    sharding = _sharding(scale)
    place = f"{folder.url} scale {mip} ({key})"
    stored: dict[str, Any] = {
        "key": key,
        "size": size,
        "voxel_offset": offset,
        "chunk_size": chunk,
        "encoding": encoding,
    }
    if sharding is not None:
        stored["sharding"] = sharding
    if encoding == "compressed_segmentation":
        stored["compressed_segmentation_block_size"] = scale.integers("compressed_segmentation_block_size", 3, low=1)
    suffixed = sharding is None and _has_suffixes(folder.url, key)
    opener: Callable[[Level], VoxelArray] = open_array
    if suffixed:
        opener = functools.partial(open_by_cloud_volume, info=info.values, mip=mip, key=key)
    elif encoding == "jxl":
        opener = functools.partial(open_jpeg_xl, sharding=sharding, key=key)
    elif sharding is not None:
        opener = functools.partial(open_sharded, sharding=sharding, key=key)
    start = _zyx(offset)
    level = Level(
        url=folder.url,
        place=place,
        format="precomputed",
        # only this scale's metadata, as checked here: tensorstore refuses an info any of whose scales it cannot read
        spec={
            "driver": "neuroglancer_precomputed",
            "kvstore": folder.spec(),
            "multiscale_metadata": volume,
            "scale_metadata": stored | {"resolution": [x, y, z]},
            "assume_metadata": True,
        },
        zyx=(2, 1, 0),
        bounds=Box.at(start, _zyx(size)),
        chunk=_zyx(chunk),
        stored_chunk=tuple(chunk),
        dtype=dtype,
        voxel_size_nm=(z, y, x),
        identity=volume | stored,
        metadata_key="info",
        corner_voxels=(0.0, 0.0, 0.0),
        labels=labels,
        sharded=sharding is not None,
        reader="cloud-volume" if suffixed else "imagecodecs" if encoding == "jxl" else "tensorstore",
        opener=opener,
    )
    if suffixed or sharding is not None:
        return level
    return dataclasses.replace(level, explain_hole=lambda box: _refuse_suffixes(folder, level, key, box))


def _zyx(xyz: list[int]) -> ZYX:
    return ZYX.of(xyz[::-1])


def _chunk(scale: Metadata) -> list[int]:
    sizes = scale.values.get("chunk_sizes")
    if not isinstance(sizes, list) or not sizes:
        raise scale.wrong("chunk_sizes", "a list of chunk sizes [[x, y, z]]")
    return Metadata({"chunk_sizes": sizes[0]}, scale.place).integers("chunk_sizes", 3, low=1, high=2**31 - 1)


def _sharding(scale: Metadata) -> dict[str, Any] | None:
    if "sharding" not in scale:
        return None
    sharding = scale.child("sharding")
    if sharding.text("@type") != "neuroglancer_uint64_sharded_v1":
        raise sharding.wrong("@type", "neuroglancer_uint64_sharded_v1")
    if sharding.text("hash") not in ("identity", "murmurhash3_x86_128"):
        raise sharding.wrong("hash", "identity or murmurhash3_x86_128")
    for name in ("preshift_bits", "minishard_bits", "shard_bits"):
        sharding.integer(name, high=64)
    if sharding.integer("minishard_bits") > MAX_MINISHARD_BITS:
        raise sharding.wrong(
            "minishard_bits",
            f"at most {MAX_MINISHARD_BITS}: a shard's index is read whole, 16 bytes for each of its minishards",
            "Write the volume again with more shard_bits",
        )
    for name in ("minishard_index_encoding", "data_encoding"):
        if sharding.values.get(name, "raw") not in ("raw", "gzip"):
            raise sharding.wrong(name, "raw or gzip")
    return {name: sharding.values[name] for name in _SHARDING if name in sharding}


def _has_suffixes(url: str, key: str) -> bool:
    """Whether a local scale's chunk files end in a compression suffix, as cloud-volume writes them by default.

    tensorstore does not find such files. In object stores cloud-volume states the compression in a header instead,
    which tensorstore reads.
    """
    root = local_path(url)
    if root is None:
        return False
    try:
        with os.scandir(Path(root, key)) as entries:
            return any(entry.name.endswith(SUFFIXES) for entry in itertools.islice(entries, _MAX_ENTRIES))
    except OSError:
        return False


def _refuse_suffixes(folder: Folder, level: Level, key: str, box: Box) -> None:
    """Raises SourceError where the first chunk of `box` is stored under a name with a compression suffix."""
    name = next(chunk_names(level, box))
    for suffix in SUFFIXES:
        if folder.data(f"{key}/{name}{suffix}") is not None:
            saw = f"{level.place} has its chunks under names ending in {suffix}, as cloud-volume writes local files"
            raise SourceError(
                saw,
                "names without a suffix, or such a volume by its local path",
                "Copy it with igneous or cloud-files, which write plain names",
            )
