"""The share of time in which the device computes for a training."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Block = tuple[float, torch.cuda.Event, torch.cuda.Event]
"""When the host began a block, and the events of the device's begin and end of it."""


class Busy:
    """Which share of the last `blocks` blocks of `computing`, and of the time between them, the device computed.

    A CPU computes as long as a block lasts. A GPU computes from the first operation of a block to the last one, by
    events that the GPU itself records; gaps in between, where the host is slow to queue the next operation, count as
    computing. Nothing here waits for the GPU.
    """

    def __init__(self, device: torch.device, blocks: int) -> None:
        self._device = device
        self._unfinished: deque[Block] = deque()
        self._finished: deque[tuple[float, float]] = deque(maxlen=blocks)  # begin on the host, seconds of the device

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The operations of the block are work of the device."""
        began = time.monotonic()
        if self._device.type != "cuda":
            yield
            self._finished.append((began, time.monotonic() - began))
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record()
        yield
        last.record()
        self._unfinished.append((began, first, last))

    def share(self) -> float | None:
        """0 to 1; None before the first block is finished."""
        while self._unfinished and self._unfinished[0][2].query():  # type: ignore[no-untyped-call]
            began, first, last = self._unfinished.popleft()
            self._finished.append((began, first.elapsed_time(last) / 1e3))
        if not self._finished:
            return None
        until = self._unfinished[0][0] if self._unfinished else time.monotonic()
        return min(1.0, sum(seconds for _, seconds in self._finished) / (until - self._finished[0][0]))
