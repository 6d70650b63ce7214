"""Properties of networks that a plan needs before one is built. Importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traits:
    """Properties of one network. `window` is the number of consecutive sections that make one output section.
    `padding`, `mirror` or `edge`, is how voxels beyond the volume are invented. `cell` and, by scale, `halo` are the
    defaults of the tile lattice in LR voxels, and `min_halo` is the smallest halo allowed. `weights` tells whether the
    network has any.
    """

    window: int
    padding: str
    cell: int
    halo: dict[int, int]
    min_halo: int
    weights: bool


NETWORKS: dict[str, Traits] = {
    "gpemsr": Traits(window=5, padding="mirror", cell=64, halo={8: 16, 16: 24}, min_halo=0, weights=True),
    "nearest": Traits(window=1, padding="edge", cell=64, halo={8: 0, 16: 0}, min_halo=0, weights=False),
    "bicubic": Traits(window=1, padding="edge", cell=64, halo={8: 8, 16: 8}, min_halo=8, weights=False),
}

NARROW = ("bfloat16", "float16")
"""The precisions in which kernels are stored in two bytes a number (models/precision)."""

BUILTIN_PRESET = "small"
"""The preset of the weights that come with emsr."""
DEFAULT_TISSUE = "flyem-medulla"
"""The tissue of `builtin` without a name. The licence of its training data allows any use, with attribution."""


def builtin(weights: str, scale: int) -> Path:
    """The path of the weights `builtin` or `builtin:TISSUE` for a scale. Raises ValueError with a list of those there
    are.
    """
    tissue = weights.partition(":")[2] or DEFAULT_TISSUE
    folder = Path(__file__).parent / "builtin"
    path = folder / f"{tissue}-x{scale}.safetensors"
    if path.parent != folder or not path.is_file():
        available = ", ".join(
            f"builtin:{name} (x{at})"
            for name, _, at in sorted(f.stem.rpartition("-x") for f in folder.glob("*.safetensors"))
        )
        raise ValueError(f"no {weights} at scale {scale}; there are {available}")
    return path
