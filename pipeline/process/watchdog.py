"""A watch over a thread that works: where a step takes too long, the task is given up and the process ends itself."""

from __future__ import annotations

import gc
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.base.waits import Progress, Sayer, current, waiting

EXIT_S = 10.0
"""A stalled process ends after so many seconds: time for the lease's result to reach the client."""
LOOK_S = 0.5
STALLED = 87
"""Exit code of a process that ended itself."""


@contextmanager
def holding(lock: threading.Lock) -> Iterator[None]:
    """Hold the lock. Waiting for it is no stall of the waiting thread; its holder is watched."""
    with waiting("", math.inf):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Stall:
    """Where a thread stands that makes no more steps: what it waits for ("" where it computes), and its stack."""

    what: str
    stack: str


def run_watched(
    work: Callable[[], None], stall_s: float, tell: Callable[[str, float], None] = lambda what, seconds: None
) -> Stall | None:
    """Run `work` in a thread and raise what it raises. Returns None when it has ended.

    `tell` is called with what the thread waits for, and how long it has, where a wait takes long. Where the thread
    makes no step for `stall_s` seconds, it is told where it stands. It cannot be ended then and may hold locks for
    ever: call `exit_soon`.
    """
    progress, raised = Progress(), []

    def body() -> None:
        current.set(progress)
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body, name="tasks", daemon=True)
    thread.start()
    sayer = Sayer(tell)
    while thread.is_alive():
        thread.join(LOOK_S)
        step = progress.step
        waited_s = time.monotonic() - step.at
        if thread.is_alive() and waited_s > stall_s + step.extra_s:
            return Stall(str(step.what), _stack(thread.ident or 0))
        sayer.look(step, waited_s)
    if raised:
        raise raised[0]
    return None


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
