"""One run at a time per target: a lock object beside the target, renewed while the run lives.

No clock of another machine is believed. Whoever finds a lock of another machine watches it for WATCH_S seconds of a
clock of its own: a lock that is renewed meanwhile is held, one that is not is taken over. A holder whose renewals do
not get through counts on its lock for HOLD_S seconds only, which is less.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pipeline.base.errors import EmsrError, LedgerError, TargetError, TransientError
from pipeline.storage import process_identity
from pipeline.storage.kv import Store

KEY = "lock.json"
FORMER_KEY = "lease.json"
"""What earlier commits call it. Theirs is watched too; they do not look for ours."""
FORMAT = 2
RENEW_S = 10.0
RENEW_AGAIN_S = 2.0
"""After a renewal that failed."""
HOLD_S = 40.0
WATCH_S = 60.0
LOOK_S = 2.0
"""Between two looks at a lock that is watched."""
SAY_S = 15.0
PATIENCE_S = 300.0
"""A run waits for so long while its renewals fail."""
TRIES = 3
MAX_TOLD = 100
"""Of so many workers the lock tells. It is written every RENEW_S seconds, and may lie in an object store."""


def _say(text: str) -> None:
    print(f"emsr: {text}", file=sys.stderr, flush=True)


class TargetLock:
    """Held between `acquire` and `release`, and renewed by a thread. `lost` is set when another run took it over."""

    def __init__(self, store: Store, run_id: str, say: Callable[[str], None] = _say) -> None:
        self.run_id = run_id
        self.lost = threading.Event()
        self.workers: dict[str, dict[str, float]] = {}
        self.aside: dict[str, str] = {}
        """What workers have done and why some were set aside, by name: the last MAX_TOLD of each at most. Every renewal
        writes it, for `status`."""
        self.in_all: dict[str, int] = {}
        """How many `workers` there are, and `set_aside`."""
        self._store, self._say = store, say
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen_dead: tuple[bytes, bytes] | None = None
        self._generation = b""
        self._writes = 0
        self._renewed_at = 0.0

    def refuse_others(self) -> bytes:
        """Returns the store's generation of the free lock, for `put_if`, after a wait where only that tells.

        Raises LedgerError naming the holder while another run is alive, or where the lock cannot be read.
        """
        first: tuple[bytes, bytes] | None = None
        began = said = 0.0
        while True:
            found, seen = self._look()
            if found is None or seen == self._seen_dead:
                return seen[0]
            if process_identity.machine() and found.get("machine") == process_identity.machine():
                raise _held(found, _how_it_runs(found))
            now = time.monotonic()  # which stands still while this machine sleeps: the watch is one with open eyes
            if first is None:
                first, began, said = seen, now, now
                self._say(
                    f"the target is locked by {_name(found)}, which cannot be looked at from here. If it renews its "
                    f"lock in the next {WATCH_S:.0f} s this run ends, else it takes the lock over. Ctrl-C ends the wait"
                )
            elif seen != first:
                raise _held(found, "it has renewed its lock just now")
            elif now - began > WATCH_S:
                self._say(f"run {found['run']} has not renewed its lock for {now - began:.0f} s: it is dead")
                self._seen_dead = seen
                return seen[0]
            elif now - said > SAY_S:
                said = now
                self._say(f"no sign of run {found['run']} for {now - began:.0f} of {WATCH_S:.0f} s")
            time.sleep(LOOK_S)

    def acquire(self) -> None:
        """Raises LedgerError while another run is alive or was faster. A dead run's lock is taken over."""
        generation = self.refuse_others()
        if not self._write(generation):
            raise LedgerError(
                "another run took this target in the same moment", "one run per target", "Wait for it to end"
            )
        if self._store.get(FORMER_KEY) is not None:
            self._store.delete(FORMER_KEY)
        self._thread = threading.Thread(target=self._renew, daemon=True, name="target-lock")
        self._thread.start()

    def hold(self) -> None:
        """Returns while this run holds the target: to be called before anything is handed out or published.

        Waits while renewals fail. Raises LedgerError once the lock is lost, TransientError after PATIENCE_S seconds.
        """
        began: float | None = None
        while True:
            if self.lost.is_set():
                raise LedgerError(
                    "another run took this target over while this one was out of reach",
                    "one run per target",
                    "See which one is alive, then run again",
                )
            if _clock() - self._renewed_at < HOLD_S:
                return
            if began is None:
                began = time.monotonic()
                self._say(
                    f"the target's lock was not renewed for {HOLD_S:.0f} s, since {self._store.url} does not answer or "
                    f"this process stood still. Waiting for up to {PATIENCE_S:.0f} s"
                )
            elif time.monotonic() - began > PATIENCE_S:
                raise TransientError(f"the lock {self._store.url}/{KEY} could not be renewed for {PATIENCE_S:.0f} s")
            time.sleep(0.2)

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=RENEW_S)
        # The lock of a process that is gone counts for nothing anyway; while a renewal hangs, its outcome is unknown.
        with suppress(EmsrError):
            if not self.lost.is_set() and (self._thread is None or not self._thread.is_alive()):
                self._write(self._generation, released=True)

    def _look(self) -> tuple[dict[str, Any] | None, tuple[bytes, bytes]]:
        """The lock that another run may hold, None where none can, and what was seen, to tell two looks apart."""
        for tries_left in reversed(range(TRIES)):
            try:
                value, generation = self._store.get_with_generation(KEY)
                former = self._store.get(FORMER_KEY)
                locks = _parse(value, KEY), _parse(former, FORMER_KEY)
                break
            except (ValueError, TargetError) as error:
                if not tries_left:
                    raise _unreadable(self._store, error) from error
                time.sleep(LOOK_S)  # without hard links a lock is not there in one step
        held = [lock for lock in locks if lock is not None and _may_be_held(lock)]
        return (held[0] if held else None), (generation, former or b"")

    def _write(self, generation: bytes, released: bool = False) -> bool:
        """Write the lock anew. Returns False, and leaves the other's, where it is not of `generation` any more."""
        self._writes += 1
        body, began = self._body(released), _clock()
        fault = TransientError(f"{self._store.url}/{KEY} could not be replaced")
        for _ in range(TRIES):
            try:
                written = self._store.put_if(KEY, body, generation)
                if written is None:
                    # Where the answer to an earlier try was lost, this is our own lock.
                    value, seen = self._store.get_with_generation(KEY)
                    if self._is_this_write(value):
                        written = seen
                    elif seen != generation:
                        return False
            except TransientError as error:
                fault, written = error, None
            if written is not None:
                self._generation, self._renewed_at = written, began
                return True
        raise fault

    def _is_this_write(self, value: bytes | None) -> bool:
        with suppress(ValueError):
            found = _parse(value, KEY)
            return found is not None and (found["run"], found.get("writes")) == (self.run_id, self._writes)
        return False

    def _body(self, released: bool = False) -> bytes:
        lock = {
            "format": FORMAT,
            "run": self.run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(),
            "machine": process_identity.machine(),
            "ticks": process_identity.ticks(os.getpid()),
            "writes": self._writes,
            "renewed": time.time(),
            "released": released,
            "workers": self.workers,
            "set_aside": self.aside,
            "in_all": self.in_all,
        }
        return json.dumps(lock).encode()

    def _renew(self) -> None:
        wait = RENEW_S
        while not self._stop.wait(wait):
            try:
                if not self._write(self._generation):
                    self.lost.set()
                    return
                wait = RENEW_S
            except EmsrError:
                wait = min(RENEW_S, RENEW_AGAIN_S)  # a passing fault, or one that ends the run elsewhere: see `hold`


def holder(store: Store) -> dict[str, Any] | None:
    """Who writes this target now, None where nobody seems to. For display: the other machine's clock is believed.

    Raises LedgerError where the lock cannot be read.
    """
    try:
        lock = _parse(store.get(KEY), KEY)
    except ValueError as error:
        raise _unreadable(store, error) from error
    if lock is None or not _may_be_held(lock, own=True):
        return None
    here = lock.get("machine") == process_identity.machine() != ""
    return lock if here or abs(time.time() - float(lock["renewed"])) < WATCH_S else None


def last_workers(store: Store) -> dict[str, dict[str, float]]:
    """What each worker of the run that holds, or last held, this target has done: tasks, quarantined, seconds, last
    (Unix time).
    """
    try:
        workers = json.loads(store.get(KEY) or b"{}").get("workers", {})
        return {
            str(name): {k: float(totals[k]) for k in ("tasks", "quarantined", "seconds", "last")}
            for name, totals in workers.items()
        }
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def last_aside(store: Store) -> dict[str, str]:
    """The workers that the same run has set aside, and why."""
    try:
        aside = json.loads(store.get(KEY) or b"{}").get("set_aside", {})
        return {str(name): str(why) for name, why in aside.items()}
    except (ValueError, RecursionError, AttributeError):
        return {}


def left_out(store: Store) -> dict[str, int]:
    """Of how many more `workers` and `set_aside` the lock does not tell."""
    try:
        lock = json.loads(store.get(KEY) or b"{}")
        return {what: int(count) - len(lock[what]) for what, count in lock.get("in_all", {}).items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}


def _parse(value: bytes | None, key: str) -> dict[str, Any] | None:
    """The lock as it is written, None for an absent one. Raises ValueError where this is no lock that emsr knows."""
    if value is None:
        return None
    try:
        lock = json.loads(value)
        int(lock["pid"]), float(lock["renewed"]), lock["run"], lock["host"], "machine" in lock and int(lock["ticks"])
        known = isinstance(lock["released"], bool) and lock.get("format", 1) in (1, FORMAT)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{key} is no lock of emsr's: {value[:40]!r}, {len(value)} bytes") from None
    if not known:
        raise ValueError(f"{key} was written by another version of emsr")
    return dict(lock)


def _may_be_held(lock: dict[str, Any], own: bool = False) -> bool:
    """Whether a run may hold this lock. What this very process wrote counts only if `own`: that run has ended."""
    if lock["released"]:
        return False
    if not process_identity.machine() or lock.get("machine") != process_identity.machine():
        return True
    pid, began = int(lock["pid"]), int(lock["ticks"])
    return not process_identity.has_ended(pid, began) and (own or pid != os.getpid())


def _name(lock: dict[str, Any]) -> str:
    return f"run {lock['run']}, process {lock['pid']} on {lock['host']}"


def _how_it_runs(lock: dict[str, Any]) -> str:
    stopped = process_identity.is_stopped(int(lock["pid"]))
    return "it is suspended (kill it, or let it go on)" if stopped else "it is running"


def _held(lock: dict[str, Any], why: str) -> LedgerError:
    return LedgerError(
        f"another run ({_name(lock)}) writes this target: {why}",
        "one run per target",
        "Wait for it or stop it, then run again: what is written is kept",
    )


def _unreadable(store: Store, why: Exception) -> LedgerError:
    return LedgerError(
        f"the target's lock cannot be read, so another run may hold it ({store.url}: {why})",
        "one run per target",
        f"Ask who else runs emsr on this target. If nobody does, remove {KEY} and {KEY}.* there, and {FORMER_KEY} if "
        "that is the one; then run again",
    )


def _started() -> str:
    """When this process began, as earlier commits read it."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        return f"{process_identity.ticks(os.getpid())} ticks after boot {boot.read().strip()}"


def _clock() -> float:
    """Seconds by a clock that nobody sets and that goes on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
