"""What a training run reports: lines on the terminal, TensorBoard, metrics.jsonl, and sample images."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from models.training.loop import Progress, to_json

LINE_S = 10.0
"""Seconds between two lines on the terminal, apart from validations and the last step."""


class Log:
    """Writes every step to TensorBoard, and every validation to metrics.jsonl and samples/, in `folder`.

    `resumed_at` is the step from which the run goes on: what is there of later steps is taken back. `notes` are added
    to every line of metrics.jsonl. Its methods raise OSError where the folder takes no more.
    """

    def __init__(self, folder: Path, resumed_at: int, notes: dict[str, Any] | None = None) -> None:
        self._folder, self._notes = folder, notes or {}
        self._metrics = folder / "metrics.jsonl"
        self._hook = threading.excepthook
        threading.excepthook = self._of_thread
        self._take_back(resumed_at)
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        self._last_line = 0.0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._writer.close()
        except OSError:
            if error is None:
                raise
        finally:
            threading.excepthook = self._hook

    def _of_thread(self, args: threading.ExceptHookArgs) -> None:
        """A failed write of TensorBoard's thread is raised by its next call, and needs no traceback before."""
        if not isinstance(args.exc_value, OSError):
            self._hook(args)

    def _take_back(self, step: int) -> None:
        if not self._metrics.exists():
            return
        kept = [
            line for line in self._metrics.read_text(errors="replace").splitlines(keepends=True) if _step(line) <= step
        ]
        unfinished = self._metrics.with_suffix(".unfinished")
        try:
            unfinished.write_text("".join(kept))
            unfinished.replace(self._metrics)
        finally:
            unfinished.unlink(missing_ok=True)

    def note(self, step: int, what: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl that is no validation."""
        with self._metrics.open("a") as file:
            file.write(json.dumps({"step": step, **what}) + "\n")

    def report(self, progress: Progress) -> None:
        """Called after every step."""
        for name, value in progress.losses.items():
            self._writer.add_scalar(f"loss/{name}", value, progress.step)
        for name, value in progress.scores.items():
            self._writer.add_scalar(f"validation/{name}", value, progress.step)
        if progress.scores:
            with self._metrics.open("a") as file:
                file.write(json.dumps(to_json(progress) | self._notes) + "\n")
            self._save_sample(progress)
        now = time.monotonic()
        if progress.scores or now - self._last_line >= LINE_S or progress.step == progress.steps:
            self._last_line = now
            print(line(progress), file=sys.stderr, flush=True)

    def _save_sample(self, progress: Progress) -> None:
        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(progress.images[:1]):
            self._writer.add_image(f"sample/{i}", image.cpu(), progress.step)
            pixels = (image[0] * 255).round().byte().cpu().numpy()
            Image.fromarray(pixels).save(folder / f"step-{progress.step:07d}-{i}.png")


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def line(progress: Progress) -> str:
    """A step in one line: losses, scores where there are any, steps per second, the share of time in which the device
    was busy, and the time that is left.
    """
    left = (progress.steps - progress.step) / progress.steps_per_s
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    scores = "".join(
        f"  {name} {value:.4f}{' (best)' if name in progress.best else ''}" for name, value in progress.scores.items()
    )
    busy = "" if progress.busy is None else f"  device busy {100 * progress.busy:.0f} %"
    speed = f"{progress.steps_per_s:.2f} steps/s{busy}  {_clock(left)} left"
    return f"step {progress.step}/{progress.steps}  {losses}{scores}  {speed}"


def _clock(seconds: float) -> str:
    """`1:02:03` for 3723 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
