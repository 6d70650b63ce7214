"""The stand-in network's output voxels depend on the whole tile: group norm, arg-max over a table, five sections.

It takes the place of `nearest` in processes that import this module and call `install` (see run_standin.py), so that
the laws are proved with a network that no halo makes independent of the cut.
"""

from __future__ import annotations

import dataclasses
import os
import time

import dask
import torch
from torch import Tensor, nn
from torch.nn import functional

import models
from models.layers import within


class StandIn(nn.Module):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale
        random = torch.Generator().manual_seed(7)
        self.kernel = torch.randn(8, 1, 5, 5, generator=random) / 5
        self.table = torch.randn(16, 8, generator=random)
        self.delay_s = float(os.environ.get("STANDIN_DELAY_S", "0"))

    def encode_section(self, section: Tensor) -> Tensor:
        if self.delay_s:
            time.sleep(self.delay_s)
        while os.path.exists(os.environ.get("STANDIN_HOLD", "")):  # a test holds every slab in flight
            time.sleep(0.1)
        features = functional.group_norm(functional.conv2d(section, self.kernel, padding=2), 4)
        codes = torch.einsum("bchw,kc->bkhw", features, self.table).argmax(1)
        return torch.cat([section, self.table[codes].permute(0, 3, 1, 2)], 1)

    def fuse_window(self, states: list[Tensor], cut: int = 0) -> Tensor:
        centre = states[2]
        attention = torch.stack([(s * centre).mean((1, 2, 3), keepdim=True) for s in states]).softmax(0)
        mixed = sum(a * s for a, s in zip(attention, states, strict=True))
        assert isinstance(mixed, Tensor)
        up = functional.interpolate(mixed, scale_factor=self.scale, mode="bilinear", align_corners=False)
        return within((up[:, :1] + 0.1 * up[:, 1:].mean(1, keepdim=True)).clamp(0, 1), cut * self.scale)


def install() -> None:
    models.NETWORKS["nearest"] = dataclasses.replace(
        models.NETWORKS["nearest"], window=5, padding="mirror", cell=16, halo={8: 8, 16: 8}
    )
    models.build = lambda name, scale, preset=None: StandIn(scale)


def reach_workers(script: str) -> None:
    """Local workers run this script too, by another name than `__main__`. Of themselves they run nothing of it."""
    dask.config.set({"distributed.worker.preload": [script]})
