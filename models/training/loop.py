"""The training loop of every stage: Adam, cosine schedule, averaged weights, validation, and the state from which a
run goes on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.training.ahead import SILENT, Ahead, Drawn, Waits
from models.training.busy import Busy
from models.training.crops import Crops
from models.training.ranks import ALONE, Ranks
from models.training.stages import Batch, Losses, Stage

MIN_RATE = 1e-7
"""The learning rate at the end of each cycle of the cosine."""
REPORTED_STEPS = 50
"""Reported losses, and the share of time in which the device was busy, are means over so many steps."""
GRADIENTS = "gradients"
"""The name by which the squared norm of all gradients is looked at, beside the losses."""


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
    its images (1, H, W) and the names of the scores that are the best so far. `busy` is the share of time in which the
    device computed (`Busy`), None before that is known.
    """

    step: int
    steps: int
    losses: dict[str, float]
    rate: float
    steps_per_s: float
    busy: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    best: list[str] = field(default_factory=list)


class NotFiniteError(ArithmeticError):
    """A loss or a gradient of step `step` is infinite or no number. `parts` are the step's losses by name; where all
    of them are finite, a gradient is not.
    """

    def __init__(self, step: int, parts: Mapping[str, float]) -> None:
        self.step, self.parts = step, dict(parts)
        super().__init__(f"step {step}: not finite: {self.parts}")


State = dict[str, Any]
"""All that a run needs to go on: tensors, numbers, and dictionaries of them."""
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
    """One run of one stage: networks, optimisers, averaged weights and the step. With several ranks each has a loop of
    its own; together they are one with all of their samples.

    `failed` is the step whose loss or gradient was not finite, once that has ended the run; `skipped` counts the steps
    that were left out for that reason.
    """

    def __init__(self, fabric: Fabric, stage: Stage, recipe: Recipe, ranks: Ranks = ALONE) -> None:
        self.fabric, self.stage, self.recipe, self.ranks = fabric, stage, recipe, ranks
        self.step, self.skipped = 0, 0
        self.failed: int | None = None
        self.critic_started: int | None = None
        self.best: dict[str, float] = {}
        self.critic: Any = None
        self.network = fabric.setup_module(stage.network)
        trained = [p for p in stage.network.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(trained, recipe.rate, betas=recipe.betas, fused=True)
        if stage.critic is not None:
            self.critic = fabric.setup_module(stage.critic)
            self.critic_adam = torch.optim.Adam(stage.critic.parameters(), recipe.rate, betas=recipe.betas, fused=True)
        for helper in stage.helpers():
            fabric.to_device(helper)
        self.scaler: torch.amp.GradScaler | None = getattr(fabric.strategy.precision, "scaler", None)
        self._scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        self.busy = Busy(fabric.device, REPORTED_STEPS)
        self.averaged = (
            {n: p.detach().clone() for n, p in stage.network.named_parameters() if p.requires_grad}
            if recipe.average
            else {}
        )
        stage.ranks = ranks

    def state(self) -> State:
        """What `go_on` takes."""
        self._count_skipped()
        state: State = {"step": self.step, "best": self.best, "averaged": self.averaged}
        state |= {"failed": self.failed, "skipped": self.skipped}
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
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def go_on(self, state: State, try_again: bool = False) -> None:
        """Take the state of an earlier run of the same configuration. Where that run ended because a step was not
        finite, the step is left out, or tried again with `try_again`.
        """
        self.step, self.best, self.skipped = state["step"], state["best"], state["skipped"]
        self.stage.network.load_state_dict(state["network"])
        _load(self.adam, state["adam"])
        if self.critic is not None and "critic" in state:
            assert self.stage.critic is not None
            self.stage.critic.load_state_dict(state["critic"])
            _load(self.critic_adam, state["critic_adam"])
            self.critic_started = state["critic_started"]
        for name, value in state["averaged"].items():
            self.averaged[name].copy_(value)
        if "usage" in state:
            self.stage.usage.counts.copy_(state["usage"])  # type: ignore[attr-defined]
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
            self._scale = self.scaler.get_scale()
        if state["failed"] is not None and not try_again:
            self.step, self.skipped = self.step + 1, self.skipped + 1

    def checkpoint_bytes(self) -> int:
        """About how large `state` is, also before the first step: with two numbers of Adam for each trained one."""
        trained = sum(_bytes(p) for p in self.stage.network.parameters() if p.requires_grad)
        critic = 0 if self.stage.critic is None else 3 * _bytes(*self.stage.critic.parameters())
        return self.weights_bytes(1) + 2 * trained + _bytes(*self.averaged.values()) + critic

    def weights_bytes(self, files: int | None = None) -> int:
        """How large the weights of a run are: the last ones, and the best by each score."""
        return (files or 1 + len(self.stage.better)) * _bytes(*self.stage.network.state_dict().values())

    def run(
        self,
        crops: Crops,
        windows: list[Batch],
        save: Save,
        tell: Callable[[Progress], None],
        keep: Callable[[State], None] = lambda _: None,
        stopped: Callable[[], bool] = lambda: False,
        waits: Waits = SILENT,
    ) -> bool:
        """Train to the last step and return True, or False where `stopped()` was true in any rank before. `windows` are
        those of the validation, `tell` is called after every step, `keep` with every checkpoint. Checkpoint and weights
        are written in both cases. `waits` is told what is waited for.

        Raises NotFiniteError where a loss or a gradient is not finite, and what reading a sample raised, once `keep`
        has the state before that step.
        """
        self.ranks.copy_from_first(
            [*self.stage.network.state_dict().values(), *self.averaged.values()]
            + ([] if self.stage.critic is None else list(self.stage.critic.state_dict().values()))
        )
        recent: list[dict[str, float]] = []
        began, first = time.monotonic(), self.step
        with closing(Ahead(self._draw(crops), range(first, self.recipe.steps), self.fabric.device, waits)) as ahead:
            while self.step < self.recipe.steps and not self.ranks.any(stopped()):
                rate = learning_rate(self.step, self.recipe)
                try:
                    drawn = ahead.take()
                except Exception:
                    if self.step > first:
                        keep(self.state())
                    raise
                try:
                    recent = [*recent[1 - REPORTED_STEPS :], self._one_step(drawn, rate)]
                except NotFiniteError:
                    self.failed = self.step
                    keep(self.state())
                    raise
                self.step += 1
                speed = (self.step - first) / max(time.monotonic() - began, 1e-9)
                progress = Progress(self.step, self.recipe.steps, _means(recent), rate, speed)
                if windows and (self.step % self.recipe.validate_every == 0 or self.step == self.recipe.steps):
                    self._validate(windows, save, progress)
                progress.busy = self.busy.share()
                tell(progress)
                if self.step % self.recipe.checkpoint_every == 0 and self.step < self.recipe.steps:
                    keep(self.state())
        keep(self.state())
        with _Averaged(self):
            save("last", self.stage.network, self._facts())
        return self.step >= self.recipe.steps

    def _draw(self, crops: Crops) -> Callable[[int], Drawn]:
        """What the losses of a step take, by its number."""
        seed, count, rank = self.recipe.seed, self.recipe.batch, self.ranks.rank
        return lambda step: self.stage.draw(crops.batch(seed, step, count, rank), step)

    def _one_step(self, drawn: Drawn, rate: float) -> dict[str, float]:
        """Update all weights and return the losses, means over the ranks. Raises NotFiniteError before anything but
        gradients is changed. The device is waited for once, in `_checked`.
        """
        with self.busy.computing():
            self.network.train()
            losses = self.stage.losses(self.network, self.critic, self.fabric.to_device(drawn), self.step)
            norms = {self.adam: self._gradients(self.adam, losses["loss"], rate)}
            critic_started = self.critic_started
            if self.critic is not None and (of_critic := self.stage.critic_losses(self.critic, self.step)):
                critic_started = self.step if critic_started is None else critic_started
                critic_rate = learning_rate(self.step, self.recipe, critic_started)
                norms[self.critic_adam] = self._gradients(self.critic_adam, of_critic["critic_loss"], critic_rate)
                losses |= of_critic
            found = self._checked(losses, list(norms.values()))
            self.critic_started = critic_started
            self._update(list(norms))
            self._average(self.stage.after_step(self.step))
        return found

    def _gradients(self, adam: torch.optim.Adam, loss: Tensor, rate: float) -> Tensor:
        """Set the learning rate, and the gradients of `loss`, averaged over the ranks. Returns their norm."""
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        self.fabric.backward(loss)
        parameters = [p for group in adam.param_groups for p in group["params"]]
        self.ranks.average_gradients(parameters)
        return get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _checked(self, losses: Losses, norms: list[Tensor]) -> dict[str, float]:
        """The losses as numbers. Raises NotFiniteError."""
        squares = torch.stack(norms).square().sum()  # Adam keeps squares
        found = self.ranks.read({**losses, GRADIENTS: squares})
        gradients = found.pop(GRADIENTS)
        finite = all(math.isfinite(value) for value in found.values())
        if not finite or (self.scaler is None and not math.isfinite(gradients)):
            raise NotFiniteError(self.step, found)
        self._count_skipped()
        return found

    def _update(self, optimisers: list[torch.optim.Adam]) -> None:
        if self.scaler is None:
            for adam in optimisers:
                adam.step()
            return
        for adam in optimisers:
            self.scaler.step(adam)
        self.scaler.update()

    def _average(self, anew: dict[str, Tensor]) -> None:
        """Move the averaged weights towards the trained ones, but for the rows `anew`, which they take."""
        if not self.averaged:
            return
        parameters = dict(self.stage.network.named_parameters())
        move = get_ema_multi_avg_fn(decay(self.step, self.recipe))  # type: ignore[no-untyped-call]
        move(list(self.averaged.values()), [parameters[name] for name in self.averaged], None)
        with torch.no_grad():
            for name, rows in anew.items():  # a row's average is of values that it no longer has
                self.averaged[name][rows] = parameters[name][rows]

    def _count_skipped(self) -> None:
        """A gradient that was not finite in float16 has made the scale smaller, and left out its update. The scale is
        on the device: it is looked at where nothing else is left to be done there.
        """
        if self.scaler is not None:
            scale = self.scaler.get_scale()
            self.skipped += scale < self._scale
            self._scale = scale

    def _facts(self) -> dict[str, Any]:
        self._count_skipped()
        return {"steps": self.step} | ({"skipped_updates": self.skipped} if self.skipped else {})

    def _validate(self, windows: list[Batch], save: Save, progress: Progress) -> None:
        self.network.eval()
        with torch.no_grad(), _Averaged(self):
            with self.busy.computing():
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
                        self._facts() | {"scores": progress.scores},
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


def _load(adam: torch.optim.Adam, state: State) -> None:
    """Take an optimiser's state, also that of an Adam that was not fused."""
    groups = [group | {"fused": True, "foreach": None} for group in state["param_groups"]]
    adam.load_state_dict(state | {"param_groups": groups})


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _means(recent: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: sum(values) / len(values) for name in recent[-1] if (values := [r[name] for r in recent if name in r])
    }


def to_json(progress: Progress) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    return {
        "step": progress.step,
        "rate": progress.rate,
        "steps_per_s": progress.steps_per_s,
        **({} if progress.busy is None else {"device_busy": round(progress.busy, 4)}),
        **progress.losses,
        **progress.scores,
    }
