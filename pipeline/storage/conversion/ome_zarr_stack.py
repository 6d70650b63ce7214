"""Writes a stack of sections as an OME-Zarr 0.5 volume of one level, a layer of shards at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from zarr.codecs import BloscCodec
from zarr.storage import MemoryStore

from pipeline.base.errors import DiskError, EmsrError, SourceError, TargetError, UserError
from pipeline.base.geometry import ZYX
from pipeline.config.urls import local_path
from pipeline.storage import kv
from pipeline.storage.conversion.section_files import Stack
from pipeline.storage.targets.open import is_empty

CHUNK = ZYX(8, 256, 256)
"""The default chunk shape in voxels."""
SHARD_SIDE = 4096
"""Voxels up to which a shard extends in y and x."""
READERS = 4
"""Threads that read sections."""
LEVEL = "0"
"""The array's path in the group."""

Nm = tuple[float, float, float]


def layer_shapes(shape: ZYX, chunk: ZYX | None) -> tuple[ZYX, ZYX]:
    """(chunk, shard) in voxels for a volume of `shape`. Neither is larger than the volume needs.

    A shard is one chunk deep, and in y and x whole chunks up to SHARD_SIDE.
    """
    chunk = (chunk or CHUNK).minimum(shape)
    max_chunks = ZYX(1, max(1, SHARD_SIDE // chunk.y), max(1, SHARD_SIDE // chunk.x))
    return chunk, chunk * shape.ceil_div(chunk).minimum(max_chunks)


def write_stack(
    stack: Stack,
    url: str,
    voxel_size_nm: Nm,
    chunk: ZYX | None = None,
    attributes: Mapping[str, Any] | None = None,
    on_sections: Callable[[int], None] | None = None,
) -> None:
    """Write `stack` to `url`, where nothing may be stored yet; at most chunk.z sections are held in memory.

    The volume's lower corner lies at 0 nm. `attributes` are added to the group's.
    `on_sections` is called with the number of sections stored so far. The group's metadata are written last, so that
    readers find no OME-Zarr before it is whole. Raises TargetError where something is stored already, SourceError where
    a section cannot be read, and what kv.classify_write makes of the store's errors.
    """
    _refuse_unless_fits(stack, layer_shapes(stack.shape, chunk)[0].z)
    _refuse_unless_empty(url)
    objects = _metadata(stack, voxel_size_nm, layer_shapes(stack.shape, chunk), attributes or {})
    root = objects.pop("zarr.json")
    store = kv.Store(url)
    try:
        store.put_all(objects)
    except DiskError as error:
        raise TargetError(str(error), "a folder that takes files", "Check the path") from None
    depth = layer_shapes(stack.shape, chunk)[0].z
    try:
        where = kv.spec(f"{url}/{LEVEL}")
        # Chunks equal to the fill value are stored too: a chunk that is not there means damage.
        array = ts.open(
            {"driver": "zarr3", "kvstore": where, "store_data_equal_to_fill_value": True},
            open=True,
            write=True,
            context=kv.context(),
        ).result()
        with ThreadPoolExecutor(READERS) as pool:
            for z in range(0, stack.shape.z, depth):
                stop = min(z + depth, stack.shape.z)
                layer = np.empty((stop - z, stack.shape.y, stack.shape.x), stack.dtype)
                with kv.waiting_for_voxels(f"sections {z} to {stop - 1} of the source", layer.nbytes):
                    for row, section in zip(layer, pool.map(stack.read, range(z, stop)), strict=True):
                        row[:] = section
                with kv.waiting_for_voxels(f"writing {url}", layer.nbytes):
                    array[z:stop].write(layer, can_reference_source_data_indefinitely=True).result()
                if on_sections:
                    on_sections(stop)
    except EmsrError:
        raise
    except Exception as error:
        fault = kv.classify_write(error, f"writing {url}")
        if isinstance(fault, UserError):
            fault = type(fault)(fault.saw, "", f"Mend that, delete {url}, then run the same command again")
        raise fault from error
    store.put("zarr.json", root)


def _refuse_unless_fits(stack: Stack, depth: int) -> None:
    """Raises SourceError where a layer of chunks, and the sections being read, are more than this machine's memory."""
    section = stack.shape.y * stack.shape.x * np.dtype(stack.dtype).itemsize
    needed, memory = (depth + READERS) * section, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise SourceError(
            f"sections of {stack.shape.y} x {stack.shape.x} {stack.dtype} take {needed / 1e9:,.0f} GB, {depth} at a "
            f"time, and this machine has {memory / 1e9:,.0f} GB",
            "what fits its memory",
            "Give --chunk a smaller z, or check the files: their headers may be damaged",
        )


def _refuse_unless_empty(url: str) -> None:
    path = local_path(url)
    shown = str(path) if path else url
    file = next((at for at in (path, *path.parents) if at.is_file()), None) if path is not None else None
    if file is not None:
        raise TargetError(f"{file} is a file", "a folder that does not exist yet, or is empty", "Give another target")
    if is_empty(url):
        return
    store = kv.Store(url)
    unfinished = store.get(f"{LEVEL}/zarr.json") is not None and store.get("zarr.json") is None
    saw = "holds a conversion that did not finish" if unfinished else "is not empty"
    raise TargetError(
        f"{shown} {saw}",
        "a folder that does not exist yet, or is empty",
        "Nothing was touched: remove it yourself, or give another target",
    )


def _metadata(
    stack: Stack, voxel_size_nm: Nm, shapes: tuple[ZYX, ZYX], attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """The metadata objects, key -> bytes, as zarr-python writes them.

    NGFF's translation is the centre of the first voxel.
    """
    chunk, shard = shapes
    centre = [size / 2 for size in voxel_size_nm]
    steps = [{"type": "scale", "scale": list(voxel_size_nm)}, {"type": "translation", "translation": centre}]
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    multiscale = {"name": "sections", "axes": axes, "datasets": [{"path": LEVEL, "coordinateTransformations": steps}]}
    held: dict[str, Any] = {}
    group = zarr.create_group(
        MemoryStore(held),
        zarr_format=3,
        attributes={"ome": {"version": "0.5", "multiscales": [multiscale]}, **attributes},
    )
    group.create_array(
        LEVEL,
        shape=tuple(stack.shape),
        dtype=stack.dtype,
        chunks=tuple(chunk),
        shards=tuple(shard),
        compressors=BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=np.dtype(stack.dtype).itemsize),
        fill_value=0,
        dimension_names=("z", "y", "x"),
    )
    return {key: value.to_bytes() for key, value in held.items()}
