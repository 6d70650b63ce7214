"""`run_faults.py COMMAND volume.yaml ...` runs a command with the stand-in network and logs every slab; one may be bad.

    FAULT_LOG     a file: lines `begin|end TASK PID TIME RUN`, appended by every worker
    FAULT_TASK    the slab concerned
    FAULT_KIND    fail: raises; hang: never returns, holding the device; exhaust: allocates until it is killed
    FAULT_FLUSH_S seconds between the ledger's segments, instead of 5
    FAULT_SNAPSHOT_EVERY  segments between the ledger's snapshots, instead of 64

COMMAND `here` is the main job in this process alone. Local workers load this file before they begin, so what is
installed below reaches them too.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import standin

from pipeline.storage import ledger
from pipeline.worker import lease
from pipeline.worker import slab as one_slab

standin.install()
ledger.FLUSH_S = float(os.environ.get("FAULT_FLUSH_S", ledger.FLUSH_S))
ledger.SNAPSHOT_EVERY = int(os.environ.get("FAULT_SNAPSHOT_EVERY", ledger.SNAPSHOT_EVERY))
# Dask's preloading imports a file again that is already there.
_process_slab = getattr(lease.process_slab, "undisturbed", lease.process_slab)
_begin = getattr(one_slab.begin, "undisturbed", one_slab.begin)


def _log(event: str, index: int, run: str) -> None:
    if path := os.environ.get("FAULT_LOG"):
        with open(path, "a") as log:
            log.write(f"{event} {index} {os.getpid()} {time.monotonic():.3f} {run}\n")


def process_slab(opened: Any, index: int, caches: Any = None) -> Any:
    _log("begin", index, opened.job.run or "none")
    receipt = _process_slab(opened, index, caches)
    _log("end", index, opened.job.run or "none")
    return receipt


def begin(network: Any, lr: Any, sections: Any, slab: Any, caches: Any = None) -> Any:
    if os.environ.get("FAULT_TASK") == str(slab.index):
        {"fail": _fail, "hang": _hang, "exhaust": _exhaust}[os.environ["FAULT_KIND"]]()
    return _begin(network, lr, sections, slab, caches)


def _fail() -> None:
    raise ArithmeticError("this slab always fails")


def _hang() -> None:
    time.sleep(10_000)


def _exhaust() -> None:
    """This really allocates, within a limit that spares the machine, and ends as the kernel would end it."""
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), resource.RLIM_INFINITY))
    taken = []
    try:
        while True:
            taken.append(np.ones(16 << 20, np.uint8))
    except MemoryError:
        os.kill(os.getpid(), signal.SIGKILL)


process_slab.undisturbed, begin.undisturbed = _process_slab, _begin  # type: ignore[attr-defined]
lease.process_slab, one_slab.begin = process_slab, begin
if (
    "FAKETIME_TIMESTAMP_FILE" in os.environ
):  # libfaketime 0.9.10 refuses the sleep of Python 3.11 and later (EINVAL), by whatever the clock jumps
    time.sleep = lambda seconds: threading.Event().wait(seconds)  # type: ignore[assignment, func-returns-value]

if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "here":
        from conftest import run_here

        run_here(Path(arguments[0]))
        sys.exit(0)
    standin.reach_workers(__file__)
    sys.exit(importlib.import_module(f"pipeline.{command}").main(arguments))
