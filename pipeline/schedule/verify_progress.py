"""How far `verify` is: a live bar on a terminal, JSON lines elsewhere. Tasks, rate, time left, what was found."""

from __future__ import annotations

import math
import sys
import time
from typing import TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.base.output import Output
from pipeline.schedule.findings import Findings
from pipeline.schedule.progress import LINE_S, WAIT_S, print_event
from pipeline.schedule.totals import RunTotals


class VerifyProgress:
    """A context manager. `update` may be called often: off a terminal it prints a line every LINE_S seconds."""

    def __init__(self, findings: Findings, stream: TextIO | None = None) -> None:
        self._findings, self._stream = findings, Output(stream or sys.stderr, WAIT_S)
        self._began, self._said = time.monotonic(), -math.inf
        self._live = self._stream.isatty()
        self._bar = Progress(
            TextColumn("[bold]tasks read"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[trouble]}"),
            console=Console(file=cast(TextIO, self._stream)),
            disable=not self._live,
        )
        self._task = self._bar.add_task("tasks", total=findings.chosen, rate="", trouble="")

    def __enter__(self) -> VerifyProgress:
        self._bar.start()
        self.update(RunTotals())
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, totals: RunTotals) -> None:
        """Show what has been read so far, and what is waited for."""
        for line in totals.waits:
            if self._live:
                self._bar.console.print(f"waiting: {line}", markup=False)
            else:
                print_event(self._stream, "waiting", {"workers": line})
        found, seconds = self._findings, max(1e-9, time.monotonic() - self._began)
        done, rate = found.looked_at, totals.bytes / seconds
        if self._live:
            trouble = f"{found.damaged} damaged, {found.unreadable} unreadable"
            told = trouble if found.damaged or found.unreadable else ""
            self._bar.update(self._task, completed=done, rate=f"{rate / 1e6:.0f} MB/s", trouble=told)
        elif time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            fields = {
                "tasks": done,
                "of": found.chosen,
                "damaged": found.damaged,
                "unreadable": found.unreadable,
                "bytes_per_s": round(rate),
                "seconds_left": round((found.chosen - done) * seconds / totals.closed) if totals.closed else None,
            }
            print_event(self._stream, "verify", fields)
