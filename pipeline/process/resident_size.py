"""How much memory this process has resident, and had at most."""

from __future__ import annotations

import resource
import sys

import psutil


def resident_bytes() -> int:
    """The resident size now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident size so far.

    /proc is asked first: a child process inherits ru_maxrss from the process that started it.
    """
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
