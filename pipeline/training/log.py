"""What a training run reports: lines on the terminal, TensorBoard, metrics.jsonl, and sample images."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from models.training.loop import Progress, to_json

LINE_S = 10.0
"""Seconds between two lines on the terminal, apart from validations and the last step."""


class Log:
    """Writes every step to TensorBoard, and every validation to metrics.jsonl and samples/, in `folder`.

    `resumed_at` is the step from which the run goes on: what TensorBoard holds of later steps is taken back.
    """

    def __init__(self, folder: Path, resumed_at: int) -> None:
        self._folder = folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        self._last_line = 0.0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def report(self, progress: Progress) -> None:
        """Called after every step."""
        for name, value in progress.losses.items():
            self._writer.add_scalar(f"loss/{name}", value, progress.step)
        for name, value in progress.scores.items():
            self._writer.add_scalar(f"validation/{name}", value, progress.step)
        if progress.scores:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(to_json(progress) + "\n")
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


def line(progress: Progress) -> str:
    """A step in one line: losses, scores where there are any, steps per second, and the time that is left."""
    left = (progress.steps - progress.step) / progress.steps_per_s
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items())
    scores = "".join(
        f"  {name} {value:.4f}{' (best)' if name in progress.best else ''}" for name, value in progress.scores.items()
    )
    speed = f"{progress.steps_per_s:.2f} steps/s  {_clock(left)} left"
    return f"step {progress.step}/{progress.steps}  {losses}{scores}  {speed}"


def _clock(seconds: float) -> str:
    """`1:02:03` for 3723 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
