"""Dask and Tornado tell durations by the time of day; here they are given a clock that nobody sets.

A clock that is set back by an hour would otherwise hold every message between client, scheduler and workers for that
hour (`distributed.batched` waits for a time of day), and one set forward would make workers look dead (`worker-ttl`).
"""

from __future__ import annotations

import contextlib
import sys
import time

from distributed import Client, Worker, WorkerPlugin
from tornado.ioloop import IOLoop

_TIME_OF_DAY, _MONOTONIC = time.time(), time.monotonic()


def steady() -> float:
    """Unix time as it was when this process began, and the seconds since."""
    return _TIME_OF_DAY + (time.monotonic() - _MONOTONIC)


def install() -> None:
    """Make Tornado and the modules of `distributed` that are loaded use `steady` in this process, until it ends."""
    IOLoop.time = lambda self: steady()  # type: ignore[method-assign]
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "distributed" and getattr(module, "time", None) is time.time:
            module.time = steady  # type: ignore[attr-defined]


def install_everywhere(client: Client) -> None:
    """Call `install` in this process, in all workers, later ones too, and in the scheduler where it has emsr (its own
    messages wait otherwise).
    """
    install()
    with contextlib.suppress(Exception):
        client.run_on_scheduler(install)
    client.register_plugin(_Steady())


class _Steady(WorkerPlugin):  # type: ignore[misc]
    name = "emsr-steady-clock"

    def setup(self, worker: Worker) -> None:
        install()
