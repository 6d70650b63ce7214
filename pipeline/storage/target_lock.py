"""One run at a time per target: a lock object beside the target, renewed while the run lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress

import psutil

from pipeline.base.errors import EmsrError, LedgerError
from pipeline.storage.kv import Store

KEY = "lock.json"
TTL_S = 60.0
RENEW_S = 10.0


class TargetLock:
    """Held between `acquire` and `release`, and renewed by a thread. `lost` is set when another run took it over."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.run_id = run_id
        self.lost = threading.Event()
        self.workers: dict[str, dict[str, float]] = {}
        self.aside: dict[str, str] = {}
        """What each worker has done, by name. Every renewal writes it, for `status`."""
        self._store = store
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refuse_others(self) -> bytes:
        """Raises LedgerError naming the holder while another run is alive; else the store's generation of the free
        lock, for `put_if`.
        """
        value, generation = self._store.get_with_generation(KEY)
        found = _parse(value)
        if found is not None and (reason := _alive(found)):
            raise LedgerError(
                f"another run ({found['run']}, process {found['pid']} on {found['host']}) writes this target: {reason}",
                "one run per target",
                "Wait for it or stop it; if it is dead for sure, its lock ends by itself within a minute",
            )
        return generation

    def acquire(self) -> None:
        """Raises LedgerError while another run is alive or was faster. A dead run's lock is taken over."""
        generation = self.refuse_others()
        # Where the answer to the first try was lost, the second one finds our own lock.
        if not self._store.put_if(KEY, self._body(), generation) and not self._is_ours():
            raise LedgerError(
                "another run took this target in the same moment", "one run per target", "Wait for it to end"
            )
        self._thread = threading.Thread(target=self._renew, daemon=True, name="target-lock")
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=RENEW_S)
        with suppress(EmsrError):  # the lock of a process that is gone counts for nothing anyway
            if not self.lost.is_set():
                self._rewrite(released=True)

    def _rewrite(self, released: bool = False) -> bool:
        """Write the lock anew. Returns False, and writes nothing, where another run has taken it."""
        value, generation = self._store.get_with_generation(KEY)
        found = _parse(value)
        if found is None or found["run"] != self.run_id:
            return False
        return self._store.put_if(KEY, self._body(released), generation) or self._is_ours()

    def _is_ours(self) -> bool:
        found = _parse(self._store.get(KEY))
        return found is not None and found["run"] == self.run_id

    def _body(self, released: bool = False) -> bytes:
        lock = {
            "run": self.run_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "renewed": time.time(),
            "released": released,
            "workers": self.workers,
            "set_aside": self.aside,
        }
        return json.dumps(lock).encode()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                if not self._rewrite():
                    self.lost.set()
                    return
            except EmsrError:
                continue  # a passing fault: the next renewal comes before the lock expires


def holder(store: Store) -> dict[str, object] | None:
    """Who writes this target now, None where nobody does."""
    lock = _parse(store.get(KEY))
    return lock if lock is not None and _alive(lock, own=True) else None


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
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def last_aside(store: Store) -> dict[str, str]:
    """The workers that the same run has set aside, and why."""
    try:
        aside = json.loads(store.get(KEY) or b"{}").get("set_aside", {})
        return {str(name): str(why) for name, why in aside.items()}
    except (ValueError, AttributeError):
        return {}


def _parse(value: bytes | None) -> dict[str, object] | None:
    if value is None:
        return None
    try:
        lock = json.loads(value)
        return {k: lock[k] for k in ("run", "host", "pid", "started", "renewed", "released")}
    except (ValueError, KeyError, TypeError):
        return None


def _alive(holder: dict[str, object], own: bool = False) -> str:
    """Why this holder counts as alive, or "". A lock of this very process counts only if `own`."""
    if holder["released"]:
        return ""
    if holder["host"] == socket.gethostname():
        try:
            process = psutil.Process(int(str(holder["pid"])))
            same = _started(process.pid) == holder["started"]
            return (
                "it is running"
                if same and process.status() != psutil.STATUS_ZOMBIE and (own or process.pid != os.getpid())
                else ""
            )
        except psutil.NoSuchProcess:
            return ""
    # A renewal from the future by more than TTL_S means a clock that was set back since: no sign of life either.
    age = time.time() - float(str(holder["renewed"]))
    return f"its lock was renewed {age:.0f} s ago and holds for {TTL_S:.0f} s" if abs(age) < TTL_S else ""


def _started(pid: int) -> str:
    """When this process began, the same whatever is done to the clock. Raises psutil.NoSuchProcess."""
    try:
        with open(f"/proc/{pid}/stat") as stat, open("/proc/sys/kernel/random/boot_id") as boot:
            # Fields are counted from behind the command's name, which may hold anything.
            return f"{stat.read().rpartition(')')[2].split()[19]} ticks after boot {boot.read().strip()}"
    except (OSError, IndexError):
        return f"{psutil.Process(pid).create_time():.0f}"
