"""One training run: the stage's networks and volumes put together, the checkpoint resumed, the loop run."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from lightning_fabric import Fabric

from models import WeightsError
from models.training.crops import Augmentation, Crops, centre_windows
from models.training.loop import Loop, Recipe
from models.training.stages import Batch, Stage
from pipeline.base.errors import NetworkError, UserError
from pipeline.config.stage import StageConfig
from pipeline.training.data import open_volume
from pipeline.training.interrupts import Interrupts
from pipeline.training.log import Log
from pipeline.training.stage import prepare, save


def run(config: StageConfig) -> int:
    """Train, or go on from the checkpoint in config.output, to the last step or an interrupt.

    Returns the number of steps done, fewer than config.steps after an interrupt. Raises UserError before the first.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    stage = _checked(lambda: prepare(config))
    crops = _crops(config, stage)
    windows = _windows(config, stage)
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=config.precision)
    fabric.launch()
    config.output.mkdir(parents=True, exist_ok=True)
    loop = Loop(fabric, stage, _recipe(config), config.output, config.digest())
    _resume(loop, config)
    with Interrupts() as interrupted, Log(config.output, resumed_at=loop.step) as log:
        loop.run(
            crops,
            windows,
            lambda name, network, facts: save(config, name, network, facts),
            log.report,
            interrupted.is_set,
        )
    return loop.step


def _checked(build: Callable[[], Stage]) -> Stage:
    """Raises NetworkError where a file of weights is damaged, of another network, or cannot be read."""
    try:
        return build()
    except (WeightsError, ValueError) as error:
        raise NetworkError(str(error)) from None
    except OSError as error:
        raise NetworkError(
            f"cannot be read: {error}", "the file of an earlier stage or of a loss", "Check its path"
        ) from None


def _crops(config: StageConfig, stage: Stage) -> Crops:
    """What is trained on."""
    data, scale = config.data, config.network.scale
    reach = 2 * data.drift + data.crop
    volumes = [open_volume(volume, scale, stage.sections, reach) for volume in data.train]
    return Crops(volumes, stage.sections, data.crop, scale, Augmentation(data.flips, data.drift, data.noise))


def _windows(config: StageConfig, stage: Stage) -> list[Batch]:
    """What is validated on: windows from the middle of each volume, shared out evenly among the volumes."""
    data, scale = config.data, config.network.scale
    volumes = [open_volume(volume, scale, stage.validated, 4 * scale) for volume in data.validate_on]
    share = max(1, data.validation_windows // max(1, len(volumes)))
    return [
        window
        for volume in volumes
        for window in centre_windows(volume, stage.validated, data.validation_crop, scale, share)
    ]


def _recipe(config: StageConfig) -> Recipe:
    return Recipe(
        config.steps,
        config.batch,
        config.rate,
        config.periods,
        average=config.average,
        seed=config.seed,
        validate_every=config.validate_every,
        checkpoint_every=config.checkpoint_every,
    )


def _resume(loop: Loop, config: StageConfig) -> None:
    try:
        if loop.resume():
            print(f"emsr: going on from step {loop.step}", file=sys.stderr)
    except ValueError as error:
        raise UserError(
            f"{error}", "the stage.yaml it was begun with", f"Put it back, or empty {config.output}"
        ) from None
