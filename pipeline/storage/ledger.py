"""Which tasks are done, durable beside the target: planned = written + skipped + quarantined.

One writer publishes records as immutable segment objects and, now and then, a packed snapshot of all states. Only PUT,
GET and LIST are used, so that files, S3 and GCS behave alike. A record is queued only after the task's objects are
durable; a crash loses at most the records of one flush interval, never data: those tasks run again and write the same
bytes.

    <target>.emsr/ledger-<digest>/segment-<seq>-<run>       records
                                 /snapshot-<seq>-<run>      states after that segment, two bits a task
                                 /quarantine/<index>.json   why a task was given up

Segments stay: they alone hold checksums. 4 bytes a task in every snapshot would cost a run of 10^7 tasks 40 MB every
five minutes.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import tenacity
from numpy.typing import NDArray

from pipeline.base.errors import LedgerError, TransientError
from pipeline.plan.receipt import PENDING, QUARANTINED, WRITTEN, Receipt
from pipeline.plan.task_states import TaskRecord
from pipeline.storage.kv import Store

RECORD = np.dtype([("index", "<u8"), ("state", "u1"), ("checksum", "<u4"), ("bytes", "<u8"), ("seconds", "<f4")])
_MAGIC = b"EMSRLED2"
_OLD_MAGIC = b"EMSRLED1"
"""Its checksums do not cover the object's name: two segments with each other's bytes would go unseen."""
_NAME = re.compile(r"(segment|snapshot)-(\d+)-.+")
FLUSH_S = 5.0
FLUSH_RECORDS = 4096
MAX_REASONS = 256
"""So many reasons of quarantined tasks are put at the same time, with one segment: the run waits for them."""
PATIENCE_S = 300.0
"""A run goes on for so long while nothing can be published. Records wait; a crash would lose them all."""
SNAPSHOT_EVERY = 64


@dataclass(frozen=True)
class Quarantine:
    """Why a task was quarantined, by which worker process (HOST:PID), and when (Unix time)."""

    error: str = ""
    worker: str = ""
    time: float = 0.0

    @property
    def first_line(self) -> str:
        """The reason without its traceback."""
        return (self.error.splitlines() or ["no reason kept"])[0]


@dataclass
class TaskTimes:
    """Seconds that tasks took, of those recorded since the newest snapshot."""

    tasks: int = 0
    total: float = 0.0
    slowest: float = 0.0
    slowest_task: int = -1

    def add(self, records: NDArray[np.void]) -> None:
        done = records[records["state"] == WRITTEN]
        if not len(done):
            return
        worst = int(done["seconds"].argmax())
        self.tasks += len(done)
        self.total += float(done["seconds"].sum())
        if done["seconds"][worst] > self.slowest:
            self.slowest, self.slowest_task = float(done["seconds"][worst]), int(done["index"][worst])


class Ledger(TaskRecord):
    """States of `tasks` tasks. Not thread-safe: one thread of one client writes it.

    `hold` is called before anything is published; it raises where this run no longer holds the target.
    """

    def __init__(
        self, store: Store, digest: str, tasks: int, run_id: str, hold: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(tasks)
        self._store, self._hold = store, hold
        self._prefix = folder(digest)
        self.run_id = run_id
        self._queued: list[Receipt] = []
        self._seq = 0
        self._since_snapshot = 0
        self._flushed = self._tried = time.monotonic()
        self._failing_since = 0.0
        self.bytes_written = 0
        self.times = TaskTimes()
        self.damaged: list[str] = []
        """Keys of segments that could not be read: their tasks count as pending again."""

    def load(self) -> None:
        """Newest readable snapshot, then the segments after it. What was known before is forgotten."""
        self._state[:] = PENDING
        self.bytes_written, self._since_snapshot, self.times = 0, 0, TaskTimes()
        self.damaged.clear()
        segments, snapshots = self._names("segment"), self._names("snapshot")
        self._seq = max(map(_seq, segments + snapshots), default=0)
        start = 0
        for name in reversed(snapshots):
            if self._load_snapshot(name):
                start = _seq(name)
                break
        for records in self._segments([n for n in segments if _seq(n) > start]):
            self._apply(records)
            self.times.add(records)
            self._since_snapshot += 1

    def _names(self, kind: str) -> list[str]:
        """The names of all segments or snapshots, oldest first. What has no such name is none."""
        names = [key[len(self._prefix) :] for key in self._store.keys(f"{self._prefix}{kind}-")]
        return sorted((n for n in names if _NAME.fullmatch(n)), key=lambda name: (_seq(name), name))

    def _segments(self, names: Iterable[str]) -> Iterator[NDArray[np.void]]:
        for key, value in self._store.get_all(self._prefix + n for n in names):
            body = _body(key[len(self._prefix) :], value)
            records = None if body is None or len(body) % RECORD.itemsize else np.frombuffer(body, RECORD)
            if records is None or (len(records) and int(records["index"].max()) >= self.tasks):
                if key not in self.damaged:
                    self.damaged.append(key)
            else:
                yield records

    def _apply(self, records: NDArray[np.void]) -> None:
        # With a repeated index numpy keeps the last value: the newest record wins.
        self._state[records["index"]] = records["state"]
        self.bytes_written += int(records["bytes"].sum())

    def checksums(self) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """The checksum of each task by the newest record that says it is written, and which tasks have one.

        All segments are read, since snapshots hold none. It takes 5 bytes a task.
        """
        checksums, known = np.zeros(self.tasks, np.uint32), np.zeros(self.tasks, np.bool_)
        for records in self._segments(self._names("segment")):
            written = records[records["state"] == WRITTEN]
            checksums[written["index"]] = written["checksum"]
            known[written["index"]] = True
        return checksums, known

    def newest_key(self) -> str | None:
        """The key of one object of this ledger, the same for all who look; None where there is none yet."""
        names = self._names("segment")
        return self._prefix + names[-1] if names else None

    def requeue(self, state: int = QUARANTINED) -> int:
        """Tasks of this state count as pending again (for this run); returns how many."""
        chosen = self._state == state
        self._state[chosen] = PENDING
        return int(np.count_nonzero(chosen))

    def record(self, receipts: Iterable[Receipt]) -> None:
        """Queue records of tasks whose objects are durable. They become durable with the next flush."""
        for receipt in receipts:
            self._state[receipt.index] = receipt.state
            self._queued.append(receipt)

    def tick(self) -> None:
        """Flush when it is time: every FLUSH_S seconds or FLUSH_RECORDS records. A passing fault is waited out for
        PATIENCE_S seconds.
        """
        now = time.monotonic()
        if (
            not self._queued
            or (len(self._queued) < FLUSH_RECORDS and now - self._flushed < FLUSH_S)
            or now - self._tried < FLUSH_S / 5
        ):
            return
        try:
            self._publish()
        except TransientError:
            self._failing_since = self._failing_since or now
            if now - self._failing_since > PATIENCE_S:
                raise

    def close(self) -> None:
        """The last flush of a run: passing faults are waited out here too."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_delay(PATIENCE_S),
            wait=tenacity.wait_fixed(FLUSH_S),
            reraise=True,
        )
        retrying(self.flush)

    def flush(self) -> None:
        """Publish what is queued; returns when it is durable. What cannot be published stays queued."""
        self._publish()
        while self._queued:
            self._publish()

    def _publish(self) -> None:
        """Publish the first of what is queued, as a segment, or all of it; the reasons are durable before it."""
        self._tried = time.monotonic()
        if self._queued:
            self._hold()
            self._put_segment(self._first_of_queue())
        if not self._queued:
            self._flushed = time.monotonic()
        self._failing_since = 0.0

    def _first_of_queue(self) -> list[Receipt]:
        """What goes out with the next segment: no more than MAX_REASONS quarantined ones."""
        quarantined = (n for n, receipt in enumerate(self._queued) if receipt.state == QUARANTINED)
        return self._queued[: next(itertools.islice(quarantined, MAX_REASONS, None), len(self._queued))]

    def _put_segment(self, receipts: list[Receipt]) -> None:
        given_up = [receipt for receipt in receipts if receipt.state == QUARANTINED]
        if given_up:
            self._store.put_all({self._reason_key(receipt.index): self._reason(receipt) for receipt in given_up})
        records = np.array([(r.index, r.state, r.checksum, r.bytes, r.seconds) for r in receipts], RECORD)
        self._seq += 1
        self._put(f"segment-{self._seq:010d}-{self.run_id}", records.tobytes())
        self.bytes_written += int(records["bytes"].sum())
        del self._queued[: len(receipts)]
        self._since_snapshot += 1
        if self._since_snapshot >= SNAPSHOT_EVERY and not self._queued:  # a snapshot tells what segments tell
            self._put(f"snapshot-{self._seq:010d}-{self.run_id}", self._pack_snapshot())
            self._since_snapshot = 0

    def _reason_key(self, index: int) -> str:
        return f"{self._prefix}quarantine/{index}.json"

    def _reason(self, receipt: Receipt) -> bytes:
        kept = {"index": receipt.index, "error": receipt.error, "worker": receipt.worker}
        return json.dumps(kept | {"run": self.run_id, "time": time.time()}, indent=1).encode()

    def _put(self, name: str, body: bytes) -> None:
        self._store.put(self._prefix + name, _MAGIC + struct.pack("<I", _crc(name, body)) + body)

    def why(self, index: int) -> Quarantine:
        """What was kept when this task was quarantined."""
        value = self._store.get(self._reason_key(index))
        try:
            kept = json.loads(value or b"{}")
            return Quarantine(str(kept.get("error", "")), str(kept.get("worker", "")), float(kept.get("time", 0.0)))
        except (ValueError, RecursionError, TypeError, AttributeError):
            return Quarantine()

    def _pack_snapshot(self) -> bytes:
        low, high = np.packbits(self._state & 1), np.packbits(self._state >> 1)
        return zlib.compress(struct.pack("<QQ", self.tasks, self.bytes_written) + low.tobytes() + high.tobytes(), 1)

    def _load_snapshot(self, name: str) -> bool:
        packed = _body(name, self._store.get(self._prefix + name))
        try:
            body = zlib.decompress(packed or b"")
        except zlib.error:
            return False  # damaged, or an old segment under a snapshot's name
        tasks, self.bytes_written = struct.unpack("<QQ", body[:16])
        if tasks != self.tasks:
            raise LedgerError(
                f"the ledger counts {tasks} tasks, the plan {self.tasks}",
                "the same plan",
                "Restore the volume.yaml of the first run",
            )
        halves = np.frombuffer(body, np.uint8, offset=16).reshape(2, -1)
        low, high = (np.unpackbits(bits, count=tasks) for bits in halves)
        self._state = (low + 2 * high).astype(np.uint8)
        return True


def folder(digest: str = "") -> str:
    """The folder of the ledger of this plan, below the sidecar; without a digest, how all their keys begin."""
    return f"ledger-{digest[:16]}/" if digest else "ledger-"


def _seq(name: str) -> int:
    return int(name.split("-")[1])


def _crc(name: str, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(name.encode()))


def _body(name: str, value: bytes | None) -> bytes | None:
    """What was published under this name, without its head; None where `value` is anything else."""
    if value is None or len(value) < 12 or value[:8] not in (_MAGIC, _OLD_MAGIC):
        return None
    body = value[12:]
    wanted = _crc(name, body) if value[:8] == _MAGIC else zlib.crc32(body)
    return body if wanted == struct.unpack("<I", value[8:12])[0] else None
