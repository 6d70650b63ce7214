"""What of a Zarr array that emsr reads Neuroglancer does not: it wants keys, types and codecs that others leave out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.storage.sources.zarr_chunk_keys import ChunkKeys, stored_separator

_LEVELS = {"zlib", "gzip", "zstd"}
_CODECS = {"bytes", "transpose", "blosc", "gzip", "zstd", "crc32c", "sharding_indexed"}


def unreadable(kind: str, path: str, array: dict[str, Any], get: Callable[[str], bytes | None]) -> str | None:
    """Why Neuroglancer cannot show the array with this metadata at `path`, as words that follow "does not read"; None
    where no reason is known. `get` returns stored objects.
    """
    return _unreadable_v3(array) if kind == "zarr3" else _unreadable_v2(path, array, get)


def _unreadable_v2(path: str, array: dict[str, Any], get: Callable[[str], bytes | None]) -> str | None:
    compressor = array.get("compressor") or {}
    name = compressor.get("id")
    if name is not None and name not in _LEVELS and name != "blosc":
        return f"compression {name}"
    if array.get("filters"):
        return "filters"
    absent = [key for key in ("order", "compressor", "fill_value", "chunks") if key not in array]
    if absent:
        return f"a .zarray without {absent[0]}"
    wanted = ("cname", "clevel", "shuffle") if name == "blosc" else ("level",) if name in _LEVELS else ()
    for key in wanted:
        value = compressor.get(key)
        if isinstance(value, bool) or not isinstance(value, str if key == "cname" else int):
            return f"{name} with {key} {value}"
    if not _fill(array["fill_value"], str(array.get("dtype"))[1:2] == "f") and array["fill_value"] is not None:
        return f"the fill_value {array['fill_value']}"
    separator = array.get("dimension_separator") or "."
    shape = tuple(array["chunks"])
    keys = ChunkKeys(f"{path}/" if path else "", "", separator, shape, (0, 1, 2))
    found = stored_separator(lambda key: get(key) is not None, keys, array["shape"])
    return None if found == separator else f'chunks named with "{found}" where .zarray says "{separator}"'


def _unreadable_v3(array: dict[str, Any]) -> str | None:
    if "data_type" in array and not isinstance(array["data_type"], str):
        return "a data_type that is no text"
    for codec in array.get("codecs") or []:
        name = codec.get("name") if isinstance(codec, dict) else None
        if name not in _CODECS:
            return f"the codec {name or codec}"
    if "fill_value" in array and not _fill(array["fill_value"], str(array.get("data_type")).startswith("float")):
        return f"the fill_value {array['fill_value']}"
    return None


def _fill(value: object, floats: bool) -> bool:
    if floats and (isinstance(value, float) or value in ("NaN", "Infinity", "-Infinity")):
        return True
    return isinstance(value, int) and not isinstance(value, bool)
