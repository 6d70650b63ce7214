"""A thread without progress is told where it stands; one that waits for another is not to blame."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline.process import watchdog


def sleeper() -> None:
    time.sleep(30)


def test_a_stall_is_told_with_its_place() -> None:
    began = time.monotonic()
    stack = watchdog.run_watched(sleeper, 0.3)
    assert "in sleeper" in stack
    assert "time.sleep(30)" in stack
    assert time.monotonic() - began < 10


def test_beats_keep_a_long_task_alive() -> None:
    def steps() -> None:
        for _ in range(15):
            time.sleep(0.1)
            watchdog.heartbeat()

    assert watchdog.run_watched(steps, 1.0) == ""


def test_what_the_work_raises_is_raised() -> None:
    def fails() -> None:
        raise ArithmeticError("ours")

    with pytest.raises(ArithmeticError, match="ours"):
        watchdog.run_watched(fails, 60)


def test_waiting_for_a_lock_is_the_holders_stall() -> None:
    lock, released = threading.Lock(), threading.Timer(1.5, lambda: lock.release())
    lock.acquire()
    released.start()

    def waits() -> None:
        with watchdog.holding(lock):
            pass

    assert watchdog.run_watched(waits, 0.3) == ""

    def holds() -> None:
        with watchdog.holding(lock):
            time.sleep(30)

    assert "in holds" in watchdog.run_watched(holds, 0.3)
