"""What every command does around its work: one clear message for a mistake, an exit code, no traceback for a user."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.base import output
from pipeline.base.errors import ConfigError, EmsrError, UserError
from pipeline.base.requirements import not_installed
from pipeline.base.secrets import redacted
from pipeline.base.waits import end_soon, watched_command

INTERRUPTED = 130
THREADS = 64
"""A command and its one worker have 36 between them on a machine of two cores."""
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU)

_EXHAUSTED = {
    errno.EMFILE: "this process may open no more files. Raise `ulimit -n`",
    errno.ENFILE: "this machine may open no more files. End other programs, or raise fs.file-max",
    errno.EAGAIN: "no more processes or threads may be started. Raise `ulimit -u`, or lower cluster.workers",
    errno.ENOMEM: "there is no memory left. Raise `ulimit -v`, or give this job more memory",
    errno.ENOSPC: "there is no space left. Free some, in /dev/shm too, or set TMPDIR to a folder with space",
    errno.EDQUOT: "the disk quota is used up. Free some space, or set TMPDIR elsewhere",
    errno.EFBIG: "a file would be larger than this process may write. Raise `ulimit -f`",
    errno.EROFS: "the file system is read-only. Write elsewhere; /dev/shm and TMPDIR have to take files too",
}
"""What a process can run out of, wherever it is noticed: no fault of emsr's."""


def guarded(work: Callable[[], int], prints: bool = False) -> int:
    """The exit code of `work`; 2 for a user's mistake, 1 for another fault, each with a message; 130 when a signal
    ends it.

    What is printed meanwhile and cannot be written is dropped. The exit code tells of that only where `prints` says
    that the command is there to print, and a disk is full: a reader that has seen enough may close its pipe. What
    `work` waits for is said, and does not last for ever: see `waits`.
    """
    with output.protected():
        try:
            with _signals_interrupt(), watched_command():
                _refuse_deleted_folder()
                _may_start_threads()
                code = work()
            if prints:
                _refuse_full_disk()
            return code
        except ConfigError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        except EmsrError as error:
            print(f"emsr: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt as error:
            by = f" by {error}" if str(error) else ""
            print(f"emsr: interrupted{by}", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if os.environ.get("EMSR_DEBUG"):
                print(redacted(traceback.format_exc()), file=sys.stderr)
            if lacks := exhausted(error):
                print(f"emsr: {lacks}.", file=sys.stderr)
                return 2
            if lacks := not_installed(error):
                print(f"emsr: {lacks}", file=sys.stderr)
                return 2
            print(
                f"emsr: a fault inside emsr: {type(error).__name__}: {redacted(str(error))}. "
                "Set EMSR_DEBUG=1 for the traceback and report it.",
                file=sys.stderr,
            )
            return 1


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within the block `handler` is called for each signal that asks a program to end.

    They are Ctrl-C, SIGTERM, SIGHUP (the terminal is gone) unless it is ignored as under nohup, and SIGXCPU (`ulimit
    -t`). Outside the main thread, where Python sets none, nothing changes.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGXCPU:  # the kernel sends it again each second, and would so end what is being closed
            hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
            resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
        handler(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    chosen = [s for s in _ENDING if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in chosen}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stopping(stop: Callable[[str], None]) -> Iterator[None]:
    """Within the block the first such signal calls `stop` with its name; a second Ctrl-C or SIGTERM ends at once.

    SIGHUP and SIGXCPU come several times by themselves: their number says nothing.
    """
    told = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal told
        if not told:
            told = True
            stop(signal.Signals(number).name)
        elif number in (signal.SIGINT, signal.SIGTERM):
            end_soon(INTERRUPTED)
            raise KeyboardInterrupt

    with handling(handler):
        yield


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Every such signal ends the work as Ctrl-C does: by KeyboardInterrupt, so that what is open is closed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        end_soon(INTERRUPTED)
        raise KeyboardInterrupt("" if number == signal.SIGINT else signal.Signals(number).name)

    with handling(interrupt):
        yield


def _refuse_deleted_folder() -> None:
    """Everything that starts a process or reads a relative path asks for the current folder."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("the current folder was deleted", "a folder that is there", "Change to another one") from None


def _may_start_threads() -> None:
    """Raise the limit of this user's processes and threads to THREADS, as far as that is allowed.

    Libraries in C++ end the process where they cannot start a thread. Root is under no such limit.
    """
    soft, hard = (limit if limit >= 0 else THREADS for limit in resource.getrlimit(resource.RLIMIT_NPROC))
    if os.geteuid() == 0 or soft >= THREADS:
        return
    if hard < THREADS:
        raise UserError(f"this user may start {hard} processes and threads", f"{THREADS} at least", "Raise `ulimit -u`")
    resource.setrlimit(resource.RLIMIT_NPROC, (THREADS, hard))


def _refuse_full_disk() -> None:
    """Raises UserError where a file that standard output goes to has not taken all that was printed."""
    sys.stdout.flush()
    if why := getattr(sys.stdout, "full", ""):
        raise UserError(f"what was printed could not be written ({why})", "a place that takes it", "Try another one")


def exhausted(error: BaseException | None) -> str:
    """What the process ran out of, if that is why this error or one that led to it was raised."""
    while error is not None:
        unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)
        if unmapped or isinstance(error, MemoryError):
            return _EXHAUSTED[errno.ENOMEM]
        if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
            return "no folder for temporary files takes one. Set TMPDIR to a folder that does"
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            where = f"{error.filename}: " if error.filename else ""
            return where + _EXHAUSTED[error.errno]
        if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
            return _EXHAUSTED[errno.EAGAIN]
        error = error.__cause__ or error.__context__
    return ""
