"""Opens a target of either format, and checks whether anything is stored at a URL already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from pipeline.base.errors import DataError, TargetError
from pipeline.base.geometry import ZYX, Box
from pipeline.base.waits import heartbeat, waiting
from pipeline.config.urls import local_path
from pipeline.config.volume import ENCODINGS
from pipeline.plan.target_spec import FIDELITY, TargetSpec
from pipeline.storage import files, kv, requests
from pipeline.storage.targets import encode, ome_zarr_target, precomputed_target
from pipeline.storage.targets.encode import StoredArray
from pipeline.storage.volume import Encoded, Target, Uint8Array

_FORMATS: dict[str, Any] = {"ome-zarr": ome_zarr_target, "precomputed": precomputed_target}
READ_AT_ONCE = 4
"""Objects of a task that are in memory at a time when it is verified: shards may have a hundred MB."""
MAX_CHANGED = 16
_METADATA_KEYS = ("zarr.json", "info", "provenance", ".zgroup", ".zarray", ".zattrs", "attributes.json")


def open_target(spec: TargetSpec) -> Target:
    """The target that `spec` describes; nothing is read or written yet.

    Raises TargetError where its format cannot hold such arrays, or nothing can be written at its URL. Raises ValueError
    for levels that are no pyramid.
    """
    return StoredTarget(spec)


def is_empty(url: str) -> bool:
    """Whether nothing is stored below `url`; empty folders do not count.

    Raises TargetError for a URL that cannot be written to.
    """
    _check_writable(url)
    path = local_path(url)
    if path is None:
        return kv.Store(url).is_empty(likely=_METADATA_KEYS)
    try:
        with waiting(url):
            if path.exists() and not path.is_dir():
                return False
            for _, _, names in os.walk(path, onerror=_raise_unless_absent):
                heartbeat()
                if not all(map(files.is_own, names)):
                    return False
            return True
    except OSError as error:
        raise kv.classify(error, url) from error


class StoredTarget:
    """A `Target` (storage/volume.py) whose objects are encoded in memory and put whole. Only its spec is pickled."""

    def __init__(self, spec: TargetSpec) -> None:
        _check_writable(spec.url)
        _check_levels(spec)
        self._spec = spec
        self._arrays: dict[int, StoredArray] = _FORMATS[spec.format].arrays(spec)
        self._readers: dict[int, encode.Reader] = {}

    def __reduce__(self) -> tuple[type[StoredTarget], tuple[TargetSpec]]:
        return type(self), (self._spec,)

    @property
    def spec(self) -> TargetSpec:
        return self._spec

    @cached_property
    def _store(self) -> kv.Store:
        return kv.Store(self._spec.url)

    def metadata(self) -> dict[str, bytes]:
        found: dict[str, bytes] = _FORMATS[self._spec.format].metadata(self._spec)
        return found

    def damaged_metadata(self) -> dict[str, str]:
        wanted = self.metadata()
        stored = dict(self._store.get_all(wanted))
        return {
            key: "is missing" if stored[key] is None else "differs from what the plan says"
            for key, value in wanted.items()
            if stored[key] != value
        }

    def refuse_foreign(self) -> None:
        ours = self.metadata()
        stored = {key: value for key, value in self._store.get_all(ours) if value is not None}
        strange = {k: v for k, v in stored.items() if v not in ours.values() and not _almost(v, ours[k])}
        if _FORMATS[self._spec.format].is_foreign(self._spec, strange):
            raise TargetError(
                f"{self._spec.url} holds another volume than the plan beside it says",
                "the target that was begun there",
                "Move it back, or choose another target.url; nothing is ever overwritten",
            )

    def create(self) -> None:
        # One by one, the root's last: readers find a target when all of its arrays are there.
        try:
            for key, value in self.metadata().items():
                self._store.put(key, value)
        except DataError as error:
            raise TargetError(
                f"target {self._spec.url} cannot be written ({error})",
                "",
                "Check that the bucket or folder exists and takes files",
            ) from error

    def encode(self, level: int, box: Box, voxels: Uint8Array) -> Mapping[str, Encoded]:
        return encode.encode(self._array(level), box, voxels)

    def keys(self, level: int, box: Box) -> list[str]:
        return encode.keys(self._array(level), box)

    def put(self, objects: Mapping[str, Encoded]) -> None:
        self._store.put_all(objects)

    def get(self, keys: list[str]) -> Iterator[tuple[str, bytes | None]]:
        for start in range(0, len(keys), READ_AT_ONCE):
            some = keys[start : start + READ_AT_ONCE]
            requests.READS.take(len(some))
            yield from self._store.get_all(some)

    def locate(self, key: str) -> tuple[int, ZYX] | None:
        for level, array in self._arrays.items():
            position = array.position(key)
            grid = array.level.shape.ceil_div(array.level.shard)
            if position is not None and all(0 <= p < n for p, n in zip(position, grid, strict=True)):
                return (level, position * array.level.shard) if array.key(position) == key else None
        return None

    def read(self, level: int, box: Box, absent: int | None = None) -> Uint8Array:
        array = self._array(level)
        if level not in self._readers:
            self._readers[level] = encode.open_stored(self._spec.url, array)
        return encode.read(self._store, array, self._readers[level], box, absent)

    def _array(self, level: int) -> StoredArray:
        if level not in self._arrays:
            name = "fidelity volume" if level == FIDELITY else f"level {level}"
            raise ValueError(f"the target has no {name}")
        return self._arrays[level]


def stored_provenance(url: str, kind: str) -> dict[str, Any] | None:
    """emsr's provenance in the target at `url`; None where there is none or it is damaged."""
    value = kv.Store(url).get(_FORMATS[kind].PROVENANCE)
    found: dict[str, Any] | None = _FORMATS[kind].provenance(value or b"")
    return found


def stored_name(url: str, kind: str) -> str | None:
    """What the target at `url` calls its volume; None where it says nothing, as precomputed targets do."""
    if kind != "ome-zarr":
        return None
    return ome_zarr_target.name(kv.Store(url).get(ome_zarr_target.PROVENANCE) or b"")


def _almost(value: bytes, ours: bytes) -> bool:
    """Whether a few bytes have changed: that is damage, not another volume."""
    return len(value) == len(ours) and sum(a != b for a, b in zip(value, ours, strict=True)) <= MAX_CHANGED


def _check_writable(url: str) -> None:
    if not url.startswith(("file://", "s3://", "s3+https://", "s3+http://", "gs://")):
        raise TargetError(f"target.url {url} cannot be written", "a path or file://, s3:// or gs:// URL")


def _check_levels(spec: TargetSpec) -> None:
    if spec.format not in ENCODINGS or spec.encoding not in ENCODINGS[spec.format]:
        wanted = "; ".join(f"{name}: {', '.join(known)}" for name, known in ENCODINGS.items())
        raise TargetError(f"target format {spec.format} with encoding {spec.encoding} cannot be written", wanted)
    if not spec.levels:
        raise ValueError("a target has at least one level")
    for level in (*spec.levels, *([spec.fidelity] if spec.fidelity else [])):
        if min(*level.shape, *level.chunk, *level.shard) < 1:
            raise ValueError(f"shapes must be positive: {level}")
    for finer, coarser in zip(spec.levels, spec.levels[1:], strict=False):
        if coarser.shape != finer.shape.ceil_div(ZYX(1, 2, 2)):
            raise ValueError(f"level of {coarser.shape} is not half of the one before, {finer.shape}")


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
