"""Law 3: the ledger closes, survives kill -9 and damage, and belongs to one run at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.base.errors import LedgerError
from pipeline.plan.receipt import PENDING, QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.storage import ledger as ledger_module
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
