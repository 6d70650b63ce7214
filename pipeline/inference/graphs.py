"""CUDA graphs: what functions launch on a GPU is recorded once and replayed, at the cost of one launch.

A tile has one fixed shape, and so has a batch of them. Preset paper launches about a thousand kernels for each section
of a batch, and launching them takes the host longer than a GPU takes to compute them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Calls a function and gives what launches the same again, into the result that it also gives."""


@dataclass
class _Graph:
    """The graph of one function: the memory that it reads and writes, and what the first call made of the former."""

    given: Any
    wanted: Any
    result: Any = None
    replay: Callable[[], None] | None = None


class Graphs:
    """The graphs of the functions of one process, in one pool of memory: they run one after another.

    Each function is called as it is until all have been called once, so that the memory of a call and of a graph are
    not needed at the same time. Then each is recorded, and a replay is compared with its first call, byte by byte.
    Where that fails for one, no graph is used any more, so that all memory is there for calls; `notes` says why.
    """

    def __init__(self, functions: int, record: Record | None = None) -> None:
        """`functions` is how many there are."""
        self.notes: list[str] = []
        self._functions, self._graphs = functions, dict[str, _Graph]()
        self._record = record or self._on_gpu
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._failed: list[torch.cuda.CUDAGraph] = []

    def call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """`function(*inputs)`, tensors which have the same shapes in every call. Functions are told apart by name.

        It is called within torch.inference_mode, on the stream that computes. The result belongs to the caller.
        """
        if self.notes:
            return function(*inputs)
        name = function.__name__
        graph = self._graphs.get(name)
        if graph is None:
            result = function(*inputs)
            self._graphs[name] = _Graph(pytree.tree_map(torch.clone, inputs), pytree.tree_map(torch.clone, result))
            return result
        if graph.replay is None and len(self._graphs) == self._functions:
            try:
                self._make(graph, function)
            except RuntimeError as error:  # a kernel that cannot be recorded, no memory for it, another result
                self._give_up(f"no CUDA graphs: {name}: {_cause(error)}")
        if graph.replay is None:
            return function(*inputs)
        for mine, theirs in _pairs(graph.given, inputs):
            mine.copy_(theirs)
        graph.replay()
        return pytree.tree_map(torch.clone, graph.result)

    def _make(self, graph: _Graph, function: Callable[..., Any]) -> None:
        launch, result = self._record(lambda: function(*graph.given))
        for leaf, right in _pairs(result, graph.wanted):  # a replay that does nothing is to be found out
            leaf.fill_(torch.nan) if leaf.is_floating_point() else leaf.copy_(right).add_(1)
        launch()
        if not all(_same(leaf, right) for leaf, right in _pairs(result, graph.wanted)):
            raise RuntimeError("a replay differs from the call")
        graph.wanted, graph.result, graph.replay = None, result, launch

    def _give_up(self, why: str) -> None:
        self.notes.append(why)
        for graph in self._graphs.values():
            graph.given = graph.wanted = graph.result = graph.replay = None
        self._graphs.clear()
        torch.cuda.empty_cache()

    def _on_gpu(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, computing = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if self._stream is None:  # of this device: torch's own is of the first one that recorded
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        try:
            # other threads of the worker may use the device meanwhile
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError):  # then the recording was ended well
                self._failed.append(graph)  # the allocator may still ask it what it records
                with suppress(Exception):  # a recording that cannot be ended leaves the allocator in its pool,
                    torch._C._cuda_endAllocateToPool(computing.device_index, self._pool)
            raise
        finally:
            torch.cuda.set_stream(computing)  # and this thread on its stream
        return graph.replay, result


def _pairs(a: Any, b: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results are the same, byte by byte; numbers that are none count as the same."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: that a recording cannot be ended follows from it."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]
