"""Which process this is, told so that the same machine can see later whether it has ended. No clock is asked."""

from __future__ import annotations

import functools
import hashlib
import os
import socket
from pathlib import Path

_ZOMBIE, _STOPPED = "Z", "T"


@functools.cache
def machine() -> str:
    """A digest of what process numbers are good for: host name, machine id, this boot, and the process namespace.

    Two containers with one host name, or two machines made from one image, differ. "" where the system does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return ""
    try:
        installed = Path("/etc/machine-id").read_text().strip()
    except OSError:
        installed = ""
    told = "\n".join((socket.gethostname(), installed, boot, str(namespace)))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def ticks(pid: int) -> int:
    """When this process began, in clock ticks since boot. Raises OSError where there is no such process."""
    return int(_fields(pid)[19])


def has_ended(pid: int, began: int) -> bool:
    """Whether the process of this machine with this number, begun at that tick, is gone or a zombie.

    Another user's process may be hidden; while one of that number exists it counts as the same one.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    try:
        fields = _fields(pid)
    except OSError:
        return False
    return fields[0] == _ZOMBIE or int(fields[19]) != began


def is_stopped(pid: int) -> bool:
    """Whether the process of this machine is suspended (SIGSTOP, Ctrl-Z)."""
    try:
        return _fields(pid)[0] == _STOPPED
    except OSError:
        return False


def _fields(pid: int) -> list[str]:
    # Fields are counted from behind the command's name, which may hold anything.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
