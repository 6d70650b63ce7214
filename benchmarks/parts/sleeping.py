"""A network that takes time but no processor, like one on a GPU: it sleeps SLEEPING_S per slab and repeats voxels.

It replaces `nearest` in every process that imports this module: a benchmark's own, and workers that Dask has preload
it (`--preload parts.sleeping`, or `distributed.worker.preload`).
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np
from torch import Tensor

import models
from models.baselines.interpolation import Nearest

DEPTH = 8
"""Sections per slab in these benchmarks: the sleep is spread over them."""

HALO = (2, 8, 8)
DEVICE = threading.Lock()


class Sleeping(Nearest):
    def fuse_window(self, states: list[Tensor], cut: int = 0) -> Tensor:
        time.sleep(float(os.environ["SLEEPING_S"]) / DEPTH)
        return super().fuse_window(states, cut)


models.build = lambda name, scale, preset=None: Sleeping(scale)


def whole_slab(block: np.ndarray) -> np.ndarray:
    """The same network for dask.array, which gives it a slab with its halo; the halo is cut off."""
    z, y, x = HALO
    own = block[z : block.shape[0] - z, y : block.shape[1] - y, x : block.shape[2] - x]
    with DEVICE:
        time.sleep(float(os.environ["SLEEPING_S"]))
        return own.repeat(8, 1).repeat(8, 2)
