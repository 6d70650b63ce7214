"""What a worker tells of itself while it works: its name, and what it waits for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress

from distributed import get_worker

from pipeline.worker.job import WAITS


def name() -> str:
    """This process as HOST:PID."""
    return f"{socket.gethostname()}:{os.getpid()}"


def teller(run: str) -> Callable[[str, float], None]:
    """What tells the client of this run that the worker waits for something."""

    def tell(what: str, seconds: float) -> None:
        with suppress(ValueError):  # no worker of Dask: nobody to tell
            get_worker().log_event(WAITS, {"run": run, "who": name(), "what": what, "seconds": seconds})

    return tell
