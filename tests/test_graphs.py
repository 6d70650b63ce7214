"""What is recorded once and replayed gives what the call gives, or is not used: proved with a recorder that needs no
GPU.
"""

from __future__ import annotations

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
    return State(section, (section * 2, section.sum(-1)))


class Recorder:
    """Like a GPU's: a replay computes from the recorded inputs' memory into the recorded results' memory."""

    def __init__(self, spoil: Callable[[Any], None] = lambda result: None) -> None:
        self.replays, self._spoil = 0, spoil

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        result = pytree.tree_map(torch.zeros_like, function())

        def replay() -> None:
            self.replays += 1
            for mine, theirs in zip(pytree.tree_leaves(result), pytree.tree_leaves(function()), strict=True):
                mine.copy_(theirs)
            self._spoil(result)

        return replay, result


def test_replays_give_what_calls_give() -> None:
    """Results are the caller's own: a later replay does not change them."""
    recorder = Recorder()
    graphs = Graphs(recorder)
    recorded = graphs.of(encode)
    inputs = [torch.rand(2, 3) for _ in range(4)]
    found = [recorded(each) for each in inputs]
    assert (recorder.replays, graphs.notes) == (4, [])  # the first call is compared with a replay
    for each, state in zip(inputs, found, strict=True):
        assert isinstance(state, State)
        assert all(
            torch.equal(a, b) for a, b in zip(pytree.tree_leaves(state), pytree.tree_leaves(encode(each)), strict=True)
        )


@pytest.mark.parametrize("value", [1e-7, float("nan")])
def test_a_replay_that_differs_is_not_used_and_told(value: float) -> None:
    def spoil(result: State) -> None:
        result.pyramid[0][0, 0] += value

    recorder = Recorder(spoil)
    graphs = Graphs(recorder)
    recorded = graphs.of(encode)
    for _ in range(3):
        x = torch.rand(2, 3)
        assert torch.equal(recorded(x).pyramid[0], 2 * x)
    assert recorder.replays == 1
    assert graphs.notes == ["no CUDA graph of encode: a replay differs from the call"]


def test_numbers_that_are_none_are_the_same_number() -> None:
    graphs = Graphs(Recorder())
    recorded = graphs.of(encode)
    recorded(torch.full((2, 3), float("nan")))
    assert graphs.notes == []


def test_what_cannot_be_recorded_is_called_and_told() -> None:
    tries = []

    def refuse(function: Callable[[], Any]) -> Any:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    graphs = Graphs(refuse)
    recorded = graphs.of(encode)
    for _ in range(3):
        x = torch.rand(2, 3)
        assert torch.equal(recorded(x).section, x)
    assert len(tries) == 1
    assert graphs.notes == ["no CUDA graph of encode: RuntimeError: operation not permitted when stream is capturing"]


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
