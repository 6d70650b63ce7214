"""Why a folder takes no file: the system's error numbers as messages, whoever met them, Python or tensorstore."""

from __future__ import annotations

import errno
import os
import resource

from pipeline.base.errors import DiskError, EmsrError, TargetError, UserError

_UNTIL_MENDED = {
    errno.ENOSPC: ("no space left", "Free some space there"),
    errno.EDQUOT: ("the disk quota is used up", "Free some space there, or ask for a larger quota"),
    errno.EFBIG: ("the file would be too large ({limit})", "Raise that limit, or begin a target of smaller shards"),
    errno.EROFS: ("the file system is read-only", "Mount it for writing, or choose another target.url"),
    errno.EACCES: ("permission denied", "Check the path's rights"),
    errno.EPERM: ("permission denied", "Check the path's rights"),
    errno.EEXIST: ("something else lies there", "Move it away"),
    errno.ENOTDIR: ("a file stands where a folder is wanted", "Move that file away"),
    errno.EISDIR: ("a folder stands where a file is wanted", "Move that folder away"),
    errno.ENAMETOOLONG: ("the path is too long for this file system", "Choose a shorter target.url"),
    errno.ELOOP: ("the path's links lead in a circle", "Mend them"),
}
"""Trying again is of no use with these."""
_IN_THE_WAY = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def folder_refuses(number: int, what: str) -> EmsrError:
    """Why a file system did not take what was written, by the number of the system's error.

    UserError where somebody must mend it (TargetError where something else lies there), DiskError where it may pass.
    """
    if number in _UNTIL_MENDED:
        saw, do = _UNTIL_MENDED[number]
        saw = saw.format(limit=_file_limit())
        kind = TargetError if number in _IN_THE_WAY else UserError
        return kind(f"{what}: {saw}", "", f"{do}, then run the same command again: what is written is kept")
    return DiskError(f"{what}: {os.strerror(number)}")


def _file_limit() -> str:
    allowed, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "for its file system" if allowed == resource.RLIM_INFINITY else f"`ulimit -f` allows {allowed:,} bytes"
