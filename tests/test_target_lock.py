"""One run at a time for each target: the lock, its renewals, and who counts as alive."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import GUARD_S, REPOSITORY, wait_until

from pipeline.base.errors import LedgerError, TransientError
from pipeline.plan.receipt import WRITTEN, Receipt
from pipeline.storage import process_identity, target_lock
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import FORMER_KEY, KEY, TargetLock, holder

# Takes the lock and says so. Each further line of the input asks whether it is still held.
_HOLDER = """
import sys, time
from pipeline.base.errors import LedgerError
from pipeline.storage import process_identity, target_lock
from pipeline.storage.kv import Store
from pipeline.storage.target_lock import TargetLock
place, machine, clock, renew = sys.argv[1:]
if machine:
    process_identity.machine = lambda: machine
real = time.time
time.time = lambda: real() + float(clock)
target_lock.RENEW_S = float(renew)
lock = TargetLock(Store("file://" + place), "first")
lock.acquire()
print("held", flush=True)
for line in sys.stdin:
    try:
        lock.hold()
        print("held", flush=True)
    except LedgerError as error:
        print(error, flush=True)
"""


@contextmanager
def holding(
    place: Path, machine: str = "", clock_s: float = 0.0, renew_s: float = 10.0
) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of this target; `machine` is another one's name, whose clock is off by so much."""
    words = [sys.executable, "-c", _HOLDER, str(place), machine, str(clock_s), str(renew_s)]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environ) as process:
        try:
            assert said(process) == "held"
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen[str]) -> str:
    """What the holder says to whether it holds its lock."""
    assert process.stdin is not None
    print("?", file=process.stdin, flush=True)
    return said(process)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch of a second and a half; the messages and decisions are those of a whole one."""
    for name, seconds in (("WATCH_S", 1.5), ("LOOK_S", 0.05), ("SAY_S", 0.5)):
        monkeypatch.setattr(target_lock, name, seconds)


def test_a_second_run_is_refused_while_the_first_lives_and_resumes_at_once_when_it_was_killed(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    with holding(tmp_path) as first:
        with pytest.raises(LedgerError, match=r"another run \(run first, process .* it is running"):
            TargetLock(store, "second").acquire()
        first.send_signal(signal.SIGSTOP)
        wait_until(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED)
        with pytest.raises(LedgerError, match="it is suspended"):
            TargetLock(store, "second").acquire()
        seen = holder(store)
        assert seen is not None
        assert seen["pid"] == first.pid
        first.kill()
        first.wait()
    second = TargetLock(store, "second", say=pytest.fail)
    second.acquire()
    second.release()
    assert holder(store) is None
    third = TargetLock(store, "third", say=pytest.fail)
    third.acquire()
    third.release()


@pytest.mark.parametrize("clock_s", [-7200.0, 0.0, 120.0, 1e8])
def test_a_healthy_run_of_another_machine_keeps_its_target_whatever_its_clock_says(
    clock_s: float, tmp_path: Path
) -> None:
    messages: list[str] = []
    with holding(tmp_path, "elsewhere", clock_s, renew_s=0.3) as first:
        with pytest.raises(LedgerError, match="it has renewed its lock just now"):
            TargetLock(Store(f"file://{tmp_path}"), "second", messages.append).acquire()
        assert ask(first) == "held"
    assert "locked by run first" in messages[0]
    assert "Ctrl-C ends the wait" in messages[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("clock_s", [-7200.0, 0.0, 120.0, 1e8])
def test_a_run_of_another_machine_that_stood_still_is_told_when_it_goes_on(clock_s: float, tmp_path: Path) -> None:
    """Its successor watched it for as long as a lock holds, and keeps what it took; the first publishes nothing."""
    store, messages = Store(f"file://{tmp_path}"), list[str]()
    with holding(tmp_path, "elsewhere", clock_s, renew_s=0.3) as first:
        first.send_signal(signal.SIGSTOP)
        second = TargetLock(store, "second", messages.append)
        second.acquire()
        assert "no sign of run first" in messages[1]
        assert "it is dead" in messages[-1]
        first.send_signal(signal.SIGCONT)
        wait_until(lambda: ask(first).startswith("another run took this target over"), "it goes on")
        second.hold()
        second.release()
    assert json.loads(store.get(KEY) or b"")["run"] == "second"


@pytest.mark.usefixtures("quick")
def test_a_dead_process_number_on_another_machine_of_the_same_name_is_no_proof(tmp_path: Path) -> None:
    """Two containers, or two machines of one image, share a host name, and process 1 is another one in each."""
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(2**22 - 1, machine="fedcba9876543210", ticks=1))
    messages: list[str] = []
    lock = TargetLock(store, "second", messages.append)
    lock.acquire()
    assert messages, "it was watched"
    lock.release()


def test_a_machine_is_told_by_its_boot_its_installation_its_name_and_its_process_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = process_identity.machine()
    assert len(here) == 16
    process_identity.machine.cache_clear()
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    try:
        assert process_identity.machine() != here
    finally:
        process_identity.machine.cache_clear()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "found",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"\0" * 300,
        b'{"run": "x", "host": "y", "pid": 1, "started": "", "renewed": 0, "released": fal',
        b'{"run": "x", "host": "y", "pid": 1, "started": "", "renewed": 0, "released": "no"}',
        b'{"format": 3, "run": "x", "host": "y", "pid": 1, "renewed": 0, "released": true}',
    ],
)
def test_a_lock_that_cannot_be_read_is_held_until_a_person_has_looked(found: bytes, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, found)
    for attempt in (TargetLock(store, "new").acquire, lambda: holder(store)):
        with pytest.raises(LedgerError, match=r"cannot be read.*Ask who else.*remove lock\.json"):
            attempt()
    assert (tmp_path / KEY).read_bytes() == found
    (tmp_path / KEY).unlink()
    lock = TargetLock(store, "new")
    lock.acquire()
    lock.release()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_is_a_folder_is_held(tmp_path: Path) -> None:
    (tmp_path / KEY).mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        TargetLock(Store(f"file://{tmp_path}"), "new").acquire()


@pytest.mark.usefixtures("quick")
def test_the_lock_of_an_earlier_commit_is_watched_too(tmp_path: Path) -> None:
    """It has another name, no machine, and a clock; what its run left is removed, so that it is watched once."""
    store = Store(f"file://{tmp_path}")
    store.put(FORMER_KEY, lock_of(1, renewed=time.time() + 1e6))
    messages: list[str] = []

    def renew(text: str) -> None:
        messages.append(text)
        store.put(FORMER_KEY, lock_of(1, renewed=time.time()))

    with pytest.raises(LedgerError, match="renewed its lock just now"):
        TargetLock(store, "new", renew).acquire()
    lock = TargetLock(store, "new", messages.append)
    lock.acquire()
    assert "it is dead" in messages[-1]
    assert store.get(FORMER_KEY) is None
    lock.release()
    store.put(FORMER_KEY, lock_of(1, released=True))
    TargetLock(store, "new", pytest.fail).refuse_others()


def test_ctrl_c_ends_the_wait_for_another_machines_lock(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(1))
    words = [sys.executable, "-c", _HOLDER, str(tmp_path), "", "0", "10"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ) as waiting:
        assert waiting.stderr is not None
        assert "locked by run old" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in waiting.stderr.read()
    assert json.loads(store.get(KEY) or b"")["run"] == "old"


# Waits for its start, and tries to take every target in turn.
_RACER = """
import os, sys, time
from pathlib import Path
from pipeline.base.errors import LedgerError
from pipeline.storage.kv import Store
from pipeline.storage.target_lock import TargetLock
place, name, at = sys.argv[1], sys.argv[2], float(sys.stdin.readline())
locks = []
for n in range(20):
    lock = TargetLock(Store(f"{place}/{n}"), name)
    while time.monotonic() < at + 0.2 * n:
        pass
    try:
        lock.acquire()
        print(n, "has it", flush=True)
        locks.append(lock)
    except LedgerError as error:
        print(n, error, flush=True)
print("end", flush=True)
sys.stdin.read()
"""


def check_race(place: str) -> None:
    """Three processes reach for each of twenty targets below this URL in the same millisecond; one gets it."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    words = [sys.executable, "-c", _RACER, place]
    pipe = subprocess.PIPE
    racers = [
        subprocess.Popen([*words, name], stdin=pipe, stdout=pipe, text=True, env=environ) for name in ("a", "b", "c")
    ]
    try:
        at = time.monotonic() + 5.0
        for racer in racers:
            assert racer.stdin is not None
            print(at, file=racer.stdin, flush=True)
        told = [line for racer in racers for line in iter(lambda racer=racer: said(racer), "end")]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    winners = [line for line in told if line.endswith("has it")]
    assert sorted(winners) == sorted(f"{n} has it" for n in range(20))
    assert len(told) == 60
    assert all("another run" in line for line in told if line not in winners)


def test_of_several_runs_in_the_same_millisecond_one_gets_each_target(tmp_path: Path) -> None:
    check_race(f"file://{tmp_path}")


def test_a_dead_process_that_nobody_has_waited_for_holds_nothing(tmp_path: Path) -> None:
    """A zombie has its number and its start time still: a container's first process often reaps none."""
    store = Store(f"file://{tmp_path}")
    with holding(tmp_path) as first:
        assert holder(store) is not None
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE
        assert holder(store) is None
        second = TargetLock(store, "second")
        second.acquire()
        second.release()


def lock_of(pid: int, **changes: object) -> bytes:
    """A lock as earlier commits write it; with `machine` and `ticks` as this one does."""
    lock = {"run": "old", "host": socket.gethostname(), "pid": pid, "started": "", "renewed": time.time()}
    return json.dumps(lock | {"released": False} | changes).encode()


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(os.getppid(), machine=process_identity.machine(), ticks=1))
    TargetLock(store, "new", pytest.fail).refuse_others()
    assert holder(store) is None


def test_a_released_lock_is_free_whoever_lives(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(1, host="elsewhere", released=True))
    TargetLock(store, "new", pytest.fail).refuse_others()
    assert holder(store) is None


def test_a_process_is_not_refused_by_its_own_lock_and_status_sees_it(tmp_path: Path) -> None:
    """One run ended with an exception before it could release, and another one begins in the same process."""
    store = Store(f"file://{tmp_path}")
    TargetLock(store, "before").acquire()
    assert holder(store) is not None
    again = TargetLock(store, "again")
    again.acquire()
    again.release()


class Overtaken(Store):
    """Another run takes the target between our look at the lock and our write."""

    overtake = True

    def put_if(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        if self.overtake:
            self.overtake = False
            super().put_if(key, lock_of(os.getppid()), generation)
        return super().put_if(key, value, generation)


class Deaf(Store):
    """The write arrives and its answer is lost, so the store's further try finds the key changed."""

    def put_if(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        super().put_if(key, value, generation)
        return super().put_if(key, value, generation)


def test_of_two_runs_in_the_same_moment_one_gets_the_target(tmp_path: Path) -> None:
    store = Overtaken(f"file://{tmp_path}")
    with pytest.raises(LedgerError, match="in the same moment"):
        TargetLock(store, "late").acquire()
    assert json.loads(store.get(KEY) or b"")["run"] == "old"


def test_a_lock_whose_write_was_answered_twice_is_held(tmp_path: Path) -> None:
    lock = TargetLock(Deaf(f"file://{tmp_path}"), "ours")
    lock.acquire()
    lock.release()


def test_a_renewal_whose_write_was_answered_twice_is_one(tmp_path: Path) -> None:
    """The store's further try finds the key changed by the first one: the lock is still ours, and can be released."""
    store = Deaf(f"file://{tmp_path}")
    lock = TargetLock(store, "ours")
    lock.acquire()
    assert lock._write(lock._generation)
    lock.release()
    assert json.loads(store.get(KEY) or b"")["released"] is True


def test_a_lock_in_other_hands_is_lost_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose machine slept is told at its next renewal, and does not release what is another's."""
    store = Store(f"file://{tmp_path}")
    lock = TargetLock(store, "slept")
    lock.acquire()
    store.put(KEY, lock_of(os.getppid()))
    monkeypatch.setattr(target_lock, "RENEW_S", 0.01)
    lock._renew()
    assert lock.lost.is_set()
    lock.release()
    assert json.loads(store.get(KEY) or b"") == json.loads(store.get(KEY) or b"") | {"run": "old", "released": False}


def test_a_lock_taken_just_before_release_is_left_alone(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    lock = TargetLock(store, "slept")
    lock.acquire()
    store.put(KEY, lock_of(os.getppid()))
    lock.release()
    assert json.loads(store.get(KEY) or b"")["released"] is False


class Flaky(Store):
    """Every other write fails, from the second on."""

    writes = 0

    def put_if(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        self.writes += 1
        if 1 < self.writes < 5 or self.writes % 2 == 0:
            raise TransientError("out of reach")
        return super().put_if(key, value, generation)


def test_a_passing_fault_does_not_end_the_renewals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = TargetLock(Flaky(f"file://{tmp_path}"), "ours")
    lock.acquire()
    Store(f"file://{tmp_path}").put(KEY, lock_of(os.getppid()))
    monkeypatch.setattr(target_lock, "RENEW_S", 0.01)
    lock._renew()
    assert lock.lost.is_set(), "the renewal after the failed one has looked"
    lock.release()


class Away(Store):
    """The store answers no write while it is away."""

    away = False

    def put_if(self, key: str, value: bytes, generation: bytes) -> bytes | None:
        if self.away:
            raise TransientError("out of reach")
        return super().put_if(key, value, generation)


def test_a_run_whose_renewals_fail_waits_and_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on when the store answers, and ends when that takes too long; what it has to record waits."""
    store, messages = Away(f"file://{tmp_path}"), list[str]()
    lock = TargetLock(store, "ours", messages.append)
    ledger = Ledger(store, "d" * 64, 4, "ours", lock.hold)
    for name, seconds in (("RENEW_S", 0.05), ("HOLD_S", 0.5), ("PATIENCE_S", 1.0)):
        monkeypatch.setattr(target_lock, name, seconds)
    lock.acquire()
    store.away = True
    ledger.record([Receipt(1, WRITTEN, 7, 100)])
    wait_until(lambda: target_lock._clock() - lock._renewed_at > target_lock.HOLD_S)
    with pytest.raises(TransientError, match="could not be renewed"):
        ledger.flush()
    assert store.keys("ledger-") == []
    assert "was not renewed" in messages[0]
    store.away = False
    monkeypatch.setattr(target_lock, "PATIENCE_S", GUARD_S)
    ledger.flush()
    assert len(store.keys("ledger-")) == 1
    lock.release()


def test_a_run_that_lost_its_lock_publishes_nothing(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    lock = TargetLock(store, "ours")
    ledger = Ledger(store, "d" * 64, 4, "ours", lock.hold)
    lock.acquire()
    store.put(KEY, lock_of(os.getppid()))
    assert not lock._write(lock._generation)
    lock.lost.set()
    ledger.record([Receipt(1, WRITTEN, 7, 100)])
    with pytest.raises(LedgerError, match="took this target over"):
        ledger.close()
    assert store.keys("ledger-") == []
    lock.release()


@pytest.mark.parametrize("ends", [False, True])
def test_a_lock_taken_in_the_moment_of_a_renewal_stays_the_others(
    ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between our look and our write another run takes it over: a renewal or release must not write over it."""
    store = Overtaken(f"file://{tmp_path}")
    store.overtake = False
    lock = TargetLock(store, "slept")
    lock.acquire()
    store.overtake = True
    if ends:
        lock.release()
    else:
        monkeypatch.setattr(target_lock, "RENEW_S", 0.01)
        lock._renew()
        assert lock.lost.is_set()
        lock.release()
    assert json.loads(store.get(KEY) or b"") | {"run": "old", "released": False} == json.loads(store.get(KEY) or b"")
