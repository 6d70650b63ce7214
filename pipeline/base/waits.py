"""What a thread waits for: it is said where it takes long, and ended where it takes too long.

A command's own thread is watched by `watched_command`, a task's by process/watchdog. Both look at its last step.
"""

from __future__ import annotations

import contextvars
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Protocol

from emsr import start
from pipeline.base.errors import NoAnswerError

SAY_S = 20.0
"""What a thread waits for is said after so many seconds, and again after twice as many each time."""
LIMIT_S = 300.0
"""A command waits at most so long for one answer."""
END_S = 30.0
"""A command that has to end and still waits after so many seconds is ended as it is."""
LOOK_S = 0.5


@dataclass(frozen=True)
class Step:
    """When a thread made its last step, and what it waits for since: "" while it computes, else what its text says.

    `extra_s` is how much longer than others this wait may take; infinite where another thread ends it.
    """

    at: float = field(default_factory=lambda: time.monotonic())
    what: object = ""
    extra_s: float = 0.0


class Closable(Protocol):
    def close(self) -> object: ...


class Progress:
    """The last step of one thread, which other threads look at."""

    def __init__(self) -> None:
        self.step = Step()
        self.end: threading.Timer | None = None
        """What ends the process where it has to end, and hangs."""
        self.expired = False
        """Whether it has to end because a wait was too long. The next wait that is not too long undoes that."""


current: contextvars.ContextVar[Progress | None] = contextvars.ContextVar("progress", default=None)
"""The progress of this thread; None where nobody watches it."""


def heartbeat() -> None:
    """Say that this thread has made a step."""
    progress = current.get()
    if progress is not None:
        progress.step = replace(progress.step, at=time.monotonic())


@contextmanager
def waiting(what: object, extra_s: float = 0.0) -> Iterator[None]:
    """This thread waits for `what` inside the block. Its end is a step."""
    progress = current.get()
    if progress is None:
        yield
        return
    before = progress.step
    progress.step = Step(time.monotonic(), what, extra_s)
    try:
        yield
    finally:
        progress.step = replace(before, at=time.monotonic())
    if progress.expired:
        progress.expired = False
        _go_on(progress)


@contextmanager
def closing(thing: Closable, what: str) -> Iterator[None]:
    """Close `thing` at the end of the block, however it ends; `what` is what is waited for then."""
    try:
        yield
    finally:
        with waiting(what):
            thing.close()


class Sayer:
    """Says each wait when it has lasted SAY_S, 2 SAY_S, 4 SAY_S, ... Call `look` often."""

    def __init__(self, say: Callable[[str, float], None]) -> None:
        self._say, self._of, self._next_s = say, Step(), SAY_S

    def look(self, step: Step, waited_s: float) -> None:
        """`say` the step's wait, and its seconds, when it is time to."""
        if step is not self._of:
            self._of, self._next_s = step, SAY_S
        if step.what and waited_s >= self._next_s:
            self._next_s *= 2
            self._say(str(step.what), waited_s)


@contextmanager
def watched_command() -> Iterator[None]:
    """Inside the block the waits of this thread are said on stderr. In a main thread they also end.

    Where one lasts longer than its limit, the thread raises NoAnswerError. Then, or after Ctrl-C, the process ends in
    END_S seconds, whatever waits: a thread of a pool or of Dask may hang for ever. A program of others that has called
    the command goes on once that has ended.
    """
    if current.get() is not None:
        yield
        return
    progress = Progress()
    token = current.set(progress)
    watch = _Watch(progress, threading.current_thread() is threading.main_thread())
    try:
        with watch:
            yield
        _go_on(progress)
    finally:
        current.reset(token)
        if not start.is_program:  # else, after an error, it still has to end: Python waits for all threads then
            _go_on(progress)


class _Watch:
    """The thread that looks at a command's waits, and the handlers of the signals by which they end."""

    def __init__(self, progress: Progress, ends: bool) -> None:
        self._progress, self._ends = progress, ends
        self._ident = threading.get_ident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="emsr-waits", daemon=True)
        self._expired: Step | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if self._ends:
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _look(self) -> None:
        sayer = Sayer(self._say)
        while not self._done.wait(LOOK_S):
            step = self._progress.step
            waited_s = time.monotonic() - step.at
            sayer.look(step, waited_s)
            limit_s = LIMIT_S + step.extra_s
            if not step.what or waited_s < limit_s or not self._ends:
                continue
            if self._expired is not step:
                self._expired = step
                signal.pthread_kill(self._ident, signal.SIGALRM)
            elif waited_s > limit_s + END_S:
                print(
                    f"emsr: {no_answer(str(step.what), limit_s)}", file=sys.stderr, flush=True
                )  # it cannot even raise
                os._exit(NoAnswerError.exit_code)

    def _say(self, what: str, seconds: float) -> None:
        limit_s = LIMIT_S + self._progress.step.extra_s
        say(what, seconds, limit_s if self._ends else math.inf)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        step = self._progress.step
        if step is self._expired:  # else it came just before the signal
            self._progress.expired = True
            end_soon(NoAnswerError.exit_code)
            raise no_answer(str(step.what), LIMIT_S + step.extra_s)


def say(what: str, seconds: float, limit_s: float = math.inf) -> None:
    """One line on stderr: what is waited for, since when, and until when."""
    end = f", at most {limit_s:.0f} s" if limit_s < math.inf else ""
    print(f"emsr: waiting for {what} ({seconds:.0f} s so far{end})", file=sys.stderr, flush=True)


def no_answer(what: str, seconds: float) -> NoAnswerError:
    """The error of a wait that was too long."""
    return NoAnswerError(
        f"no answer in {seconds:.0f} s: {what}",
        "a disk, server or process that answers",
        "See why it hangs, then run the same command again: what is done is kept",
    )


def end_soon(code: int) -> None:
    """End this process in END_S seconds if its command has not ended by then: it waits for what never comes."""
    progress = current.get()
    if progress is not None and progress.end is None:
        progress.end = threading.Timer(END_S, os._exit, (code,))
        progress.end.daemon = True
        progress.end.start()


def _go_on(progress: Progress) -> None:
    if progress.end is not None:
        progress.end.cancel()
        progress.end = None


def _interrupt(number: int, frame: FrameType | None) -> None:
    end_soon(128 + number)
    raise KeyboardInterrupt
