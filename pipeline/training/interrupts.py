"""Ctrl-C, SIGTERM and SIGHUP during a training run."""

from __future__ import annotations

import signal
import threading


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) end the run after the step in progress; a second one ends it at
    once. Where SIGHUP is ignored, as under nohup, it stays so.

    Within the `with` block, the event is set by the first signal; the second raises KeyboardInterrupt.
    """

    def __enter__(self) -> threading.Event:
        self._received = threading.Event()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self._received

    def _handle(self, number: int, frame: object) -> None:
        if self._received.is_set():
            raise KeyboardInterrupt
        self._received.set()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
