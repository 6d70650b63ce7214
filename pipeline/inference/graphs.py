"""CUDA graphs: what a function launches on a GPU is recorded once and replayed, at the cost of one launch.

A tile has one fixed shape, and so has a batch of them. Preset paper launches about a thousand kernels for each section
of a batch, and launching them takes the host longer than a GPU takes to compute them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]
"""Calls a function and gives what launches the same again, into the result that it also gives."""


class Graphs:
    """The graphs of one process, in one pool of memory: they run one after another.

    `notes` says in a line each which function has none, and why. Such a function is called as it is.
    """

    def __init__(self, record: Record | None = None) -> None:
        self.notes: list[str] = []
        self._record = record or self._on_gpu
        self._pool: Any = None

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of tensors, which always have the same shapes, by its graph.

        The first call records it and compares a replay with the call itself, byte by byte. It is called within
        torch.inference_mode. Results belong to the caller.
        """
        given: Any = None
        result: Any = None
        replay: Callable[[], None] | None = None
        tried = False

        def call(*inputs: Any) -> Any:
            nonlocal given, result, replay, tried
            if replay is None and tried:
                return function(*inputs)
            if replay is None:
                tried, wanted = True, function(*inputs)
                given = pytree.tree_map(torch.clone, inputs)
                try:
                    launch, result = self._record(lambda: function(*given))
                    launch()
                except RuntimeError as error:  # a kernel that cannot be recorded, or no memory for it
                    self.notes.append(f"no CUDA graph of {function.__name__}: {_first_line(error)}")
                    given = result = None
                    return wanted
                if not _same(result, wanted):
                    self.notes.append(f"no CUDA graph of {function.__name__}: a replay differs from the call")
                    given = result = None
                    return wanted
                replay = launch
                return wanted
            for mine, theirs in zip(pytree.tree_leaves(given), pytree.tree_leaves(inputs), strict=True):
                mine.copy_(theirs)
            replay()
            return pytree.tree_map(torch.clone, result)

        return call

    def _on_gpu(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads of the worker may use the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = function()
        return graph.replay, result


def _same(found: Any, wanted: Any) -> bool:
    """Whether two results are the same, byte by byte; numbers that are none count as the same."""
    pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True)
    return all(torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
