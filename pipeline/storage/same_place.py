"""How a client and its workers find out that they see one source and one sidecar: some voxels, and tokens.

A token is a small object that one of them writes and another one reads.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.base.errors import EmsrError, UserError
from pipeline.base.geometry import Box
from pipeline.config.urls import local_path
from pipeline.storage.kv import Store
from pipeline.storage.volume import Source

PREFIX = "token-"
LOOK_S = 10.0
"""A network file system may show a new object this much later."""


def voxels_checksum(source: Source, box: Box) -> int | None:
    """The CRC-32 of the voxels of `box`; None where they cannot be had."""
    try:
        return zlib.crc32(source.read(box).tobytes())
    except EmsrError:
        return None


def absent_folders(url: str) -> list[Path]:
    """The folders that writing below `url` would make, the innermost first; none for an object store."""
    path, absent = local_path(url), []
    while path is not None and not path.exists():
        absent.append(path)
        path = path.parent
    return absent


def is_seen(store: Store, key: str, text: str) -> bool:
    """Whether `key` holds `text`. It is looked for during LOOK_S seconds."""
    end = time.monotonic() + LOOK_S
    while not (seen := found(store, [key], text)) and time.monotonic() < end:
        time.sleep(0.2)
    return bool(seen)


def found(store: Store, keys: Collection[str], text: str) -> set[str]:
    """Those of `keys` that hold `text`, as the server has them now. They are read at the same time."""
    if keys and local_path(store.url) is not None:  # else a folder may be answered from what was known before
        store.get_with_generation(next(iter(keys)))
    return {key for key, value in store.get_all(keys) if value == text.encode()}


def remove(store: Store, keys: Iterable[str], folders: Iterable[Path] = ()) -> None:
    """Delete the tokens `keys`, then those of `folders` that are empty. Without the permission to delete they stay."""
    with suppress(UserError):
        store.delete_all(keys)
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def remove_at(url: str, key: str) -> None:
    """Delete one token of the sidecar `url`."""
    remove(Store(url), [key])
