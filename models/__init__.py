"""Networks in plain PyTorch. They know nothing of volumes, Dask or storage. Importing this does not import torch.

Docstrings in this package call "Learning Large-Factor EM Image Super-Resolution with Generative Priors" (Shou et al.,
CVPR 2024) "the paper" and use its symbols, and call those who wrote it "the authors". `network.md` is a description of
their published code that is not part of this repository. In shapes, r is the scale and p the compression patch, the
side in HR voxels of the patch that one code (token) stands for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models.catalog import BUILTIN_PRESET as BUILTIN_PRESET
from models.catalog import NARROW as NARROW
from models.catalog import NETWORKS as NETWORKS
from models.catalog import builtin as builtin
from models.config import preset as find_preset
from models.memory import WARM_BYTES as WARM_BYTES
from models.memory import peak_bytes, state_bytes
from models.metadata import WeightsError as WeightsError
from models.metadata import is_ours as is_ours
from models.metadata import read_metadata as read_metadata

if TYPE_CHECKING:
    from torch import nn


def build(name: str, scale: int, preset: str | None = None) -> nn.Module:
    """Build a network that volume.yaml can name (`NETWORKS`), with random weights. torch is imported here, not before.

    A network has `encode_section((B, 1, H, W) in 0..1) -> state` and `fuse_window([state] * window, cut) -> (B, 1,
    r(H - 2 cut), r(W - 2 cut))`, for B LR tiles of H x W voxels, scale r, a window of consecutive sections, and `cut`
    LR voxels on each side of which no output is wanted. The result is a new tensor, which its caller may overwrite. All
    tiles of a run have one size.
    Raises ValueError for an unknown preset.
    """
    if name == "gpemsr":
        from models.network import SuperResolver

        return SuperResolver(find_preset(scale, preset or "paper"))
    from models.baselines.interpolation import Bicubic, Nearest

    builders = {"nearest": Nearest, "bicubic": Bicubic}
    return builders[name](scale)


def held_bytes(
    name: str, scale: int, preset: str | None, tile: int, precision: str = "float32", gpu: bool = False
) -> tuple[int, int]:
    """Bytes that a network holds beyond its weights for a tile of `tile` x `tile` LR voxels: the largest sum at one
    moment; and the state of one encoded section. Does not import torch.
    """
    if name != "gpemsr":
        return 9 * (scale * tile) ** 2, 0  # the output twice in float32 and once in uint8
    params, narrow = find_preset(scale, preset or "paper"), precision in NARROW
    value = 4 if not narrow else 2 if gpu else 3  # on a CPU, convolutions of narrow maps have buffers of their own
    return peak_bytes(params, tile, value, gpu), state_bytes(params, tile, 2 if narrow else 4)


def lower(network: nn.Module, precision: str) -> None:
    """Store a network's kernels in the type of `precision`: float32, tf32 (the same), bfloat16 or float16."""
    from models import precision as narrower

    narrower.lower(network, precision)


def load(path: Path, network: nn.Module) -> None:
    """Copy weights into a network, from a .safetensors file that emsr wrote or from the authors' dictionary of stage
    III, in a .safetensors or PyTorch file.

    Raises WeightsError, OSError.
    """
    from models import weights
    from models.network import SuperResolver
    from models.weights_file import read_state

    if isinstance(network, SuperResolver) and is_ours(path):
        weights.load(path, network)
    else:
        weights.load_published(network, read_state(path), str(path))
