"""One run at a time per target: a lease object beside the target, renewed while the run lives."""

from __future__ import annotations

import json
import os
import socket
import threading
import time

import psutil

from pipeline.errors import EmsrError, LedgerError
from pipeline.storage.kv import Store

KEY = "lease.json"
TTL_S = 60.0
RENEW_S = 10.0


class TargetLease:
    """Held between `acquire` and `release`; a daemon thread renews it. `lost` is set when somebody else took it over."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.run_id = run_id
        self.lost = threading.Event()
        self._store = store
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refuse_others(self) -> bytes:
        """Raises LedgerError naming the holder while another run is alive; else the store's mark of the free lease."""
        value, generation = self._store.get_with_generation(KEY)
        found = _parse(value)
        if found is not None and (reason := _alive(found)):
            raise LedgerError(
                f"another run ({found['run']}, process {found['pid']} on {found['host']}) writes this target: {reason}",
                "one run per target",
                "Wait for it or stop it; if it is dead for sure, its lease ends by itself within a minute",
            )
        return generation

    def acquire(self) -> None:
        """Raises LedgerError while another run is alive or was faster. A dead run's lease is taken over."""
        generation = self.refuse_others()
        if not self._store.put_if(KEY, self._body(), generation):
            raise LedgerError("another run took this target in the same moment", "one run per target", "Wait for it to end")
        self._thread = threading.Thread(target=self._renew, daemon=True, name="target-lease")
        self._thread.start()

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=RENEW_S)
        if not self.lost.is_set():
            found = _parse(self._store.get(KEY))
            if found is not None and found["run"] == self.run_id:
                self._store.put(KEY, self._body(released=True))

    def _body(self, released: bool = False) -> bytes:
        me = psutil.Process()
        lease = {
            "run": self.run_id,
            "host": socket.gethostname(),
            "pid": me.pid,
            "started": me.create_time(),
            "renewed": time.time(),
            "released": released,
        }
        return json.dumps(lease).encode()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_S):
            try:
                found = _parse(self._store.get(KEY))
                if found is None or found["run"] != self.run_id:
                    self.lost.set()
                    return
                self._store.put(KEY, self._body())
            except EmsrError:
                continue  # a passing fault: the next renewal comes before the lease runs out


def holder(store: Store) -> dict[str, object] | None:
    """Who writes this target now, None where nobody does."""
    lease = _parse(store.get(KEY))
    return lease if lease is not None and _alive(lease, own=True) else None


def _parse(value: bytes | None) -> dict[str, object] | None:
    if value is None:
        return None
    try:
        lease = json.loads(value)
        return {k: lease[k] for k in ("run", "host", "pid", "started", "renewed", "released")}
    except (ValueError, KeyError, TypeError):
        return None


def _alive(holder: dict[str, object], own: bool = False) -> str:
    """Why this holder counts as alive; empty where it does not. A lease of this very process counts only if `own`."""
    if holder["released"]:
        return ""
    if holder["host"] == socket.gethostname():
        try:
            process = psutil.Process(int(str(holder["pid"])))
            same = abs(process.create_time() - float(str(holder["started"]))) < 2.0
            return "it is running" if same and process.status() != psutil.STATUS_ZOMBIE and (own or process.pid != os.getpid()) else ""
        except psutil.NoSuchProcess:
            return ""
    age = time.time() - float(str(holder["renewed"]))
    return f"its lease was renewed {age:.0f} s ago and holds for {TTL_S:.0f} s" if age < TTL_S else ""
