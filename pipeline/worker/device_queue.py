"""The slabs that a device has been given: the next one is queued while the one before is still computed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from pipeline.base.waits import waiting
from pipeline.inference.tiles import DEVICE_LOCK, Pending
from pipeline.process.watchdog import holding
from pipeline.storage.volume import Uint8Array


class DeviceQueue:
    """One for each device. It holds at most one slab of each thread that uses it.

        slab 1   begin |=== computed ===| finish
        slab 2            begin .........|=== computed ===| finish
                                         the device goes on without the host

    A slab's seconds are those in which the device worked for it: from its begin, or from the end of the slab before
    where that is later, to its own end. So the seconds of all slabs together are never more than the time that has
    passed.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._last = threading.Event()  # set when the slab that was begun last has ended
        self._last.set()
        self._ended = -math.inf

    def compute(self, begin: Callable[[], Pending]) -> tuple[Uint8Array, float]:
        """The SR voxels of the slab that `begin` gives to the device, and its seconds. Slabs end in the order in which
        they begin.

        Raises what `begin` and `Pending.finish` raise. The slabs behind this one are computed all the same.
        """
        ended = threading.Event()
        with holding(DEVICE_LOCK):
            began = self._clock()
            pending = begin()
            before, self._last = self._last, ended
        try:
            with waiting("", math.inf):  # no stall of this thread: that of the slab before is watched
                before.wait()
            voxels = pending.finish()
        finally:
            end = self._clock()
            seconds, self._ended = end - max(began, self._ended), end
            ended.set()
        return voxels, seconds
