"""Networks in plain PyTorch. Knows nothing of volumes, Dask or storage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.catalog import NETWORKS as NETWORKS

if TYPE_CHECKING:
    from torch import nn


def build(name: str, scale: int, preset: str | None = None) -> nn.Module:
    """The one door to every network that volume.yaml can name; torch is imported here, not before.

    A network has `encode_section((1, 1, H, W) in 0..1) -> state` and `fuse_window([state] * window) -> (1, 1, rH, rW)`,
    and sees one tile of one fixed size at a time.
    """
    from models.baselines.interpolation import Bicubic, Nearest

    builders = {"nearest": Nearest, "bicubic": Bicubic}
    return builders[name](scale)
