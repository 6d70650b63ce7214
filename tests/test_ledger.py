"""Law 3: the ledger closes, and survives kill -9 and damage."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pipeline.base.errors import TransientError
from pipeline.plan.receipt import PENDING, QUARANTINED, SKIPPED, WRITTEN, Receipt
from pipeline.storage import ledger as ledger_module
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger

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
    checksums, known = again.checksums()
    assert (checksums[3], known.nonzero()[0].tolist()) == (7, [3])
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


def test_a_ledger_of_before_checksums_covered_names_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its segments and snapshots count, and what is written after them is newer."""
    five_segments(tmp_path, monkeypatch)
    for path in segments(tmp_path) + snapshots(tmp_path):
        body = path.read_bytes()[12:]
        path.write_bytes(b"EMSRLED1" + zlib.crc32(body).to_bytes(4, "little") + body)
    book = opened(tmp_path, 8, "s")
    assert book.counts()["written"] == 5
    assert book.times.tasks == 1, "the newest snapshot was read"
    book.record([Receipt(4, PENDING), Receipt(7, WRITTEN, 70)])
    book.flush()
    again = opened(tmp_path, 8)
    assert again.damaged == []
    assert list(again.indices(WRITTEN)) == [0, 1, 2, 3, 7]
    checksums, known = again.checksums()
    assert checksums.tolist() == [0, 1, 2, 3, 4, 0, 0, 70]
    assert known.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 7]


def test_two_segments_with_each_others_bytes_are_damaged(tmp_path: Path) -> None:
    """Each is whole; read in the wrong order, what was queued to be written again would count as written."""
    book = opened(tmp_path, 4)
    for state in (WRITTEN, PENDING):
        book.record([Receipt(1, state, 9)])
        book.flush()
    first, last = segments(tmp_path)
    one, other = first.read_bytes(), last.read_bytes()
    first.write_bytes(other)
    last.write_bytes(one)
    again = opened(tmp_path, 4)
    assert len(again.damaged) == 2
    assert again.counts()["written"] == 0


def test_a_segment_in_a_snapshots_place_is_no_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the old format too, whose checksums do not tell the two apart."""
    five_segments(tmp_path, monkeypatch)
    body = segments(tmp_path)[0].read_bytes()[12:]
    snapshots(tmp_path)[-1].write_bytes(b"EMSRLED1" + zlib.crc32(body).to_bytes(4, "little") + body)
    snapshots(tmp_path)[0].write_bytes(segments(tmp_path)[1].read_bytes())
    assert opened(tmp_path, 8).counts()["written"] == 5


def test_strange_names_in_a_ledgers_folder_are_passed_over(tmp_path: Path) -> None:
    book = opened(tmp_path, 4)
    book.record([Receipt(1, WRITTEN)])
    book.flush()
    for name in ("segment-", "segment-x-r", "snapshot-", "snapshot-12", "segment-0000000001-r.tmp"):
        segments(tmp_path)[0].with_name(name).write_bytes(b"x")
    assert opened(tmp_path, 4).counts()["written"] == 1


def test_the_checksum_that_counts_is_the_newest_of_a_written_record(tmp_path: Path) -> None:
    book = opened(tmp_path, 4)
    for receipt in (Receipt(1, WRITTEN, 5), Receipt(1, PENDING, 0), Receipt(2, WRITTEN, 6), Receipt(2, WRITTEN, 7)):
        book.record([receipt])
        book.flush()
    checksums, known = opened(tmp_path, 4).checksums()
    assert (checksums.tolist(), known.tolist()) == ([0, 5, 7, 0], [False, True, True, False])
