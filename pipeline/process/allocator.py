"""glibc's malloc, configured for slabs: chunk buffers are reused, and what a slab freed goes back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3

MMAP_BYTES = 4 << 20
"""From this size on an allocation is a mapping of its own, gone when it is freed. Encoders' buffers are smaller (a
chunk, 512 KiB by default) and come from the heap: else each is mapped, faulted in page by page and unmapped again,
which doubles blosc's time. Dask's nanny, which sets MALLOC_TRIM_THRESHOLD_, makes it so from 128 KiB on.
"""

TRIM_BYTES = 4 << 20
"""Free memory at the top of a heap beyond this goes back to the system at once, everything else by `trim`. A larger
threshold saves little time and holds memory.
"""


def configure_malloc() -> None:
    """Set both thresholds for this process, and let PyTorch ask for huge pages for its maps from 2 MiB on.

    Maps above MMAP_BYTES are faulted in anew, page by page, which costs the network less time with large pages. PyTorch
    reads its setting when it first allocates. The thresholds do nothing where the C library is not glibc, the setting
    where the kernel gives no huge pages.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, TRIM_BYTES)


def trim() -> None:
    """Return freed pages of every thread's heap to the system: a few ms.

    Without it each thread keeps as much as its largest slab ever needed (tensorstore copies an object that it writes
    into pieces of 4 KiB), and a worker's peak is the sum over its threads instead of what is alive at one time.
    """
    malloc_trim = _glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
