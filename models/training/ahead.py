"""Batches of the next steps, drawn by threads of their own while the device computes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue

import torch
from torch import Tensor

AHEAD = 4
"""So many batches are drawn or kept at once, each by a thread of its own."""
END_S = 5.0
"""Threads that still draw in the end are waited for so long; one that reads from a dead mount would never end."""

Drawn = tuple[Tensor, ...]
"""What the losses of one step take."""


class Waits:
    """How the threads that draw, and the one that takes, say what they wait for. This one says nothing."""

    def begin_thread(self) -> None:
        """Called by each thread that draws, before it does."""

    def wait_for(self, drawn: Future[Drawn], step: int) -> None:
        """Return once the batch of `step` is `drawn`, or could not be."""
        wait([drawn])


SILENT = Waits()


class Ahead:
    """What `draw` returns for each of `steps`, one after the other.

    `draw` is called by AHEAD threads, for so many steps at once. It must depend on the step alone, so that neither the
    number nor the order of threads shows. Tensors for a GPU come in pinned memory. `close` it in the end.
    """

    def __init__(self, draw: Callable[[int], Drawn], steps: range, device: torch.device, waits: Waits = SILENT) -> None:
        self._draw, self._steps, self._device, self._waits = draw, iter(steps), device, waits
        self._wanted: SimpleQueue[tuple[int, Future[Drawn]] | None] = SimpleQueue()
        self._drawn: deque[tuple[int, Future[Drawn]]] = deque()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(AHEAD)]
        for thread in self._threads:
            thread.start()
            self._want_next()

    def take(self) -> Drawn:
        """The batch of the next step. Raises what `draw` raised for that step."""
        step, drawn = self._drawn.popleft()
        self._waits.wait_for(drawn, step)
        self._want_next()
        return drawn.result()

    def close(self) -> None:
        """Draw no more."""
        for _, drawn in self._drawn:
            drawn.cancel()
        for _ in self._threads:
            self._wanted.put(None)
        end = time.monotonic() + END_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _want_next(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._drawn.append((step, Future()))
            self._wanted.put(self._drawn[-1])

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # each thread has its own; pinning would begin to use GPU 0
        self._waits.begin_thread()
        while (wanted := self._wanted.get()) is not None:
            step, drawn = wanted
            if drawn.set_running_or_notify_cancel():
                try:
                    drawn.set_result(self._to_pinned(self._draw(step)))
                except BaseException as error:  # raised where the batch is taken
                    drawn.set_exception(error)

    def _to_pinned(self, drawn: Drawn) -> Drawn:
        return tuple(part.pin_memory() for part in drawn) if self._device.type == "cuda" else drawn
