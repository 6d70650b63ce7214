"""Zarr v2 and v3 arrays and groups, OME-Zarr among them, as levels to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from pipeline.base.errors import EmsrError, SourceError
from pipeline.base.geometry import ZYX, Box
from pipeline.storage.sources import ome_multiscales, webknossos, zarr_attributes
from pipeline.storage.sources.axes import find_zyx
from pipeline.storage.sources.metadata import Folder, Metadata, inner_path
from pipeline.storage.sources.ome_multiscales import OmeLevel
from pipeline.storage.sources.voxel_array import Level
from pipeline.storage.sources.zarr_attributes import Place
from pipeline.storage.sources.zarr_chunk_keys import ChunkKeys, refuse_other_names, stored_separator
from pipeline.storage.sources.zarr_codecs import Stored, stored_v2, stored_v3
from pipeline.storage.sources.zarr_decoded_array import open_decoded
from pipeline.storage.sources.zarr_group import no_image


@dataclass(frozen=True)
class _Node:
    """A group (array is None) or an array, in either version. `document` is the zarr.json of Zarr v3."""

    version: int
    path: str
    array: Metadata | None
    attributes: Metadata
    document: Metadata | None = None


def find_v3(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The level that `mip` or `array` names; None where no Zarr v3 is at the url.

    Raises SourceError, TransientError.
    """
    return _find(folder, 3, mip, array)


def find_v2(folder: Folder, mip: int, array: str | None) -> Level | None:
    """The same for Zarr v2."""
    return _find(folder, 2, mip, array)


def _find(folder: Folder, version: int, mip: int, array: str | None) -> Level | None:
    root = _node(folder, "", version)
    if array is not None:
        return _named(folder, root, version, mip, array)
    if root is None:
        return None
    if root.array is not None:
        _only_level(mip, folder.url)
        level = _level(folder, root, None)
        return level if level.voxel_size_nm is not None else _told_of_group(level, version)
    levels = ome_multiscales.multiscales(root.attributes)
    if levels is None:
        raise no_image(folder, "", root.attributes, root.document)
    chosen = ome_multiscales.pick(levels, mip, folder.url)
    saw = f"the multiscales of {folder.url} name {chosen.path}"
    return _level(folder, _array(_inner(folder, version, chosen.path), saw, version), chosen, root.attributes)


def _named(folder: Folder, root: _Node | None, version: int, mip: int, array: str) -> Level | None:
    if root is not None and root.array is not None:
        raise SourceError(
            f"source.array is {array!r}, and {folder.url} is an array itself",
            "one of the two",
            "Take source.array away",
        )
    path = inner_path(array, SourceError(f"source.array is {array!r}", "a path inside the group"))
    node = _inner(folder, version, path) if root is not None else _node(folder, path, version)
    if root is None and node is None:
        return None
    if mip:
        raise SourceError(
            f"source.array is {array!r} and source.mip is {mip}", "one of the two: both choose a level", "Take one away"
        )
    node = _array(node, f"source.array is {array!r}", version)
    *above, _ = path.split("/")
    for depth in reversed(range(len(above) + 1)):
        prefix = "/".join(above[:depth])
        group = root if depth == 0 else _inner(folder, version, prefix)
        if group is None or group.array is not None:
            continue
        try:
            for named in ome_multiscales.multiscales(group.attributes) or []:
                if f"{prefix}/{named.path}".strip("/") == path:
                    return _level(folder, node, named, group.attributes)
        except SourceError as error:
            level = _level(folder, node, None)
            return dataclasses.replace(
                level, notes=(*level.notes, f"its group's multiscales are not used: {error.saw}")
            )
    return _level(folder, node, None)


def _told_of_group(level: Level, version: int) -> Level:
    """The level of an array that has the url itself, with a word on the multiscales of the group around it."""
    above, below = level.url, ""
    for _ in range(2):
        above, _, name = above.rpartition("/")
        below = f"{unquote(name)}/{below}".rstrip("/")
        if not above.partition("://")[2].strip("/"):
            return level
        try:
            group = _node(Folder(above), "", version)
            levels = ome_multiscales.multiscales(group.attributes) if group is not None else None
        except EmsrError:  # what is above the volume is read for a word alone
            return level
        if any(found.path == below for found in levels or ()):
            told = f"the multiscales of {above} state its place: give that as source.url, with source.array: {below}"
            return dataclasses.replace(level, seen=told, notes=(*level.notes, told))
    return level


def _only_level(mip: int, place: str) -> None:
    if mip:
        raise SourceError(f"{place} has 1 level, source.mip is {mip}", "0")


def _inner(folder: Folder, version: int, path: str) -> _Node | None:
    """The node at `path`, of `version` or else of the other one: a group may hold arrays of both."""
    return _node(folder, path, version) or _node(folder, path, 5 - version)


def _array(node: _Node | None, saw: str, version: int) -> _Node:
    if node is None:
        raise SourceError(
            f"{saw}, and no Zarr v{version} array is there",
            "an array",
            "Check the name; if the copy is unfinished, finish it",
        )
    if node.array is None:
        raise SourceError(
            f"{saw}, and that is a group",
            "an array",
            "Append it to source.url, or name an array inside it by source.array",
        )
    return node


def _node(folder: Folder, path: str, version: int) -> _Node | None:
    base = f"{path}/" if path else ""
    nothing = Metadata({}, folder.url)
    if version == 3:
        found = folder.metadata(f"{base}zarr.json")
        if found is None:
            return None
        if found.integer("zarr_format") != 3:
            raise found.wrong("zarr_format", "3 in a zarr.json")
        kind = found.text("node_type", "array or group")
        if kind not in ("array", "group"):
            raise found.wrong("node_type", "array or group")
        own = found.child("attributes") if "attributes" in found else nothing
        return _Node(3, path, found if kind == "array" else None, own, found)
    found = folder.metadata(f"{base}.zarray")
    attributes = folder.metadata(f"{base}.zattrs")
    if found is None and attributes is None and folder.metadata(f"{base}.zgroup") is None:
        return None
    if found is not None and found.integer("zarr_format") != 2:
        raise found.wrong("zarr_format", "2 in a .zarray")
    return _Node(2, path, found, attributes or nothing)


def _level(folder: Folder, node: _Node, ome: OmeLevel | None, group: Metadata | None = None) -> Level:
    """The level of an array; `ome` is its dataset in the multiscales of a group with the attributes `group`."""
    found = node.array
    assert found is not None
    shape = found.integers("shape", low=1)
    stored = stored_v3(found, len(shape)) if node.version == 3 else stored_v2(found, len(shape))
    names = _names(node, ome, len(shape))
    if ome is not None and ome.names:
        _refuse_other_names(found, names, ome)
        names = ome.names
    knossos = webknossos.look(folder, node.path, len(shape)) if ome is None else None
    if knossos is not None and names is None:
        names = knossos[0]
    zyx = find_zyx(names, shape, found.place)
    base = f"{node.path}/" if node.path else ""
    keys = ChunkKeys(base, stored.prefix, stored.separator, tuple(stored.stored_object), zyx)
    notes = list[str]()
    if node.version == 2:
        separator = stored_separator(folder.holds, keys, shape)
        if separator != keys.separator:
            notes.append(f'its chunks are named with "{separator}", its .zarray says "{keys.separator}"')
        keys = dataclasses.replace(keys, separator=separator)
    place = _place(node.attributes, zyx, len(shape), ome)
    if knossos is not None and place == Place():
        place = knossos[1]
    chain = stored.chain
    level = Level(
        url=folder.url,
        place=f"{folder.url}/{node.path}".rstrip("/"),
        format=f"zarr{node.version}",
        spec=_spec(folder, node, stored, keys),
        zyx=zyx,
        bounds=Box(ZYX(0, 0, 0), ZYX.of([shape[axis] for axis in zyx])),
        chunk=ZYX.of([stored.chunk[axis] for axis in zyx]),
        stored_chunk=tuple(stored.chunk),
        dtype=stored.dtype,
        voxel_size_nm=place.size_nm,
        unitless=place.unitless,
        corner_voxels=place.corner_voxels,
        seen=place.seen,
        notes=(*notes, *place.notes),
        labels=any("image-label" in held for held in (node.attributes, group) if held is not None),
        identity={
            k: v for k, v in found.values.items() if k not in ("attributes", "consolidated_metadata", "dimension_names")
        },
        sharded=any(codec["name"] == "sharding_indexed" for codec in stored.metadata.get("codecs", ())),
        fill_value=found.values.get("fill_value"),
        metadata_key=base + ("zarr.json" if node.version == 3 else ".zarray"),
        explain_hole=lambda box: refuse_other_names(folder, keys, box),
    )
    if chain is None:
        return level
    return dataclasses.replace(level, reader="numcodecs", opener=lambda opened: open_decoded(opened, chain, keys.at))


def _spec(folder: Folder, node: _Node, stored: Stored, keys: ChunkKeys) -> dict[str, object]:
    metadata = stored.metadata if node.version == 3 else stored.metadata | {"dimension_separator": keys.separator}
    driver = "zarr3" if node.version == 3 else "zarr"
    return {"driver": driver, "kvstore": folder.spec(node.path), "metadata": metadata, "assume_metadata": True}


def _place(attributes: Metadata, zyx: tuple[int, int, int], rank: int, ome: OmeLevel | None) -> Place:
    """Voxel size and position by the multiscales where they state a size, else by the array's own attributes."""
    own = zarr_attributes.place(attributes, zyx, rank)
    if ome is not None and own == Place():
        own = zarr_attributes.place(ome.dataset, zyx, rank)
    size = ome.size_nm(zyx) if ome is not None else None
    if ome is None or (size is None and own.size_nm is not None):
        return own
    return Place(size, None, ome.corner_voxels(zyx), ome.seen(zyx))


def _refuse_other_names(found: Metadata, names: Sequence[str | None] | None, ome: OmeLevel) -> None:
    """Raises SourceError where the array calls another axis z, y or x than the multiscales do, or has other axes."""
    do = "Name the array by source.array, with source.voxel_size_nm, or mend one of the two"
    rank = len(found.integers("shape"))
    if rank != len(ome.names):
        raise SourceError(
            f"{found.place} has {rank} axes, the multiscales name {list(ome.names)}", "a name for every axis", do
        )
    for name, stated in zip(names or (), ome.names, strict=False):
        if name is not None and name.lower() in ("z", "y", "x") and name.lower() != stated:
            raise SourceError(
                f"{found.place} names its axes {list(names or ())}, the multiscales say {list(ome.names)}",
                "the same names",
                do,
            )


def _names(node: _Node, ome: OmeLevel | None, rank: int) -> Sequence[str | None] | None:
    """The names of the axes: dimension_names of Zarr v3, in Zarr v2 the attribute that xarray writes, else those that
    other tools write. None without.
    """
    holder, key = (node.array, "dimension_names") if node.version == 3 else (node.attributes, "_ARRAY_DIMENSIONS")
    if holder is None or key not in holder or holder.values[key] == [None] * rank:
        own = zarr_attributes.axis_names(node.attributes, rank)
        return own if own is not None or ome is None else zarr_attributes.axis_names(ome.dataset, rank)
    value = holder.values[key]
    if not isinstance(value, list) or len(value) != rank or not all(v is None or isinstance(v, str) for v in value):
        raise holder.wrong(key, f"{rank} names")
    return value
