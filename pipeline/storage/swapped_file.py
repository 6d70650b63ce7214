"""A JSON object in a file that processes of any hosts replace by compare-and-swap, without locks of the file system.

Each version is a file of its own, which is made by a hard link: the link fails where the version exists, for all hosts
of a network file system. The greatest number is the newest version; it is never removed, so numbers only grow. Under
the file's own name lies a copy for those who only read; it may be late, and its number tells so. Each version knows
the digest of the copy that was there before it, so that a copy put by hand or removed by hand is told from a late one.

    lock.json                     the copy: {..., "version": 12, "after": "..."}
    lock.json.emsr-version-12     the newest version

A process may be stopped or killed between any two steps: the next one goes on from what is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.storage import files

LOOKS, LOOK_S = 100, 0.1
"""A newest version that cannot be read is looked for again so often, and after so many seconds."""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class _State:
    """`value` is the newest version, or what stands in its place. `copy` is what the file itself holds."""

    number: int
    value: bytes | None
    copy: bytes | None

    @property
    def generation(self) -> bytes:
        return f"{self.number} {_digest(self.value)}".encode()


def look(path: Path) -> tuple[bytes | None, bytes]:
    """The value, None where it is absent, and its generation for `swap`. Raises OSError."""
    # A client of NFS may show a folder as it was a minute ago, until it changes the folder itself.
    with suppress(OSError):
        if path.parent.is_dir():
            files.write_part(path.parent, b"").unlink()
    state = _state(path)
    return state.value, state.generation


def swap(path: Path, value: bytes, generation: bytes) -> bytes | None:
    """Replace the value, a JSON object, where it still is of `generation`; returns the new one's generation, else None.

    `value` gets the members `version` and `after`. Raises OSError; whether the value was replaced is then unknown.
    """
    before = _state(path)
    if before.generation != generation:
        return None
    number = before.number + 1
    body = json.dumps({**json.loads(value), "version": number, "after": _digest(before.copy)}).encode()
    part = files.write_part(path.parent, body)
    try:
        # Once more, now that this process has changed the folder: see `look`.
        if _state(path).generation != generation or not _create(part, _version(path, number), body):
            return None
        if max(_numbers(path), default=0) > number:  # the version was made before, superseded, and removed
            _version(path, number).unlink(missing_ok=True)
            return None
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    for old in _numbers(path):
        if old < number:
            with suppress(OSError):
                _version(path, old).unlink()
    files.synchronise(path.parent)
    return _State(number, body, body).generation


def _state(path: Path) -> _State:
    for looks in range(LOOKS):
        number = max(_numbers(path), default=0)
        newest = _read(_version(path, number)) if number else None
        if number and newest is None:  # superseded between the two looks, or listed by a file server that is late
            time.sleep(LOOK_S * bool(looks))
            continue
        copy = _read(path)
        copied = _members(copy).get("version")
        if isinstance(copied, int) and copied > number:  # moved to here without its versions
            return _State(copied, copy, copy)
        late = isinstance(copied, int) and copied < number
        # Else put or removed by hand, or by another program: it counts unless the newest version came after it.
        superseded = late or _members(newest).get("after") == _digest(copy)
        return _State(number, newest if superseded else copy, copy)
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(_version(path, number)))


def _create(part: Path, version: Path, body: bytes) -> bool:
    """Whether this process is the one that made `version`."""
    try:
        os.link(part, version)
    except FileExistsError:
        # Where the answer of a file server was lost, its client asks again, and finds its own link.
        try:
            return os.path.samefile(part, version)
        except FileNotFoundError:
            return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_without_link(version, body)
    return True


def _create_without_link(version: Path, body: bytes) -> bool:
    """For file systems without hard links. A crash in the middle leaves a version that nobody can read."""
    try:
        file = os.open(version, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(file, "wb") as out:
        out.write(body)
        out.flush()
        os.fsync(file)
    return True


def _version(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}{files.VERSION}{number}")


def _numbers(path: Path) -> list[int]:
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return []
    start = path.name + files.VERSION
    return [int(name[len(start) :]) for name in names if name.startswith(start) and name[len(start) :].isdigit()]


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _members(value: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(value or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _digest(value: bytes | None) -> str:
    return "absent" if value is None else hashlib.sha256(value).hexdigest()
