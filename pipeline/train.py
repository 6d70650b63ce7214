"""`python -m pipeline.train stage.yaml`: train one stage, or go on where it stopped."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base.command import INTERRUPTED, guarded
from pipeline.base.errors import NetworkError, UserError
from pipeline.config import stage as train_config
from pipeline.config.stage import StageConfig
from pipeline.training.data import open_volume

if TYPE_CHECKING:
    from torch import nn

    from models.training.loop import Loop, Progress
    from models.training.stages import Stage

LINE_S = 10.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.train", description="Train one stage of the network, or go on where it stopped."
    )
    parser.add_argument("stage", help="path of stage.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: train(train_config.load(args.stage)))


def train(config: StageConfig) -> int:
    """Exit code 0 when the last step is done, 130 when it was interrupted: the same command goes on. Raises UserError."""
    try:
        import torch
        from lightning_fabric import Fabric

        from models.training.crops import Augmentation, Crops, centre_windows
        from models.training.loop import Loop, Recipe
        from pipeline.training.stage import prepare
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed", "it is needed for training", "pip install 'emsr[train]'"
        ) from None
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    stage = _checked(lambda: prepare(config))
    data, scale = config.data, config.network.scale
    reach = 2 * data.drift + data.crop
    volumes = [open_volume(v, scale, stage.sections, reach) for v in data.train]
    held_out = [open_volume(v, scale, stage.validated, 4 * scale) for v in data.validate_on]
    crops = Crops(volumes, stage.sections, data.crop, scale, Augmentation(data.flips, data.drift, data.noise))
    share = max(1, data.validation_windows // max(1, len(held_out)))
    windows = [
        w for volume in held_out for w in centre_windows(volume, stage.validated, data.validation_crop, scale, share)
    ]
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=config.precision)
    fabric.launch()
    recipe = Recipe(
        config.steps,
        config.batch,
        config.rate,
        config.periods,
        average=config.average,
        seed=config.seed,
        validate_every=config.validate_every,
        checkpoint_every=config.checkpoint_every,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    loop = Loop(fabric, stage, recipe, config.output, config.digest())
    _resume(loop, config)
    with _Interrupts() as interrupts, _Log(config.output, resumed_at=loop.step) as log:
        done = loop.run(
            crops,
            windows,
            lambda name, network, facts: _save(config, name, network, facts),
            log.tell,
            interrupts.is_set,
        )
    if done:
        return 0
    print(f"emsr: stopped at step {loop.step} of {config.steps}; the same command goes on", file=sys.stderr)
    return INTERRUPTED


def _checked(build: Callable[[], Stage]) -> Stage:
    from models import WeightsError

    try:
        return build()
    except (WeightsError, ValueError) as error:
        raise NetworkError(str(error)) from None
    except OSError as error:
        raise NetworkError(
            f"cannot be read: {error}", "the file of an earlier stage or of a loss", "Check its path"
        ) from None


def _resume(loop: Loop, config: StageConfig) -> None:
    try:
        if loop.resume():
            print(f"emsr: going on from step {loop.step}", file=sys.stderr)
    except ValueError as error:
        raise UserError(
            f"{error}", "the stage.yaml it was begun with", f"Put it back, or empty {config.output}"
        ) from None


def _save(config: StageConfig, name: str, network: nn.Module, facts: dict[str, Any]) -> None:
    from pipeline.training.stage import save

    unfinished = config.output / f"{name}.unfinished"
    save(config, unfinished, network, facts)
    unfinished.replace(config.output / f"{name}.safetensors")


class _Interrupts:
    """Ctrl-C and SIGTERM end the run after the step in progress; a second one ends it at once."""

    def __enter__(self) -> threading.Event:
        self._asked = threading.Event()
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self._asked

    def _handle(self, number: int, frame: object) -> None:
        if self._asked.is_set():
            raise KeyboardInterrupt
        self._asked.set()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class _Log:
    """A line now and then on the terminal; every step in TensorBoard, validations with images and in metrics.jsonl."""

    def __init__(self, folder: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1)
        self._said = 0.0

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def tell(self, told: Progress) -> None:
        from models.training.loop import to_json

        for name, value in told.losses.items():
            self._writer.add_scalar(f"loss/{name}", value, told.step)
        for name, value in told.scores.items():
            self._writer.add_scalar(f"validation/{name}", value, told.step)
        if told.scores:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(to_json(told) + "\n")
            self._show(told)
        if told.scores or time.monotonic() - self._said >= LINE_S or told.step == told.steps:
            self._said = time.monotonic()
            left = (told.steps - told.step) / told.steps_per_s
            losses = "  ".join(f"{name} {value:.4f}" for name, value in told.losses.items())
            scores = "".join(
                f"  {name} {value:.4f}{' (best)' if name in told.best else ''}" for name, value in told.scores.items()
            )
            print(
                f"step {told.step}/{told.steps}  {losses}{scores}  {told.steps_per_s:.2f} steps/s  {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def _show(self, told: Progress) -> None:
        from PIL import Image

        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        for i, image in enumerate(told.images[:1]):
            self._writer.add_image(f"sample/{i}", image.cpu(), told.step)
            Image.fromarray((image[0] * 255).round().byte().cpu().numpy()).save(
                folder / f"step-{told.step:07d}-{i}.png"
            )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


if __name__ == "__main__":
    sys.exit(main())
