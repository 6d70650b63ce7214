"""Objects as files below a folder, written so that a crash leaves each of them whole, as it was, or absent.

A file is written under a temporary name in the folder that all keys are below, synchronised, and renamed; then the
folders are synchronised. So what is left by a killed process lies in one place, where `sweep` finds it without a walk
through millions of files. The temporary name tells who writes it:

    .emsr-part-<machine>-<process>-<ticks since boot>-<count>
"""

from __future__ import annotations

import errno
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.base.errors import EmsrError
from pipeline.storage import process_identity
from pipeline.storage.volume import Encoded
from pipeline.storage.write_errors import folder_refuses

PART = ".emsr-part-"
VERSION = ".emsr-version-"
"""What stands between the name of a file of `swapped_file` and the number of its version."""
ABANDONED_S = 3600.0
"""A temporary file of another machine that was not written to for so long belongs to nobody."""
THREADS = 16
_UNKNOWN_MACHINE = "0" * 16
_count = itertools.count()


def is_own(key: str) -> bool:
    """Whether this is no object but a temporary file, a version of a lock, or a lock file that tensorstore left."""
    name = key.rpartition("/")[2]
    before, found, number = name.rpartition(VERSION)
    return name.startswith(PART) or name.endswith(".__lock") or bool(before and found and number.isdigit())


def put_all(root: Path, items: Mapping[str, Encoded]) -> None:
    """Returns when every value is durable under its key. All are tried; the first failure is raised.

    Raises what `folder_refuses` makes of the system's errors.
    """
    paths = [root / key for key in items]
    failed = list((_threads().map if len(paths) > 1 else map)(_put, itertools.repeat(root), paths, items.values()))
    written = [path for path, fault in zip(paths, failed, strict=True) if fault is None]
    # Those above a file too: another process may have made them, and not have synchronised them yet.
    folders = {folder for path in written for folder in path.parents if folder.is_relative_to(root)}
    with faults(f"writing {root}"):
        list((_threads().map if len(folders) > 1 else map)(synchronise, folders))
    for fault in failed:
        if fault is not None:
            raise fault


def write_part(root: Path, value: Encoded) -> Path:
    """A new temporary file in `root` with these bytes, durable but for its name. Raises OSError and leaves nothing."""
    try:
        return _write_part(root, value)
    except FileNotFoundError:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            synchronise(folder.parent)
        return _write_part(root, value)


def sweep(root: Path) -> None:
    """Remove temporary files that nobody writes any more: those of ended processes of this machine, and old ones.

    How old one is follows from a file made now beside it: both times are those of the machine that has the disk. What
    cannot be removed is left.
    """
    with suppress(OSError):
        parts = [root / name for name in os.listdir(root) if name.startswith(PART)]
        foreign = [part for part in parts if not _tidy_here(part)]
        if not foreign:
            return
        now = write_part(root, b"")
        try:
            at = now.stat().st_mtime
        finally:
            now.unlink()
        for part in foreign:
            with suppress(OSError):
                if at - part.stat().st_mtime > ABANDONED_S:
                    part.unlink()


@contextmanager
def faults(what: str) -> Iterator[None]:
    """The system's errors about `what` become what `folder_refuses` makes of them."""
    try:
        yield
    except OSError as error:
        raise folder_refuses(error.errno or 0, what) from error


def synchronise(folder: Path) -> None:
    """Returns when the names in `folder` are durable, where the file system knows such a thing. Raises OSError."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # one may write in a folder without reading it
        return
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such thing
            raise
    finally:
        os.close(file)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="files")


def _put(root: Path, path: Path, value: Encoded) -> EmsrError | None:
    """What kept the file from being written, if anything did."""
    try:
        try:
            _put_by_way_of(root, path, value)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _put_by_way_of(path.parent, path, value)  # a folder of the target lies on another disk
    except OSError as error:
        return folder_refuses(error.errno or 0, f"writing {path}")
    return None


def _put_by_way_of(folder: Path, path: Path, value: Encoded) -> None:
    part = write_part(folder, value)
    try:
        try:
            os.replace(part, path)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write_part(root: Path, value: Encoded) -> Path:
    path = root / f"{PART}{_writer(os.getpid())}-{next(_count)}"
    # The mode is what the umask leaves of it, as for any file: targets are shared within groups.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            left = memoryview(value)
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        finally:
            os.close(file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


@functools.cache
def _writer(pid: int) -> str:
    """The part of a temporary name that tells this process."""
    return f"{process_identity.machine() or _UNKNOWN_MACHINE}-{pid}-{process_identity.ticks(pid)}"


def _tidy_here(part: Path) -> bool:
    """Whether a process of this machine wrote `part`, which is removed where that one has ended."""
    machine, _, process = part.name[len(PART) :].partition("-")
    if machine != process_identity.machine():
        return False
    with suppress(OSError, ValueError):
        pid, began, _ = process.split("-")
        if process_identity.has_ended(int(pid), int(began)):
            part.unlink()
    return True
