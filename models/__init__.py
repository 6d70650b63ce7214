"""Networks in plain PyTorch. Knows nothing of volumes, Dask or storage. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.catalog import BUILTIN_PRESET as BUILTIN_PRESET
from models.catalog import NETWORKS as NETWORKS
from models.catalog import builtin as builtin
from models.config import preset as find_preset
from models.memory import WARM_BYTES, peak_bytes, state_bytes
from models.metadata import WeightsError as WeightsError
from models.metadata import read_metadata as read_metadata

if TYPE_CHECKING:
    from torch import nn


def build(name: str, scale: int, preset: str | None = None) -> nn.Module:
    """The one door to every network that volume.yaml can name; torch is imported here, not before. Weights are random.

    A network has `encode_section((1, 1, H, W) in 0..1) -> state` and `fuse_window([state] * window) -> (1, 1, rH, rW)`,
    and sees one tile of one fixed size at a time.
    """
    if name == "gpemsr":
        from models.network import SuperResolver

        return SuperResolver(find_preset(scale, preset or "paper"))
    from models.baselines.interpolation import Bicubic, Nearest

    builders = {"nearest": Nearest, "bicubic": Bicubic}
    return builders[name](scale)


def held_bytes(name: str, scale: int, preset: str | None, tile: int, value: int = 4) -> tuple[int, int]:
    """Bytes beyond its weights that a network holds for a tile `tile` LR voxels across: at its fullest, what the process then
    keeps among them, and per encoded section. `value`: bytes per number. Imports no torch.
    """
    if name != "gpemsr":
        return 9 * (scale * tile) ** 2, 0  # twice in float32 and once as grey levels
    params = find_preset(scale, preset or "paper")
    return peak_bytes(params, tile, value) + WARM_BYTES, state_bytes(params, tile, value)


def load(path: Path, network: nn.Module) -> None:
    """Fill a network from a .safetensors file of ours or the authors' stage III dictionary. Raises WeightsError, OSError."""
    from models import weights
    from models.network import SuperResolver

    if path.suffix == ".safetensors" and isinstance(network, SuperResolver):
        weights.load(path, network)
    else:
        weights.load_published(network, weights.read_state(path))
