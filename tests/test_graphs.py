"""What is recorded once and replayed gives what the call gives, or is not used: proved with a recorder that needs no
GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import texture
from standin import StandIn
from test_inference import compute
from torch import Tensor
from torch.utils import _pytree as pytree

from pipeline.base.geometry import ZYX, Box
from pipeline.inference.graphs import Graphs
from pipeline.inference.network import Network
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec


class State(NamedTuple):
    section: Tensor
    pyramid: tuple[Tensor, ...]


def encode(section: Tensor) -> State:
    return State(section + 1, (section * 2, section.sum(-1)))


class Recorder:
    """Like a GPU's: a replay computes from the recorded inputs' memory into the recorded results' memory."""

    def __init__(self, spoil: Callable[[Any], None] = lambda result: None) -> None:
        self.replays, self.recorded, self._spoil = 0, 0, spoil

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        result = function()

        def replay() -> None:
            self.replays += 1
            for mine, theirs in zip(pytree.tree_leaves(result), pytree.tree_leaves(function()), strict=True):
                mine.copy_(theirs)
            self._spoil(result)

        return replay, result


def fuse(states: list[State]) -> tuple[Tensor, Tensor]:
    mean = torch.stack([state.pyramid[0] for state in states]).mean(0)
    return mean.mul(100).to(torch.uint8), mean.sum()


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True))


def test_replays_give_what_calls_give() -> None:
    """From the call on that follows the first one of all; results are the caller's own, whatever is replayed later."""
    recorder = Recorder()
    graphs = Graphs(2, recorder)
    inputs = [torch.rand(2, 3) for _ in range(6)]
    states, found = [], []
    for at, section in enumerate(inputs):
        states.append(graphs.call(encode, section))
        if at >= 2:
            found.append(graphs.call(fuse, states[-3:]))
    assert recorder.recorded == 2
    assert recorder.replays == (1 + 3) + (1 + 3)  # one of each is compared
    assert graphs.notes == []
    assert isinstance(states[-1], State)
    assert same(states, [encode(section) for section in inputs])
    assert same(found, [fuse([encode(section) for section in inputs[at : at + 3]]) for at in range(4)])


def test_nothing_is_recorded_before_all_were_called() -> None:
    """The memory of a first call and that of a graph are never needed together."""
    recorder = Recorder()
    graphs = Graphs(2, recorder)
    for _ in range(5):
        graphs.call(encode, torch.rand(2, 3))
    assert recorder.recorded == 0


def spoil(result: State) -> None:
    result.pyramid[0][0, 0] += 1e-7


def make_none(result: State) -> None:
    result.pyramid[0][0, 0] = torch.nan


def grey(section: Tensor) -> Tensor:
    return section.mul(200).to(torch.uint8)


@pytest.mark.parametrize("function", [encode, grey])
def test_an_empty_graph_is_found_out(function: Callable[[Tensor], Any]) -> None:
    """Its result is that of the recording, whatever is replayed."""
    graphs = Graphs(1, lambda recorded: (lambda: None, recorded()))
    for _ in range(3):
        x = torch.rand(2, 3)
        assert same(graphs.call(function, x), function(x))
    assert graphs.notes == [f"no CUDA graphs: {function.__name__}: a replay differs from the call"]


@pytest.mark.parametrize("after", [spoil, make_none])
def test_a_replay_that_differs_is_not_used_and_told(after: Callable[[State], None]) -> None:
    recorder = Recorder(after)
    graphs = Graphs(1, recorder)
    for _ in range(3):
        x = torch.rand(2, 3)
        assert same(graphs.call(encode, x), encode(x))
    assert recorder.replays == 1
    assert graphs.notes == ["no CUDA graphs: encode: a replay differs from the call"]


def test_numbers_that_are_none_are_the_same_number() -> None:
    graphs = Graphs(1, Recorder())
    for _ in range(2):
        graphs.call(encode, torch.full((2, 3), float("nan")))
    assert graphs.notes == []


def test_what_cannot_be_recorded_is_called_and_told() -> None:
    tries = []

    def refuse(function: Callable[[], Any]) -> Any:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    graphs = Graphs(1, refuse)
    for _ in range(3):
        x = torch.rand(2, 3)
        assert same(graphs.call(encode, x), encode(x))
    assert len(tries) == 1
    assert graphs.notes == ["no CUDA graphs: encode: operation not permitted when stream is capturing"]


def test_where_one_function_has_no_graph_none_has() -> None:
    """The memory of the others' graphs is there for its calls; and the first cause is told, not what followed."""

    def refuse_the_second(function: Callable[[], Any]) -> Any:
        if recorder.recorded:
            try:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            except RuntimeError:
                raise RuntimeError("operation failed due to a previous error during capture") from None
        return recorder(function)

    recorder = Recorder()
    graphs = Graphs(2, refuse_the_second)
    states = [encode(torch.rand(2, 3)) for _ in range(3)]
    for _ in range(3):
        x = torch.rand(2, 3)
        assert same(graphs.call(encode, x), encode(x))
        assert same(graphs.call(fuse, states), fuse(states))
    assert (recorder.recorded, recorder.replays) == (1, 2)
    assert graphs.notes == ["no CUDA graphs: fuse: CUDA out of memory"]


def test_a_network_is_gone_when_nobody_has_it() -> None:
    """A worker frees the last job's before it opens the next: no reference leads from a network back to it."""
    network = stand_in(1)
    network._graphs = Graphs(3)  # so many are never called: nothing is recorded, which here would keep a function
    compute(network, texture((9, 40, 44)), ZYX(0, 0, 0), Box.of((0, 0, 0), (3, 40, 44)))
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()


def stand_in(batch: int) -> Network:
    network = Network(
        NetworkSpec("nearest", 8, None, "", "float32", Lattice(16, 8, 5, "mirror"), batch=batch),
    )
    network.module = StandIn(8)
    return network


@pytest.mark.parametrize("batch", [2, 3, 4])
def test_tiles_of_a_batch_are_their_own(batch: int) -> None:
    """Whatever else is in the batch, and however many repeats fill it: the bytes are those of one tile at a time. Edges
    that cut cells, slabs of one cell and of six, and caches from slab to slab.
    """
    volume = texture((9, 40, 44))
    alone, together = stand_in(1), stand_in(batch)
    calls: list[tuple[int, ...]] = []
    encode_section = together.module.encode_section
    together.module.encode_section = lambda section: calls.append(tuple(section.shape)) or encode_section(section)
    caches: dict[Any, Any] = {}
    for box in (Box.of((0, 0, 0), (3, 40, 44)), Box.of((3, 0, 0), (6, 40, 44))):
        wanted = compute(alone, volume, ZYX(0, 0, 0), box)
        assert np.array_equal(compute(together, volume, ZYX(0, 0, 0), box, caches), wanted)
    for box in (Box.of((2, 16, 16), (4, 32, 32)), Box.of((1, 5, 3), (3, 30, 40))):
        wanted = compute(alone, volume, ZYX(0, 0, 0), box)
        assert np.array_equal(compute(together, volume, ZYX(0, 0, 0), box), wanted)
    assert {shape[0] for shape in calls} == {batch}
