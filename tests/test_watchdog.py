"""A thread without progress is told where it stands; one that waits for another is not to blame."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest

from pipeline.process import watchdog


def sleeper() -> None:
    time.sleep(30)


def test_a_stall_is_told_with_its_place() -> None:
    began = time.monotonic()
    stack = watchdog.watch(sleeper, 0.3)
    assert "in sleeper" in stack
    assert "time.sleep(30)" in stack
    assert time.monotonic() - began < 10


def test_beats_keep_a_long_task_alive() -> None:
    def steps() -> None:
        for _ in range(15):
            time.sleep(0.1)
            watchdog.beat()

    assert watchdog.watch(steps, 1.0) == ""


def test_what_the_work_raises_is_raised() -> None:
    def fails() -> None:
        raise ArithmeticError("ours")

    with pytest.raises(ArithmeticError, match="ours"):
        watchdog.watch(fails, 60)


def test_waiting_for_a_lock_is_the_holders_stall() -> None:
    lock, released = threading.Lock(), threading.Timer(1.5, lambda: lock.release())
    lock.acquire()
    released.start()

    def waits() -> None:
        with watchdog.turn(lock):
            pass

    assert watchdog.watch(waits, 0.3) == ""

    def holds() -> None:
        with watchdog.turn(lock):
            time.sleep(30)

    assert "in holds" in watchdog.watch(holds, 0.3)


def test_garbage_is_collected_again_after_a_stall_was_told() -> None:
    assert gc.isenabled()
    assert watchdog.watch(sleeper, 0.2)
    assert gc.isenabled()


def test_a_process_that_is_left_ends_whatever_its_threads_do() -> None:
    """With an exit code of its own, though other threads have not ended."""
    code = "import threading, time; from pipeline.process import watchdog; watchdog.LEAVE_S = 0.1; watchdog.leave(); "
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=50)
    assert done.returncode == watchdog.STALLED
