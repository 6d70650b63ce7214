"""One training run: the stage's networks and volumes put together, the checkpoint resumed, the loop run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import LightningEnvironment

from models import WeightsError
from models.training.crops import Augmentation, Crops, centre_windows
from models.training.loop import Loop, NotFiniteError, Recipe
from models.training.ranks import Ranks
from models.training.stages import Batch, Stage
from pipeline.base.command import stopping
from pipeline.base.errors import NetworkError, UserError
from pipeline.config.output_folder import check_output
from pipeline.config.stage import CHANGEABLE, EARLIER_WORDS, StageConfig
from pipeline.process import device
from pipeline.training import checkpoint, devices, processes
from pipeline.training.data import OpenVolume, open_volume, shared_sections
from pipeline.training.log import Log
from pipeline.training.run_folder import check_space, held, refuse_lost_checkpoint, writing
from pipeline.training.sample_waits import SampleWaits
from pipeline.training.stage import contents, prepare, save


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, once all of it has been read and checked. `gpus` is the number of GPUs, 0 on a CPU;
    `settings` are those of the checkpoint.
    """

    config: StageConfig
    gpus: int
    stage: Stage
    crops: Crops
    windows: list[Batch]
    settings: dict[str, Any]
    notes: dict[str, Any]


def run(config: StageConfig) -> int:
    """Train, or go on from the checkpoint in config.output, to the last step or an interrupt.

    Returns the number of steps done, fewer than config.steps after an interrupt. Raises UserError, most of them before
    the first step.
    """
    prepared = prepare_run(config)
    for name, count in prepared.notes.items():
        print(f"emsr: {count} {name.replace('_', ' ')}: scores on them say little of other data", file=sys.stderr)
    with held(config.output):
        found, complaints = checkpoint.read(config.output, torch.device("cpu"))
        for line in complaints:
            print(f"emsr: {line}; the checkpoint before it is used", file=sys.stderr)
        if found is None:
            refuse_lost_checkpoint(config.output)
        prepared = with_precision(prepared, found)
        changed = {} if found is None else _changes(prepared, found)
        with processes.others(prepared.config, bool(prepared.gpus)), devices.memory(config):
            loop = make_loop(prepared, Ranks(0, config.devices, processes.waits))
            if found is not None:
                _go_on(loop, found, changed, config.output)
            check_space(config.output, loop.checkpoint_bytes(), loop.weights_bytes())
            return _train(prepared, loop, changed)


def run_rank(config: StageConfig, ranks: Ranks, folder: Path) -> None:
    """The part of a device after the first: the same steps, on samples of its own, nothing written. `config` is that of
    rank 0, which has chosen the precision.
    """
    prepared = prepare_run(config)
    processes.join(folder, ranks, bool(prepared.gpus))
    with devices.memory(config):
        loop = make_loop(prepared, ranks)
        found, _ = checkpoint.read(config.output, torch.device("cpu"))
        if found is not None:
            loop.go_on(found, try_again=bool(_changes(prepared, found)))
        loop.run(prepared.crops, prepared.windows, lambda *_: None, lambda _: None)


def with_precision(prepared: Prepared, found: dict[str, Any] | None) -> Prepared:
    """`prepared` with the precision that was stated, else that of the checkpoint `found`, else what is chosen."""
    config, gpus = prepared.config, prepared.gpus
    if config.precision is not None:
        return prepared
    kept = None if found is None else _settings_of(found).get("precision")
    if kept is not None:
        devices.check(kept, gpus, f"The checkpoint in {config.output} keeps its own: give another one to change it")
    taken = kept or devices.choose(gpus)
    config = config.model_copy(update={"precision": taken})
    return replace(prepared, config=config, settings=prepared.settings | {"precision": taken})


def prepare_run(config: StageConfig) -> Prepared:
    """All that a run needs but its checkpoint. Raises UserError."""
    gpus = devices.gpus(config)
    if config.precision is not None:
        devices.check(config.precision, gpus, "Give one of these, or none")
    if config.threads or config.devices > 1:
        torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // config.devices))
    torch.manual_seed(config.seed)
    data, scale = config.data, config.network.scale
    check_output(config.output, [u for v in (*data.train, *data.validate_on) for u in (v.url, v.lr) if u is not None])
    stage = _checked(lambda: prepare(config))
    devices.check_memory(config, stage.sections)
    train = [
        open_volume(volume, scale, stage.sections, 2 * data.drift + data.crop, here=f"data.train.{i}")
        for i, volume in enumerate(data.train)
    ]
    validate_on = [
        open_volume(volume, scale, stage.validated, 4 * scale, here=f"data.validate_on.{i}")
        for i, volume in enumerate(data.validate_on)
    ]
    crops = Crops(
        [opened.volume for opened in train],
        stage.sections,
        data.crop,
        scale,
        Augmentation(data.flips, data.drift, data.noise),
    )
    shared = shared_sections(train, validate_on)
    notes = {"sections_validated_on_that_are_also_trained_on": shared} if shared else {}
    settings = config.settings(contents(config) | _voxels("train", train) | _voxels("validate_on", validate_on))
    return Prepared(config, gpus, stage, crops, _windows(config, stage, validate_on), settings, notes)


def _voxels(key: str, volumes: list[OpenVolume]) -> dict[str, str]:
    """What lies at the urls of data.train or data.validate_on, by their dotted keys."""
    found = {f"data.{key}[{i}].url": f"voxels {opened.digest()[:16]}" for i, opened in enumerate(volumes)}
    return found | {f"data.{key}[{i}].lr": f"voxels {o.lr[:16]}" for i, o in enumerate(volumes) if o.lr}


def make_loop(prepared: Prepared, ranks: Ranks) -> Loop:
    """The networks on their device, ready for the first step."""
    config = prepared.config
    assert config.precision is not None
    devices.set_rounding(config.precision, prepared.gpus)
    fabric = Fabric(
        accelerator="cuda" if prepared.gpus else "cpu",
        devices=[ranks.rank] if prepared.gpus else 1,
        plugins=[
            devices.of_fabric(config.precision, prepared.gpus),
            LightningEnvironment(),  # otherwise it looks for Slurm, and warns where `srun` is not used
        ],
    )
    return Loop(fabric, prepared.stage, _recipe(config), ranks)


def _train(prepared: Prepared, loop: Loop, changed: dict[str, list[Any]]) -> int:
    config, folder = prepared.config, prepared.config.output
    interrupted = threading.Event()
    with (
        writing(folder, loop.checkpoint_bytes()),
        stopping(lambda _: interrupted.set()),  # after the step in progress
        Log(folder, loop.step, prepared.notes) as log,
    ):
        if changed:
            log.note(loop.step, {"changed": changed})
        try:
            loop.run(
                prepared.crops,
                prepared.windows,
                lambda name, network, facts: save(config, name, network, facts | prepared.notes),
                log.report,
                lambda state: checkpoint.write(folder, state | {"settings": prepared.settings}),
                interrupted.is_set,
                SampleWaits(),
            )
        except NotFiniteError as error:
            raise _advice(error, config) from None
    return loop.step


def _advice(error: NotFiniteError, config: StageConfig) -> UserError:
    parts = [name for name, value in error.parts.items() if not abs(value) < float("inf")]
    what = " and ".join(parts) or "a gradient"
    of = ", ".join(f"{name} {value:.3g}" for name, value in error.parts.items())
    rounding = "" if config.precision == "float32" else ", give precision float32"
    return UserError(
        f"step {error.step + 1}: {what} is not finite ({of})",
        "finite numbers",
        f"Lower rate ({config.rate:g}) or the weight of that loss{rounding}: the same command then goes on from the "
        f"step before, and without a change it leaves this step out. To go back further, remove {checkpoint.NAME}",
    )


def _checked(build: Callable[[], Stage]) -> Stage:
    """Raises NetworkError where a file of weights is damaged, of another network, or cannot be read."""
    try:
        return build()
    except (WeightsError, ValueError) as error:
        raise NetworkError(str(error)) from None
    except OSError as error:
        raise NetworkError(
            f"{error.filename or error} cannot be read ({error.strerror or error})",
            "the file of an earlier stage or of a loss",
            "Check its path",
        ) from None


def _windows(config: StageConfig, stage: Stage, volumes: list[OpenVolume]) -> list[Batch]:
    """What is validated on: windows from the middle of each volume, shared out evenly among the volumes."""
    data = config.data
    share = max(1, data.validation_windows // max(1, len(volumes)))
    return [
        window
        for opened in volumes
        for window in centre_windows(opened.volume, stage.validated, data.validation_crop, config.network.scale, share)
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


def _changes(prepared: Prepared, found: dict[str, Any]) -> dict[str, list[Any]]:
    """The settings that are not those of the checkpoint `found`, each before and now, where a run may go on with them.

    Raises UserError where it may not.
    """
    folder, now, before = prepared.config.output, prepared.settings, _settings_of(found)
    if not before:
        raise UserError(
            f"{folder / checkpoint.NAME} is of an earlier emsr, or of something else",
            "a checkpoint of this emsr",
            f"Empty {folder} to begin anew; network.start takes weights of stage network",
        )
    differing = {
        key: [before.get(key), now.get(key)]
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if refused := {key: values for key, values in differing.items() if key not in CHANGEABLE}:
        raise UserError(
            f"the checkpoint in {folder} has other settings: {_shown(refused)}",
            f"the same; only {', '.join(sorted(CHANGEABLE))} may change",
            "Put them back, or give another output",
        )
    if prepared.config.steps < found["step"]:
        raise UserError(
            f"steps is {prepared.config.steps}, but the checkpoint in {folder} is of step {found['step']}",
            "at least as many steps",
            "Give more steps, or another output",
        )
    return differing


def _settings_of(found: dict[str, Any]) -> dict[str, Any]:
    """The settings of the checkpoint `found`; empty where it has none."""
    settings: dict[str, Any] = found.get("settings", {})
    word = str(settings.get("precision"))
    return settings | {"precision": EARLIER_WORDS.get(word, word)} if settings else {}


def _go_on(loop: Loop, found: dict[str, Any], changed: dict[str, list[Any]], folder: Path) -> None:
    try:
        loop.go_on(found, try_again=bool(changed))
    except (KeyError, ValueError, RuntimeError) as error:
        if device.out_of_memory(error):
            raise
        raise UserError(
            f"the checkpoint in {folder} is not of these networks ({str(error).splitlines()[0][:120]})",
            "a checkpoint of this emsr",
            "Go on with the emsr that wrote it, or give another output",
        ) from None
    print(f"emsr: going on from step {loop.step}", file=sys.stderr)
    if changed:
        print(f"emsr: from here on with other settings: {_shown(changed)}", file=sys.stderr)
    if loop.step > found["step"]:
        print(
            f"emsr: the update of step {found['step'] + 1}, which was not finite, is left out ({loop.skipped} so far)",
            file=sys.stderr,
        )


def _shown(differing: dict[str, list[Any]]) -> str:
    return ", ".join(f"{key} was {before}, is {now}" for key, (before, now) in differing.items())
