"""Standard output and standard error of a command: what cannot be written there is dropped, and stops no work."""

from __future__ import annotations

import atexit
import errno
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from emsr import start


class Output:
    """A text stream that drops what `stream` does not take: a full disk, a pipe without a reader, no stream at all.

    `dropped` counts lines, and `full` is why a disk took one not, "" where there was none.
    With `wait_s`, a line is also dropped where a pipe or terminal has taken nothing for so many seconds: a pager that
    is not scrolled, or Ctrl-S.
    """

    def __init__(self, stream: TextIO | None, wait_s: float | None = None) -> None:
        self._stream = stream._stream if isinstance(stream, Output) else stream
        self._wait_s = wait_s
        self._unflushed = 0
        self.dropped = 0
        self.full = ""
        reconfigure = getattr(self._stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # names of files may hold what the locale cannot write

    def write(self, text: str) -> int:
        self._unflushed += text.count("\n")
        try:
            if self._stream is None or not self._takes():
                raise OSError
            self._stream.write(text)
            if getattr(self._stream, "line_buffering", False):
                self._unflushed = 0
        except (OSError, ValueError, RuntimeError) as error:  # closed, or a signal came within another write
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None and self._takes():
                self._stream.flush()
                self._unflushed = 0
        except (OSError, ValueError, RuntimeError) as error:
            self._drop(error)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _takes(self) -> bool:
        if self._wait_s is None or self._stream is None:
            return True
        try:
            poll = select.poll()
            poll.register(self._stream.fileno(), select.POLLOUT)
            return bool(poll.poll(1000 * self._wait_s))
        except (OSError, ValueError):
            return True  # no file of the system: a stream in memory

    def _drop(self, error: Exception) -> None:
        self.dropped += self._unflushed
        self._unflushed = 0
        if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
            self.full = os.strerror(error.errno)


@contextmanager
def protected() -> Iterator[None]:
    """Within the block nothing that is printed can raise an error, whatever has become of the standard streams."""
    start.open_standard_files()
    atexit.unregister(_leave_nothing)
    atexit.register(_leave_nothing)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, Output(sys.stdout)), cast(TextIO, Output(sys.stderr))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _leave_nothing() -> None:
    """What could not be written is thrown away. Python would end with another exit code where a stream keeps it."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
