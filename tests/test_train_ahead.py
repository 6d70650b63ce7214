"""Samples are drawn ahead of the steps that take them: the same ones, with the same errors, and waits that are said."""

from __future__ import annotations

import contextvars
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from conftest import texture, wait_until
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import X8_SMALL
from models.training.ahead import AHEAD, Ahead, Drawn
from models.training.busy import Busy
from models.training.crops import Augmentation, Bytes, Crops, Volume
from models.training.loop import Loop, NotFiniteError, Recipe, learning_rate
from models.training.ranks import Ranks
from models.training.stages import FlowStage, IndexerStage, Losses, NetworkStage, Stage, VQGANStage
from models.vqgan import VQGAN
from pipeline.base import waits
from pipeline.base.errors import NoAnswerError
from pipeline.training.sample_waits import SampleWaits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def crops(sections: int, size: int = 32) -> Crops:
    voxels = texture((8, 96, 96))
    volume = Volume(voxels.shape, lambda z, y, x: voxels[z, y, x], np.ones(8, bool))  # type: ignore[arg-type]
    return Crops([volume], sections, size, 8, Augmentation(noise=2.0))


def flow_loop(recipe: Recipe) -> Loop:
    torch.manual_seed(0)
    return Loop(Fabric(accelerator="cpu", devices=1), FlowStage(X8_SMALL), recipe)


def weights(loop: Loop) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in loop.stage.network.parameters()]


def all_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_steps_take_the_samples_that_they_would_draw_themselves() -> None:
    recipe = Recipe(6, 2)
    ahead, by_hand = flow_loop(recipe), flow_loop(recipe)
    ahead.run(crops(2), [], lambda *_: None, lambda _: None)
    for step in range(recipe.steps):
        drawn = by_hand.stage.draw(crops(2).batch(recipe.seed, step, recipe.batch), step)
        by_hand._one_step(drawn, learning_rate(step, recipe))
        by_hand.step += 1
    assert all_equal(weights(ahead), weights(by_hand))
    assert not all_equal(weights(ahead), weights(flow_loop(recipe)))


def test_batches_come_in_the_order_of_steps_whichever_is_drawn_first() -> None:
    later = threading.Event()

    def draw(step: int) -> Drawn:
        if step == 5:
            assert later.wait(60)  # the first one is drawn once all that may be drawn beside it are
        elif step == 5 + AHEAD - 1:
            later.set()
        return (torch.tensor(step),)

    ahead = Ahead(draw, range(5, 5 + 3 * AHEAD), CPU)
    assert [int(ahead.take()[0]) for _ in range(3 * AHEAD)] == list(range(5, 5 + 3 * AHEAD))
    ahead.close()


def test_no_more_than_a_few_batches_are_drawn_and_none_after_the_last_step() -> None:
    begun: list[int] = []
    ahead = Ahead(lambda step: (torch.tensor(begun.append(step) or step),), range(6), CPU)
    wait_until(lambda: len(begun) == AHEAD)
    ahead.take()
    wait_until(lambda: len(begun) == AHEAD + 1)
    for _ in range(5):
        ahead.take()
    ahead.close()
    assert sorted(begun) == list(range(6))


def test_an_error_is_raised_in_the_step_whose_samples_could_not_be_read() -> None:
    voxels, gone = texture((8, 96, 96)), 7

    def read(z: slice, y: slice, x: slice) -> Bytes:
        if z.start == gone:
            raise OSError("section 7 is gone")
        return voxels[z, y, x]

    broken = Crops([Volume(voxels.shape, read, np.ones(8, bool))], 2, 32, 8)  # type: ignore[arg-type]
    first = next(step for step in range(100) if _raises(broken, step))
    assert first > 0
    loop = flow_loop(Recipe(100, 1))
    kept: list[Any] = []
    with pytest.raises(OSError, match="section 7 is gone"):
        loop.run(broken, [], lambda *_: None, lambda _: None, keep=kept.append)
    assert loop.step == first
    assert [state["step"] for state in kept] == [first], "the steps before it are kept"


def _raises(broken: Crops, step: int) -> bool:
    try:
        broken.batch(0, step, 1)
    except OSError:
        return True
    return False


def test_what_the_drawing_threads_wait_for_is_what_the_training_waits_for() -> None:
    answered, progress, taken = threading.Event(), waits.Progress(), []

    def draw(step: int) -> Drawn:
        with waits.waiting("chunk 3 of raw.zarr", 50.0):
            assert answered.wait(60)
        return (torch.tensor(step),)

    def take() -> None:
        waits.current.set(progress)
        taken.append(ahead.take())

    ahead = Ahead(draw, range(1), CPU, SampleWaits())
    thread = threading.Thread(target=contextvars.Context().run, args=(take,))
    thread.start()
    wait_until(lambda: progress.step.what == "chunk 3 of raw.zarr" and progress.step.extra_s == 50)
    answered.set()
    thread.join()
    ahead.close()
    assert not progress.step.what
    assert len(taken) == 1


def test_a_store_that_does_not_answer_ends_the_wait(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the training's own thread had asked it."""
    monkeypatch.setattr(waits, "SAY_S", 0.2)
    monkeypatch.setattr(waits, "LIMIT_S", 1.0)
    answered = threading.Event()

    def draw(step: int) -> Drawn:
        with waits.waiting("a dead mount"):
            answered.wait(60)
        return ()

    with waits.watched_command():
        ahead = Ahead(draw, range(9), CPU, SampleWaits())
        with pytest.raises(NoAnswerError, match="a dead mount"):
            ahead.take()
        answered.set()
        ahead.close()
    assert "waiting for a dead mount" in capsys.readouterr().err


class Refusing(TorchDispatchMode):
    """A device on which an operator whose result the host needs is refused: a GPU would have to be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2"}, name
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted(Ranks):
    reads: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def read(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        self.reads.append(values)
        return super().read(values)


def stages() -> dict[str, Stage]:
    return {
        "flow": FlowStage(X8_SMALL),
        "vqgan": VQGANStage(X8_SMALL, adversarial_from=0, critic_width=2, quantise_from=4),
        "indexer": IndexerStage(X8_SMALL, VQGAN(X8_SMALL.prior)),
        "network": NetworkStage(X8_SMALL),
    }


@pytest.mark.parametrize("name", ["flow", "vqgan", "indexer", "network"])
def test_a_step_waits_for_its_device_only_where_losses_and_gradients_are_looked_at(name: str) -> None:
    """Everything but Ranks.read, which takes them all at once."""
    stage, ranks = stages()[name], Counted()
    loop = Loop(Fabric(accelerator="cpu", devices=1), stage, Recipe(9, 1, average=0.9), ranks)
    loop.step = 5  # tokens are drawn, no row is revived, the critic is not regularised
    drawn = stage.draw(crops(stage.sections, 96).batch(0, 5, 1), 5)
    with Refusing():
        loop._one_step(drawn, 1e-4)
    assert len(ranks.reads) == 1


class Steep(FlowStage):
    """A loss so steep that squares of its gradients, which Adam would keep, are infinite; they themselves are not."""

    def losses(self, *arguments: Any) -> Losses:
        return {"loss": 1e24 * super().losses(*arguments)["loss"]}


def test_gradients_whose_squares_are_infinite_change_nothing() -> None:
    loop = Loop(Fabric(accelerator="cpu", devices=1), Steep(X8_SMALL), Recipe(9, 1))
    before = weights(loop)
    with pytest.raises(NotFiniteError) as raised:
        loop.run(crops(2), [], lambda *_: None, lambda _: None)
    assert raised.value.step == 0
    assert math.isfinite(raised.value.parts["loss"])
    assert max(float(p.grad.abs().max()) for p in loop.stage.network.parameters() if p.grad is not None) < math.inf
    assert all_equal(weights(loop), before)
    assert not loop.adam.state


def test_updates_left_out_by_float16_are_counted() -> None:
    """A scale so large that gradients are infinite: halved until they are not, and each time nothing is changed."""
    torch.manual_seed(0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    loop = Loop(fabric, FlowStage(X8_SMALL), Recipe(50, 1))
    before, seen = weights(loop), []

    def changed(progress: object) -> None:
        seen.append(not all_equal(before, weights(loop)))

    loop.run(crops(2), [], lambda *_: None, changed, stopped=lambda: any(seen))
    assert loop.skipped == seen.index(True) > 0
    assert loop.state()["skipped"] == loop.skipped


def test_a_checkpoint_of_an_adam_that_was_not_fused_is_gone_on_with() -> None:
    recipe = Recipe(4, 1)
    whole = flow_loop(recipe)
    whole.run(crops(2), [], lambda *_: None, lambda _: None)
    parts = flow_loop(Recipe(2, 1, periods=(4,)))
    parts.run(crops(2), [], lambda *_: None, lambda _: None)
    state = parts.state()
    for group in state["adam"]["param_groups"]:
        group["fused"], group["foreach"] = None, None
    later = flow_loop(recipe)
    later.go_on(state)
    assert later.adam.param_groups[0]["fused"]
    later.run(crops(2), [], lambda *_: None, lambda _: None)
    assert all_equal(weights(later), weights(whole))


def test_the_busy_share_is_that_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 3 s, and 1 s after each: 75 %. Then blocks without anything between them, which alone count."""
    now = [0.0]
    monkeypatch.setattr("models.training.busy.time.monotonic", lambda: now[0])
    busy = Busy(CPU, 2)
    assert busy.share() is None
    for _ in range(2):
        with busy.computing():
            now[0] += 3
        now[0] += 1
    assert busy.share() == pytest.approx(0.75)
    for _ in range(2):
        with busy.computing():
            now[0] += 5
    assert busy.share() == 1
