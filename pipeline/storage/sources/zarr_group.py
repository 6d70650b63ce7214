"""What a Zarr group that is no image holds, so that a refusal can name what to take in its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.base.errors import SourceError
from pipeline.config.urls import local_path
from pipeline.storage.sources.metadata import Folder, Metadata

_SHOWN = 5
_MAX_ENTRIES = 2000
"""Entries of local folders among which arrays are looked for."""
_MAX_DEPTH = 5


def no_image(folder: Folder, path: str, attributes: Metadata, group: Metadata | None) -> SourceError:
    """The refusal of the group at `path` without multiscales; `group` is its zarr.json, in Zarr v3."""
    place = f"{folder.url}/{path}".rstrip("/")
    ome = attributes.values.get("ome") if isinstance(attributes.values.get("ome"), dict) else attributes.values
    assert isinstance(ome, dict)
    if "bioformats2raw.layout" in ome:
        return SourceError(
            f"{place} is a collection of images, as bioformats2raw writes it", "one image", _append(place, "0")
        )
    if "plate" in ome:
        well = _first_path(ome["plate"], "wells") or "A/1"
        return SourceError(f"{place} is a plate with many images", "one image", _append(place, f"{well}/0"))
    if "well" in ome:
        image = _first_path(ome["well"], "images") or "0"
        return SourceError(f"{place} is a well of a plate", "one image", _append(place, image))
    if isinstance(ome.get("labels"), list):
        return SourceError(
            f"{place} is a group of labels {ome['labels'][:_SHOWN]}",
            "an image",
            "Give the url of the EM image, not of its labels",
        )
    found = _arrays(folder, path, group)
    if not found:
        return SourceError(
            f"{place} is a Zarr group without multiscales",
            "an array or an OME-Zarr image",
            "Name an array inside it by source.array, or append its path to source.url",
        )
    more = " and more" if len(found) > _SHOWN else ""
    return SourceError(
        f"{place} is a Zarr group without multiscales. Its arrays: {', '.join(found[:_SHOWN])}{more}",
        "an array or an OME-Zarr image",
        f"Name one by source.array: {found[0]}",
    )


def _append(place: str, path: str) -> str:
    return f"Append it to source.url, as in {place}/{path}"


def _first_path(holder: Any, key: str) -> str | None:
    entries = holder.get(key) if isinstance(holder, dict) else None
    first = entries[0] if isinstance(entries, list) and entries else None
    path = first.get("path") if isinstance(first, dict) else None
    return path.strip("/") if isinstance(path, str) else None


def _arrays(folder: Folder, path: str, group: Metadata | None) -> list[str]:
    """The paths, below the volume, of arrays in the group, those of three axes and more first: by its consolidated
    metadata, or as local folders have them. Object stores are not listed: that takes as long as there are chunks.
    """
    base = f"{path}/" if path else ""
    if group is not None:
        held = group.values.get("consolidated_metadata")
        inside = held.get("metadata") if isinstance(held, dict) else None
        found = inside if isinstance(inside, dict) else {}
    else:
        found = {k: v for k, v in _consolidated(folder, f"{base}.zmetadata").items() if k.endswith("/.zarray")}
    ranks = {key.removesuffix("/.zarray"): rank for key, held in found.items() if (rank := _rank(held)) is not None}
    root = local_path(folder.url)
    if not ranks and root is not None:
        ranks = dict(_local_arrays(root / path))
    return [f"{base}{name}" for name in sorted(ranks, key=lambda name: (ranks[name] < 3, name))]


def _rank(document: Any) -> int | None:
    """The number of axes in a .zarray, or in the zarr.json of an array."""
    shape = document.get("shape") if isinstance(document, dict) else None
    return len(shape) if isinstance(shape, list) else None


def _consolidated(folder: Folder, key: str) -> dict[str, Any]:
    try:
        found = folder.metadata(key)
    except SourceError:
        return {}
    inside = found.values.get("metadata") if found is not None else None
    return inside if isinstance(inside, dict) else {}


def _local_arrays(root: Path) -> Iterator[tuple[str, int]]:
    looked = 0
    for folder, below, files in os.walk(root):
        looked += len(below) + len(files)
        path = Path(folder)
        document = next((path / name for name in ("zarr.json", ".zarray") if name in files), None)
        rank = _local_rank(document) if document is not None and path != root else None
        if rank is not None:
            yield path.relative_to(root).as_posix(), rank
        if rank is not None or len(path.relative_to(root).parts) >= _MAX_DEPTH or looked > _MAX_ENTRIES:
            below.clear()
        below.sort()


def _local_rank(path: Path) -> int | None:
    try:
        return _rank(Metadata.parse(path.read_bytes(), str(path)).values)
    except (OSError, SourceError):
        return None
