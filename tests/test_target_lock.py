"""One run at a time for each target: the lock, its renewals, and who counts as alive."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.base.errors import LedgerError, TransientError
from pipeline.storage import target_lock
from pipeline.storage.kv import Store
from pipeline.storage.target_lock import KEY, TargetLock, holder

_HOLDER = """
import sys
from pipeline.storage.kv import Store
from pipeline.storage.target_lock import TargetLock
TargetLock(Store("file://" + sys.argv[1]), "first").acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(LedgerError, match="another run \\(first, process"):
            TargetLock(store, "second").acquire()
        seen = holder(store)
        assert seen is not None
        assert seen["pid"] == first.pid
        first.kill()
        first.wait()
    second = TargetLock(store, "second")
    second.acquire()
    second.release()
    assert holder(store) is None
    third = TargetLock(store, "third")
    third.acquire()
    third.release()


def test_a_silent_lock_of_another_machine_expires(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    lock = {
        "run": "far",
        "host": "elsewhere",
        "pid": os.getpid(),
        "started": 0.0,
        "renewed": time.time(),
        "released": False,
    }
    store.put(KEY, json.dumps(lock).encode())
    with pytest.raises(LedgerError, match="far"):
        TargetLock(store, "near").acquire()
    set_back_since = time.time() + 3600
    for renewed in (time.time() - 61, set_back_since):
        store.put(KEY, json.dumps(lock | {"renewed": renewed}).encode())
        near = TargetLock(store, "near")
        near.acquire()
        near.release()


def test_a_dead_process_that_nobody_has_waited_for_holds_nothing(tmp_path: Path) -> None:
    """A zombie has its number and its start time still: a container's first process often reaps none."""
    store = Store(f"file://{tmp_path}")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert holder(store) is not None
        first.kill()
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
        assert psutil.Process(first.pid).status() == psutil.STATUS_ZOMBIE
        assert holder(store) is None
        second = TargetLock(store, "second")
        second.acquire()
        second.release()


def lock_of(pid: int, started: str, **changes: object) -> bytes:
    lock = {"run": "old", "host": socket.gethostname(), "pid": pid, "started": started, "renewed": time.time()}
    return json.dumps(lock | {"released": False} | changes).encode()


def test_another_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(os.getppid(), "long ago"))
    TargetLock(store, "new").refuse_others()
    assert holder(store) is None


def test_a_released_lock_is_free_whoever_lives(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    store.put(KEY, lock_of(1, "long ago", host="elsewhere", released=True))
    TargetLock(store, "new").refuse_others()
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

    def get_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        found = super().get_with_generation(key)
        if self.overtake:
            self.overtake = False
            self.put(key, lock_of(os.getppid(), "now"))
        return found


class Deaf(Store):
    """The write arrives and its answer is lost, so the store's further try finds the key changed."""

    def put_if(self, key: str, value: bytes, generation: bytes) -> bool:
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
    assert lock._rewrite()
    lock.release()
    assert json.loads(store.get(KEY) or b"")["released"] is True


def test_a_lock_in_other_hands_is_lost_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose machine slept is told at its next renewal, and does not release what is another's."""
    store = Store(f"file://{tmp_path}")
    lock = TargetLock(store, "slept")
    lock.acquire()
    store.put(KEY, lock_of(os.getppid(), "now"))
    monkeypatch.setattr(target_lock, "RENEW_S", 0.01)
    lock._renew()
    assert lock.lost.is_set()
    lock.release()
    assert json.loads(store.get(KEY) or b"") == json.loads(store.get(KEY) or b"") | {"run": "old", "released": False}


def test_a_lock_taken_just_before_release_is_left_alone(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    lock = TargetLock(store, "slept")
    lock.acquire()
    store.put(KEY, lock_of(os.getppid(), "now"))
    lock.release()
    assert json.loads(store.get(KEY) or b"")["released"] is False


class Flaky(Store):
    """Every other read fails, from the second on."""

    reads = 0

    def get_with_generation(self, key: str) -> tuple[bytes | None, bytes]:
        self.reads += 1
        if self.reads % 2 == 0:
            raise TransientError("out of reach")
        return super().get_with_generation(key)


def test_a_passing_fault_does_not_end_the_renewals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = TargetLock(Flaky(f"file://{tmp_path}"), "ours")
    lock.acquire()
    Store(f"file://{tmp_path}").put(KEY, lock_of(os.getppid(), "now"))
    monkeypatch.setattr(target_lock, "RENEW_S", 0.01)
    lock._renew()
    assert lock.lost.is_set(), "the renewal after the failed one has looked"
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
