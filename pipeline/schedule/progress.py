"""How far a run is: a live bar on a terminal, JSON lines elsewhere. Counts, output rate, time left."""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.base.output import Output
from pipeline.schedule.totals import RunTotals

LINE_S = 5.0
WAIT_S = 1.0
"""A line that nobody has taken for so many seconds is dropped: work goes before words."""


class RunProgress:
    """A context manager. `update` may be called often: off a terminal it prints a line every LINE_S seconds."""

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self._stream = Output(stream or sys.stderr, WAIT_S)
        self._total, self._done = total, done
        self._began = self._said = time.monotonic()
        self._live = self._stream.isatty()
        self._bar = Progress(
            TextColumn("[bold]slabs"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("[red]{task.fields[trouble]}"),
            console=Console(file=cast(TextIO, self._stream)),
            disable=not self._live,
        )
        self._task = self._bar.add_task("slabs", total=total, completed=done, rate="", trouble="")

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    @property
    def dropped(self) -> int:
        """Lines that nobody has taken."""
        return self._stream.dropped

    def update(self, totals: RunTotals) -> None:
        """Show what the run has done so far, and what it waits for."""
        for line in totals.waits:
            self.say("waiting", workers=line)
        now = time.monotonic()
        closed = self._done + totals.closed
        rate = totals.voxels / max(1e-9, now - self._began)
        if self._live:
            counts = {
                "quarantined": totals.quarantined,
                "refused by the store": totals.requests.refused,
                "leases started again": totals.started_again,
                "workers set aside": len(totals.aside),
            }
            trouble = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
            self._bar.update(self._task, completed=closed, rate=f"{rate / 1e6:.1f} MVx/s", trouble=trouble)
        elif now - self._said >= LINE_S:
            self._said = now
            here = closed - self._done
            left = (self._total - closed) * (now - self._began) / here if here else None
            self.say(
                "progress",
                closed=closed,
                planned=self._total,
                quarantined=totals.quarantined,
                refused=totals.requests.refused,
                retried=totals.requests.retried,
                started_again=totals.started_again,
                set_aside=len(totals.aside),
                voxels_per_s=round(rate),
                seconds_left=left and round(left),
            )

    def say(self, event: str, **fields: Any) -> None:
        """One event: a JSON line off-terminal, a short plain line on a terminal."""
        if self._live:
            self._bar.console.print(f"{event}: " + ", ".join(f"{k} {v}" for k, v in fields.items()), markup=False)
        else:
            print_event(self._stream, event, fields)


class SurveyProgress:
    """The same for the pass that looks for bad sections. `update` is given how many sections are measured."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self._stream = Output(stream or sys.stderr, WAIT_S)
        self._total, self._said = total, time.monotonic()
        self._live = self._stream.isatty()
        self._bar = Progress(
            TextColumn("[bold]sections looked at"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(file=cast(TextIO, self._stream)),
            disable=not self._live,
        )
        self._task = self._bar.add_task("sections", total=total)

    def __enter__(self) -> SurveyProgress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        """Show that so many sections are measured."""
        self._bar.update(self._task, completed=done)
        if not self._live and (done == self._total or time.monotonic() - self._said >= LINE_S):
            self._said = time.monotonic()
            print_event(self._stream, "survey", {"sections": done, "of": self._total})


def print_event(stream: Output, event: str, fields: dict[str, Any]) -> None:
    """One event as a JSON line."""
    print(json.dumps({"time": round(time.time(), 3), "event": event, **fields}), file=stream, flush=True)
