"""Processes that Python's multiprocessing starts: they run nothing of the program that called emsr."""

from __future__ import annotations

import atexit
import multiprocessing
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from distributed.deploy.spec import close_clusters

from pipeline.base.errors import ClusterError

LOOPBACK = "127.0.0.1"
FILES, FILES_PER_WORKER = 64, 16
"""A process has so many files open, and so many more for each worker that it starts."""


@contextmanager
def starting_processes(workers: int = 1) -> Iterator[None]:
    """Within the block so many processes may be started.

    Each would import the caller's `__main__` again: a script without `if __name__ == "__main__"` would begin its work
    once more in every worker, and what came from standard input cannot be read twice. Neither is needed, so `__main__`
    has no file for that long.

    Raises ClusterError in a process that may start none: a daemonic one, as of multiprocessing.Pool, or one that may
    open too few files, with which Dask waits for ever.
    """
    if multiprocessing.current_process().daemon:
        raise ClusterError(
            "this process is daemonic, and Python lets such a process start no other",
            "a process that may start workers",
            "Use concurrent.futures.ProcessPoolExecutor instead of multiprocessing.Pool, or cluster.kind: address",
        )
    _may_open(FILES + FILES_PER_WORKER * workers)
    _start_tracker()
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    except KeyboardInterrupt:
        # Dask would close a cluster that was interrupted while it began, at exit, and print why it cannot.
        atexit.unregister(close_clusters)
        raise
    finally:
        main.update({"__spec__": None} | hidden)


def refuse_without_loopback() -> None:
    """Raises ClusterError where this process does not reach a port of its own.

    Dask tries to for a minute, and then tells what it could not do, not what is amiss.
    """
    try:
        with socket.create_server((LOOPBACK, 0)) as there, socket.create_connection(there.getsockname()):
            pass
    except OSError as error:
        raise ClusterError(
            f"this machine does not reach itself at {LOOPBACK} ({error.strerror}), where workers talk to this process",
            "a loopback interface that is up and has that address",
            "See `ip address show lo`; `ip link set lo up` starts it",
        ) from None


def _may_open(files: int) -> None:
    """Raise the limit of open files to so many, as far as that is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= files or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < files:
        raise ClusterError(
            f"this process may open {hard} files",
            f"{files} for so many workers",
            "Raise `ulimit -n`, or lower cluster.workers",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


def _start_tracker() -> None:
    """Start multiprocessing's own helper so that it outlives the terminal: of itself it minds SIGHUP alone."""
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        resource_tracker.ensure_running()
    finally:
        signal.signal(signal.SIGHUP, before)
