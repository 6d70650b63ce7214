"""A watch over a thread that works: where a step takes too long, the task is given up and the process ends itself."""

from __future__ import annotations

import contextvars
import gc
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

EXIT_S = 10.0
"""A stalled process ends after so many seconds: time for the lease's result to reach the client."""
LOOK_S = 0.5
STALLED = 87
"""Exit code of a process that ended itself."""


@dataclass
class _Progress:
    at: float = field(default_factory=time.monotonic)
    """When the thread last made a step; infinite while it waits for another thread."""


_progress: contextvars.ContextVar[_Progress | None] = contextvars.ContextVar("progress", default=None)


def heartbeat() -> None:
    """Say that this thread has made a step. Outside `run_watched` nothing happens."""
    progress = _progress.get()
    if progress is not None:
        progress.at = time.monotonic()


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Hold the lock. Waiting for it is no stall of the waiting thread; its holder is watched."""
    progress = _progress.get()
    if progress is not None:
        progress.at = math.inf
    with lock:
        heartbeat()
        yield


def run_watched(work: Callable[[], None], stall_s: float) -> str:
    """Run `work` in a thread and raise what it raises. Returns "" when it has ended.

    Where it makes no step for `stall_s` seconds, the thread's stack is returned. The thread cannot be ended then and
    may hold locks for ever: call `exit_soon`.
    """
    progress, raised = _Progress(), []

    def body() -> None:
        _progress.set(progress)
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name="tasks", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        if thread.is_alive() and time.monotonic() - progress.at > stall_s:
            return _stack(thread.ident or 0)
    if raised:
        raise raised[0]
    return ""


def _stack(ident: int) -> str:
    """Where a thread stands. No garbage is collected meanwhile: under Python 3.11 that can wait for ever (cpython
    #106883).
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        frame = sys._current_frames().get(ident)
    finally:
        if collected:
            gc.enable()
    return "".join(traceback.format_stack(frame)) if frame is not None else "no stack"


def exit_soon() -> None:
    """End this process in EXIT_S seconds, with the thread that hangs in it. Dask's nanny starts another one."""
    timer = threading.Timer(EXIT_S, os._exit, (STALLED,))
    timer.daemon = True
    timer.start()
