"""A task that makes no progress is given up: its thread is watched from another one, and a step that takes too long ends the process."""

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

LEAVE_S = 10.0
"""So long after a stall the process ends: time for the lease's result to reach the client."""
LOOK_S = 0.5
STALLED = 87
"""Exit code of a process that ended itself."""


@dataclass
class _Pulse:
    at: float = field(default_factory=time.monotonic)
    """When the thread last made a step; infinite while it waits for another one."""


_pulse: contextvars.ContextVar[_Pulse | None] = contextvars.ContextVar("pulse", default=None)


def beat() -> None:
    """This thread has made a step. Outside `watch` nothing happens."""
    pulse = _pulse.get()
    if pulse is not None:
        pulse.at = time.monotonic()


@contextmanager
def turn(lock: threading.Lock) -> Iterator[None]:
    """The lock, held: waiting for it is no stall of the waiting thread, but of whoever holds it."""
    pulse = _pulse.get()
    if pulse is not None:
        pulse.at = math.inf
    with lock:
        beat()
        yield


def watch(work: Callable[[], None], stall_s: float) -> str:
    """Run `work` in a thread; what it raises is raised. Empty, or where the thread stands when no step was made for `stall_s` seconds.

    The thread cannot be ended then, and may hold locks for ever: call `leave`.
    """
    pulse, raised = _Pulse(), []

    def body() -> None:
        _pulse.set(pulse)
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name="tasks", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        if thread.is_alive() and time.monotonic() - pulse.at > stall_s:
            return _stack(thread.ident or 0)
    if raised:
        raise raised[0]
    return ""


def _stack(ident: int) -> str:
    """Where a thread stands. No garbage is collected meanwhile: under Python 3.11 that can wait for ever (cpython #106883)."""
    collected = gc.isenabled()
    gc.disable()
    try:
        frame = sys._current_frames().get(ident)
    finally:
        if collected:
            gc.enable()
    return "".join(traceback.format_stack(frame)) if frame is not None else "no stack"


def leave() -> None:
    """End this process in LEAVE_S seconds: what hangs in it cannot be helped. Dask's nanny starts another one."""
    timer = threading.Timer(LEAVE_S, os._exit, (STALLED,))
    timer.daemon = True
    timer.start()
