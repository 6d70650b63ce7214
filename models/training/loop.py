"""The training loop of every stage: Adam, cosine schedule, averaged weights, validation, checkpoints that a run
resumes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from models.training.crops import Crops
from models.training.stages import Batch, Stage

MIN_RATE = 1e-7
"""The learning rate at the end of each cycle of the cosine."""
REPORTED_STEPS = 50
"""Reported losses are means over so many steps."""


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a run. `batch` is the number of samples per step and device, `rate` the largest learning
    rate, `betas` are Adam's. `periods` are the lengths of the cosine's cycles in steps, the last of which is repeated;
    without any, one cycle takes all steps. `average` is the decay per step of the exponential moving average (EMA) of
    the weights, 0 for none.
    """

    steps: int
    batch: int
    rate: float = 4e-4
    periods: tuple[int, ...] = ()
    betas: tuple[float, float] = (0.9, 0.99)
    average: float = 0.0
    seed: int = 0
    validate_every: int = 5000
    checkpoint_every: int = 5000


@dataclass
class Progress:
    """What is reported after a step: means of the losses over the last steps, and after a validation also its scores,
    its images (1, H, W) and the names of the scores that are the best so far.
    """

    step: int
    steps: int
    losses: dict[str, float]
    rate: float
    steps_per_s: float
    scores: dict[str, float] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    best: list[str] = field(default_factory=list)


Save = Callable[[str, nn.Module, dict[str, Any]], None]
"""Writes weights. Its arguments are the name (`last`, `best-psnr`, ...), the network, and facts for the weights'
card.
"""


def learning_rate(step: int, recipe: Recipe, start: int = 0) -> float:
    """The learning rate of `step` in a schedule that begins at step `start`: a cosine from `rate` to MIN_RATE over each
    period, then `rate` again (SGDR, Loshchilov and Hutter, 2017).
    """
    periods = recipe.periods or (max(1, recipe.steps - start),)
    since, cycle = step - start, 0
    while since >= periods[min(cycle, len(periods) - 1)]:
        since -= periods[min(cycle, len(periods) - 1)]
        cycle += 1
    share = since / periods[min(cycle, len(periods) - 1)]
    return MIN_RATE + (recipe.rate - MIN_RATE) * 0.5 * (1 + math.cos(math.pi * share))


def decay(step: int, recipe: Recipe) -> float:
    """The decay of the averaged weights at `step`. It is smaller in the first steps, so that the average soon no longer
    depends on the random first weights.
    """
    return min(recipe.average, (1 + step) / (10 + step))


class Loop:
    """One run of one stage: networks, optimisers, averaged weights and the step, which checkpoints hold. `digest`
    stands for the run's configuration; a checkpoint with another one is refused.
    """

    def __init__(self, fabric: Fabric, stage: Stage, recipe: Recipe, folder: Path, digest: str) -> None:
        self.fabric, self.stage, self.recipe, self.folder, self.digest = fabric, stage, recipe, folder, digest
        self.step = 0
        self.best: dict[str, float] = {}
        self.critic: Any = None
        trained = [p for p in stage.network.parameters() if p.requires_grad]
        adam = torch.optim.Adam(trained, recipe.rate, betas=recipe.betas)
        self.network, self.adam = fabric.setup(stage.network, adam)
        if stage.critic is not None:
            self.critic, self.critic_adam = fabric.setup(
                stage.critic, torch.optim.Adam(stage.critic.parameters(), recipe.rate, betas=recipe.betas)
            )
            self.critic_started: int | None = None
        self.averaged = (
            {n: p.detach().clone() for n, p in stage.network.named_parameters() if p.requires_grad}
            if recipe.average
            else {}
        )

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def resume(self) -> bool:
        """Load the folder's checkpoint and return True; False where there is none. Raises ValueError where the
        checkpoint was written by another configuration.
        """
        if not self.checkpoint.exists():
            return False
        state = torch.load(self.checkpoint, map_location=self.fabric.device, weights_only=True)
        if state["digest"] != self.digest:
            raise ValueError(f"{self.checkpoint} was written by another configuration")
        self.step, self.best = state["step"], state["best"]
        self.stage.network.load_state_dict(state["network"])
        self.adam.load_state_dict(state["adam"])
        if self.critic is not None:
            assert self.stage.critic is not None
            self.stage.critic.load_state_dict(state["critic"])
            self.critic_adam.load_state_dict(state["critic_adam"])
            self.critic_started = state["critic_started"]
        for name, value in state["averaged"].items():
            self.averaged[name].copy_(value)
        if "usage" in state:
            self.stage.usage.counts.copy_(state["usage"])  # type: ignore[attr-defined]
        return True

    def keep(self) -> None:
        """Write the checkpoint. If the process is killed meanwhile, the one before stays as it is."""
        state: dict[str, Any] = {"digest": self.digest, "step": self.step, "best": self.best, "averaged": self.averaged}
        state |= {"network": self.stage.network.state_dict(), "adam": self.adam.state_dict()}
        if self.critic is not None:
            assert self.stage.critic is not None
            state |= {
                "critic": self.stage.critic.state_dict(),
                "critic_adam": self.critic_adam.state_dict(),
                "critic_started": self.critic_started,
            }
        if (usage := getattr(self.stage, "usage", None)) is not None:
            state["usage"] = usage.counts
        if self.fabric.is_global_zero:
            unfinished = self.checkpoint.with_suffix(".unfinished")
            torch.save(state, unfinished)
            os.replace(unfinished, self.checkpoint)
        self.fabric.barrier()

    def run(
        self,
        crops: Crops,
        windows: list[Batch],
        save: Save,
        tell: Callable[[Progress], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last step and return True, or False where `stopped()` was true before. `windows` are those of
        the validation, `tell` is called after every step. Checkpoint and weights are written in both cases.

        Raises FloatingPointError where a loss is not finite.
        """
        recent: list[dict[str, float]] = []
        began, first = time.monotonic(), self.step
        while self.step < self.recipe.steps and not stopped():
            rate = learning_rate(self.step, self.recipe)
            batch = crops.batch(self.recipe.seed, self.step, self.recipe.batch, self.fabric.global_rank)
            recent = [*recent[1 - REPORTED_STEPS :], self._one_step(batch, rate)]
            self.step += 1
            speed = (self.step - first) / (time.monotonic() - began)
            progress = Progress(self.step, self.recipe.steps, _means(recent), rate, speed)
            if not all(math.isfinite(value) for value in recent[-1].values()):
                raise FloatingPointError(f"step {self.step}: the loss is not finite ({recent[-1]})")
            if windows and (self.step % self.recipe.validate_every == 0 or self.step == self.recipe.steps):
                self._validate(windows, save, progress)
            tell(progress)
            if self.step % self.recipe.checkpoint_every == 0:
                self.keep()
        self.keep()
        with _Averaged(self):
            save("last", self.stage.network, {"steps": self.step})
        return self.step >= self.recipe.steps

    def _one_step(self, batch: Batch, rate: float) -> dict[str, float]:
        moved: Batch = self.fabric.to_device(batch)
        self.network.train()
        found = self.stage.losses(self.network, self.critic, moved, self.step)
        self._update(self.adam, found["loss"], rate)
        if self.critic is not None and (of_critic := self.stage.critic_losses(self.critic, self.step)):
            self.critic_started = self.step if self.critic_started is None else self.critic_started
            critic_rate = learning_rate(self.step, self.recipe, self.critic_started)
            self._update(self.critic_adam, of_critic["critic_loss"], critic_rate)
            found |= of_critic
        with torch.no_grad():
            for name, parameter in self.stage.network.named_parameters():
                if name in self.averaged:
                    self.averaged[name].lerp_(parameter, 1 - decay(self.step, self.recipe))
        return {name: float(value.detach()) for name, value in found.items()}

    def _update(self, adam: Any, loss: Tensor, rate: float) -> None:
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        self.fabric.backward(loss)
        adam.step()

    def _validate(self, windows: list[Batch], save: Save, progress: Progress) -> None:
        self.network.eval()
        with torch.no_grad(), _Averaged(self):
            progress.scores, progress.images = self.stage.validate(
                self.stage.network, [self.fabric.to_device(w) for w in windows]
            )
            for name, sign in self.stage.better.items():
                value = progress.scores.get(name)
                if value is not None and sign * value > sign * self.best.get(name, -sign * math.inf):
                    self.best[name] = value
                    progress.best.append(name)
                    save(
                        f"best-{name.replace('_', '-')}",
                        self.stage.network,
                        {"steps": self.step, "scores": progress.scores},
                    )


class _Averaged:
    """A context in which the network has the averaged weights in place of the trained ones."""

    def __init__(self, loop: Loop) -> None:
        self._parameters = {n: p for n, p in loop.stage.network.named_parameters() if n in loop.averaged}
        self._averaged = loop.averaged
        self._trained: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._trained[name] = parameter.clone()
                parameter.copy_(self._averaged[name])

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._trained[name])


def _means(recent: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: sum(values) / len(values) for name in recent[-1] if (values := [r[name] for r in recent if name in r])
    }


def to_json(progress: Progress) -> str:
    """One line of metrics.jsonl, without the newline."""
    return json.dumps(
        {
            "step": progress.step,
            "rate": progress.rate,
            "steps_per_s": progress.steps_per_s,
            **progress.losses,
            **progress.scores,
        }
    )
