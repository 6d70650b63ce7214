"""Law 3: the ledger closes, survives kill -9 and damage, and belongs to one run at a time."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.base.errors import LedgerError, TransientError
from pipeline.plan.receipt import PENDING, QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.storage import ledger as ledger_module
from pipeline.storage import target_lock
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.storage.target_lock import KEY, TargetLock, holder

DIGEST = "d" * 64


def opened(folder: Path | str, tasks: int, run: str = "r") -> Ledger:
    book = Ledger(Store(f"file://{folder}"), DIGEST, tasks, run)
    book.load()
    return book


def test_what_is_flushed_is_there_for_the_next_run(tmp_path: Path) -> None:
    book = opened(tmp_path, 10)
    book.record([Receipt(3, WRITTEN, 7, 100, 0.5), Receipt(4, SKIPPED), Receipt(9, QUARANTINED, error="why\nmore")])
    book.flush()
    again = opened(tmp_path, 10, "s")
    assert again.counts() == {"pending": 7, "written": 1, "skipped": 1, "quarantined": 1}
    assert again.records()[3] == (WRITTEN, 7, 100)
    assert (again.why(9).error, again.why(9).first_line) == ("why\nmore", "why")
    assert again.bytes_written == 100
    assert list(again.indices(PENDING)) == [0, 1, 2, 5, 6, 7, 8]
    assert again.requeue() == 1
    assert again.counts()["quarantined"] == 0


def test_records_are_flushed_once_the_interval_has_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash loses what was recorded in the last FLUSH_S seconds and nothing older."""
    now = 1000.0
    monkeypatch.setattr(ledger_module, "time", SimpleNamespace(monotonic=lambda: now))
    book = opened(tmp_path, 10)
    book.flush()
    book.record([Receipt(3, WRITTEN)])
    now += ledger_module.FLUSH_S - 0.1
    book.tick()
    assert opened(tmp_path, 10, "s").counts()["written"] == 0
    now += 0.2
    book.tick()
    assert opened(tmp_path, 10, "t").counts()["written"] == 1


def test_newest_record_wins_also_after_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SNAPSHOT_EVERY", 2)
    for run in range(5):
        book = opened(tmp_path, 6, f"r{run}")
        book.record([Receipt(run, QUARANTINED, error="x")])
        book.flush()
        if run:
            book.record([Receipt(run - 1, WRITTEN)])
            book.flush()
    assert opened(tmp_path, 6).counts() == {"pending": 1, "written": 4, "skipped": 0, "quarantined": 1}
    assert any("snapshot" in f.name for f in tmp_path.rglob("*"))


@given(st.integers(0, 400), st.booleans())
def test_a_damaged_segment_loses_its_records_and_nothing_else(cut: int, flip: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        book = opened(folder, 20)
        for i in range(10):
            book.record([Receipt(i, WRITTEN)])
            if i in (4, 9):
                book.flush()
        segment = next(f for f in Path(folder).rglob("segment-*02-*"))
        data = bytearray(segment.read_bytes())
        if flip:
            data[cut % len(data)] ^= 0x40
        else:
            data = data[: cut % len(data)]
        segment.write_bytes(bytes(data))
        again = opened(folder, 20)
        assert again.counts()["written"] == 5
        assert len(again.damaged) == 1


class LedgerMachine(RuleBasedStateMachine):
    """Any sequence of records, flushes and reopenings against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.mkdtemp()
        self.runs = 0
        self.book = opened(self.folder, 30, "r0")
        self.durable: dict[int, int] = {}
        self.queued: dict[int, int] = {}

    @rule(index=st.integers(0, 29), state=st.sampled_from([WRITTEN, SKIPPED, QUARANTINED, PENDING]))
    def record(self, index: int, state: int) -> None:
        self.book.record([Receipt(index, state)])
        self.queued[index] = state

    @rule()
    def flush(self) -> None:
        self.book.flush()
        self.durable |= self.queued
        self.queued = {}

    @rule()
    def crash(self) -> None:
        self.runs += 1
        self.book = opened(self.folder, 30, f"r{self.runs}")
        self.queued = {}

    @invariant()
    def closes(self) -> None:
        expected = self.durable | self.queued
        assert sum(self.book.counts().values()) == 30
        assert all(self.book.state(i) == expected.get(i, PENDING) for i in range(30))

    def teardown(self) -> None:
        import shutil

        shutil.rmtree(self.folder)


TestLedgerMachine = LedgerMachine.TestCase

_WRITER = """
import sys
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.plan.receipt import WRITTEN, Receipt
book = Ledger(Store("file://" + sys.argv[1]), "d" * 64, 1_000_000, sys.argv[2])
book.load()
i = book.counts()["written"]
while True:
    book.record(Receipt(i + k, WRITTEN, i + k) for k in range(50))
    book.flush()
    i += 50
    print(i, flush=True)
"""


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    for trial in range(4):
        with subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), f"run{trial}"], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            acknowledged = int(writer.stdout.readline())
            time.sleep(0.05 * trial)
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in writer.stdout if line.endswith("\n"))])
        counts = opened(tmp_path, 1_000_000).counts()
        assert counts["written"] >= acknowledged
        assert counts["written"] + counts["pending"] == 1_000_000


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
    TargetLock(store, "third").acquire()


def test_a_silent_lease_of_another_machine_runs_out(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}")
    lease = {
        "run": "far",
        "host": "elsewhere",
        "pid": os.getpid(),
        "started": 0.0,
        "renewed": time.time(),
        "released": False,
    }
    store.put(KEY, json.dumps(lease).encode())
    with pytest.raises(LedgerError, match="far"):
        TargetLock(store, "near").acquire()
    set_back_since = time.time() + 3600
    for renewed in (time.time() - 61, set_back_since):
        store.put(KEY, json.dumps(lease | {"renewed": renewed}).encode())
        TargetLock(store, "near").acquire()


def snapshots(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).rglob("snapshot-*"))


def segments(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).rglob("segment-*"))


def five_segments(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks 0 to 4 of 8 written, 100 bytes and 1 s each, a segment each; a snapshot after the second and the fourth."""
    monkeypatch.setattr(ledger_module, "SNAPSHOT_EVERY", 2)
    book = opened(folder, 8)
    for i in range(5):
        book.record([Receipt(i, WRITTEN, i, 100, 1.0)])
        book.flush()
    assert [f.name.split("-")[1] for f in snapshots(folder)] == ["0000000002", "0000000004"]


def test_a_snapshot_that_is_not_what_was_published_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its body says, well-formed, that all tasks are written; its checksum is another. The segments count then."""
    five_segments(tmp_path, monkeypatch)
    for path in snapshots(tmp_path):
        value = path.read_bytes()
        body = zlib.decompress(value[12:])
        path.write_bytes(value[:12] + zlib.compress(body[:16] + b"\xff" + bytes(1)))
    again = opened(tmp_path, 8)
    assert again.counts() == {"pending": 3, "written": 5, "skipped": 0, "quarantined": 0}
    assert again.bytes_written == 500
    assert again.times.tasks == 5


def test_a_snapshot_with_any_byte_wrong_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    five_segments(tmp_path, monkeypatch)
    newest = snapshots(tmp_path)[-1]
    value = newest.read_bytes()
    for i in range(len(value)):
        newest.write_bytes(value[:i] + bytes([value[i] ^ 0x10]) + value[i + 1 :])
        again = opened(tmp_path, 8)
        assert again.counts()["written"] == 5
        assert again.times.tasks == 3, "the snapshot before is the newest that can be read"
        newest.write_bytes(value[:i])
        assert opened(tmp_path, 8).counts()["written"] == 5, "cut off"


def test_the_newest_snapshot_counts_and_nothing_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a snapshot holds is not lost with a segment from before it, nor counted twice."""
    five_segments(tmp_path, monkeypatch)
    for segment in segments(tmp_path)[:4]:
        segment.write_bytes(b"damaged")
    again = opened(tmp_path, 8)
    assert again.damaged == []
    assert again.counts()["written"] == 5
    assert again.bytes_written == 500
    assert again.times.tasks == 1


def test_every_state_comes_back_from_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "SNAPSHOT_EVERY", 1)
    book = opened(tmp_path, 11)
    book.record([Receipt(0, WRITTEN), Receipt(4, SKIPPED), Receipt(9, QUARANTINED, error="x"), Receipt(10, WRITTEN)])
    book.flush()
    for segment in segments(tmp_path):
        segment.write_bytes(b"damaged")
    again = opened(tmp_path, 11)
    states = {0: WRITTEN, 4: SKIPPED, 9: QUARANTINED, 10: WRITTEN}
    assert [again.state(i) for i in range(11)] == [states.get(i, PENDING) for i in range(11)]


def test_a_second_load_forgets_what_was_known(tmp_path: Path) -> None:
    """States, bytes, seconds and damage are those of the store, not the sum of two looks at it."""
    book = opened(tmp_path, 6)
    for i in range(3):
        book.record([Receipt(i, WRITTEN, 7, 100, 2.0 + i)])
        book.flush()
    first, last = segments(tmp_path)[0], segments(tmp_path)[-1]
    last.write_bytes(b"damaged")
    book.load()
    for _ in range(2):
        book.load()
        assert book.counts() == {"pending": 4, "written": 2, "skipped": 0, "quarantined": 0}
        assert book.bytes_written == 200
        timings = book.times
        assert (timings.tasks, timings.total, timings.slowest, timings.slowest_task) == (2, 5.0, 3.0, 1)
        assert len(book.damaged) == 1
    last.unlink()
    first.unlink()
    book.load()
    assert [book.state(i) for i in range(6)] == [PENDING, WRITTEN, PENDING, PENDING, PENDING, PENDING]
    assert book.damaged == []


def test_a_new_run_writes_after_the_last_segment(tmp_path: Path) -> None:
    """Its records are newer than those of the run before, whatever the two are called."""
    for run, state in (("z", QUARANTINED), ("m", SKIPPED), ("a", WRITTEN)):
        book = opened(tmp_path, 3, run)
        book.record([Receipt(1, state)])
        book.flush()
    assert opened(tmp_path, 3).state(1) == WRITTEN


def test_a_segment_of_a_larger_plan_is_damage(tmp_path: Path) -> None:
    book = opened(tmp_path, 9)
    book.record([Receipt(8, WRITTEN)])
    book.flush()
    again = opened(tmp_path, 8)
    assert len(again.damaged) == 1
    assert again.counts()["pending"] == 8


def test_indices_stay_within_what_was_asked(tmp_path: Path) -> None:
    """Also across the blocks in which states are looked through."""
    book = opened(tmp_path, 200_000)
    book.record([Receipt(i, WRITTEN) for i in (5, 65_536, 131_071, 131_072, 150_000)])
    assert list(book.indices(WRITTEN)) == [5, 65_536, 131_071, 131_072, 150_000]
    assert list(book.indices(WRITTEN, range(6, 131_072))) == [65_536, 131_071]
    assert list(book.indices(WRITTEN, range(65_536, 65_537))) == [65_536]
    assert book.count(WRITTEN, range(6, 131_072)) == 2


def test_records_wait_for_the_next_flush_but_not_when_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4096 records are not kept for the rest of the five seconds; a single one is."""
    clock = [1000.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: clock[0])
    book = opened(tmp_path, 10_000)
    clock[0] += ledger_module.FLUSH_S / 2
    book.record([Receipt(0, WRITTEN)])
    book.tick()
    assert segments(tmp_path) == []
    book.record(Receipt(i, WRITTEN) for i in range(1, ledger_module.FLUSH_RECORDS))
    book.tick()
    assert len(segments(tmp_path)) == 1
    book.record([Receipt(9_999, WRITTEN)])
    clock[0] += ledger_module.FLUSH_S + 0.1
    book.tick()
    assert opened(tmp_path, 10_000).counts()["written"] == ledger_module.FLUSH_RECORDS + 1


class Away(Store):
    """A store that takes no segment for a while."""

    gone = True

    def put(self, key: str, value: bytes) -> None:
        if self.gone and "segment-" in key:
            raise TransientError("out of reach")
        super().put(key, value)


def test_what_cannot_be_published_waits_and_a_run_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: clock[0])
    store = Away(f"file://{tmp_path}")
    book = Ledger(store, DIGEST, 4, "r")
    book.load()
    book.record([Receipt(0, WRITTEN), Receipt(1, QUARANTINED, error="why")])
    while clock[0] < 1000 + ledger_module.PATIENCE_S:
        clock[0] += ledger_module.FLUSH_S
        book.tick()
    clock[0] += 2 * ledger_module.FLUSH_S
    with pytest.raises(TransientError):
        book.tick()
    store.gone = False
    book.flush()
    assert opened(tmp_path, 4).counts() == {"pending": 2, "written": 1, "skipped": 0, "quarantined": 1}


def test_bytes_are_added_up_over_segments_and_records(tmp_path: Path) -> None:
    book = opened(tmp_path, 5)
    book.record([Receipt(0, WRITTEN, 0, 30), Receipt(1, WRITTEN, 0, 12)])
    book.flush()
    book.record([Receipt(2, WRITTEN, 0, 8)])
    book.flush()
    assert book.bytes_written == opened(tmp_path, 5).bytes_written == 50


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
