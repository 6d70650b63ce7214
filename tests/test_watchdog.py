"""A thread without progress is told where it stands; one that waits for another is not to blame."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.base import retry, waits
from pipeline.process import watchdog
from pipeline.storage import requests


@pytest.fixture
def hang() -> Iterator[Callable[[], None]]:
    """This yields work that goes on until the test has ended."""
    ended = threading.Event()

    def hanging() -> None:
        ended.wait()

    yield hanging
    ended.set()


def test_a_stall_is_told_with_its_place(hang: Callable[[], None]) -> None:
    """The watch returns at all, though the work does not."""
    stall = watchdog.run_watched(hang, 0.3)
    assert stall is not None
    assert "in hanging" in stall.stack
    assert "ended.wait()" in stall.stack
    assert not stall.what, "it said nothing of what it waits for"


def test_a_wait_is_told_while_it_lasts_and_named_when_it_is_given_up(
    hang: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "SAY_S", 0.2)
    told: list[str] = []

    def waits_for_a_disk() -> None:
        with waits.waiting("a disk"):
            hang()

    stall = watchdog.run_watched(waits_for_a_disk, 4.0, lambda what, seconds: told.append(what))
    assert stall is not None
    assert stall.what == "a disk"
    assert set(told) == {"a disk"}


def test_a_wait_of_our_own_is_no_stall() -> None:
    """The pace of requests and the pause before another try may be longer than work.stall_s."""
    pace = requests.Pace()
    pace.per_second = 1.0
    pace.take(1)

    def waits_for_its_turn() -> None:
        pace.take(3)

    assert watchdog.run_watched(waits_for_its_turn, 1.0) is None

    def tries_again() -> None:
        retry._sleep(3.0)

    assert watchdog.run_watched(tries_again, 1.0) is None


class Clock:
    """The `time` of pipeline.process.watchdog for a test, which moves it; it counts how often it was looked at."""

    def __init__(self) -> None:
        self.now, self.looks = time.monotonic(), 0

    def monotonic(self) -> float:
        self.looks += 1
        return self.now


@pytest.mark.parametrize("beats", [True, False])
def test_beats_keep_a_long_task_alive(beats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred steps of 0.6 s are no stall of 1 s, though the watch looks after each; without beats they are one."""
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(waits, "time", clock)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.001)
    given_up = threading.Event()

    def steps() -> None:
        for _ in range(100):
            clock.now += 0.6
            seen = clock.looks
            while clock.looks < seen + 2 and not given_up.is_set():
                time.sleep(0.001)
            if beats:
                waits.heartbeat()

    stall = watchdog.run_watched(steps, 1.0)
    given_up.set()
    assert (stall is None) is beats


def test_what_the_work_raises_is_raised() -> None:
    def fails() -> None:
        raise ArithmeticError("ours")

    with pytest.raises(ArithmeticError, match="ours"):
        watchdog.run_watched(fails, 60)


def test_waiting_for_a_lock_is_the_holders_stall(hang: Callable[[], None]) -> None:
    lock, released = threading.Lock(), threading.Timer(3.0, lambda: lock.release())
    lock.acquire()
    released.start()

    def waiting() -> None:
        with watchdog.holding(lock):
            pass

    assert watchdog.run_watched(waiting, 1.0) is None

    def holds() -> None:
        with watchdog.holding(lock):
            hang()

    stall = watchdog.run_watched(holds, 0.3)
    assert stall is not None
    assert "in holds" in stall.stack


def test_garbage_is_collected_again_after_a_stall_was_told(hang: Callable[[], None]) -> None:
    assert gc.isenabled()
    assert watchdog.run_watched(hang, 0.2)
    assert gc.isenabled()


def test_a_process_that_is_left_ends_whatever_its_threads_do() -> None:
    """With an exit code of its own, though other threads have not ended."""
    code = (
        "import threading, time; from pipeline.process import watchdog; watchdog.EXIT_S = 0.1; watchdog.exit_soon(); "
    )
    code += "threading.Thread(target=time.sleep, args=(60,)).start(); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=50)
    assert done.returncode == watchdog.STALLED
