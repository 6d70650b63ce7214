"""Why a folder takes no file: the system's error numbers as messages, whoever met them, Python or tensorstore."""

from __future__ import annotations

import errno
import os
import re
import resource

from pipeline.base.errors import DiskError, EmsrError, UserError

_NUMBER = re.compile(r"\[os_error_code='?(\d+)'?[^\[]*\]")

_UNTIL_MENDED = {
    errno.ENOSPC: ("no space left", "Free some space there"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space there, or ask for a larger quota"),
    errno.EFBIG: ("the file would be too large ({limit})", "Raise that limit, or begin a target of smaller shards"),
    errno.EROFS: ("the file system is read-only", "Mount it for writing, or choose another target.url"),
    errno.EACCES: ("permission denied", "Check the path's rights"),
    errno.EPERM: ("permission denied", "Check the path's rights"),
    errno.ENOTDIR: ("a file stands where a folder is wanted", "Move that file away"),
    errno.EISDIR: ("a folder stands where a file is wanted", "Move that folder away"),
    errno.ENAMETOOLONG: ("the path is too long for this file system", "Choose a shorter target.url"),
    errno.ELOOP: ("the path's links lead in a circle", "Mend them"),
}
"""Trying again is of no use with these."""


def folder_refuses(error: BaseException, what: str) -> EmsrError | None:
    """Why a file system did not take what was written, None where `error` bears no number of the system's.

    UserError where somebody must mend it, DiskError where it may pass.
    """
    number = _number(error)
    if number is None:
        return None
    if number in _UNTIL_MENDED:
        saw, do = _UNTIL_MENDED[number]
        saw = saw.format(limit=_file_limit())
        return UserError(f"{what}: {saw}", "", f"{do}, then run the same command again: what is written is kept")
    return DiskError(f"{what}: {os.strerror(number)}")


def _file_limit() -> str:
    allowed, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "for its file system" if allowed == resource.RLIM_INFINITY else f"`ulimit -f` allows {allowed:,} bytes"


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _NUMBER.findall(str(error))
    return int(found[-1]) if found else None
