"""What a plan must know of a network before it is built; importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traits:
    """`window` sections enter one output section; lateral `padding` is `mirror` or `edge`; `cell` and, by scale, `halo` are the
    default lattice in LR voxels and `min_halo` the least that keeps cells without seams; `weights` tells whether it has any.
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

BUILTIN_PRESET = "small"
DEFAULT_TISSUE = "flyem-medulla"
"""What `builtin` alone means: trained on data that may be used for anything, with attribution."""


def builtin(weights: str, scale: int) -> Path:
    """The file of `builtin` or `builtin:TISSUE` weights. Raises ValueError that lists what there is."""
    tissue = weights.partition(":")[2] or DEFAULT_TISSUE
    folder = Path(__file__).parent / "builtin"
    path = folder / f"{tissue}-x{scale}.safetensors"
    if path.parent != folder or not path.is_file():
        there = ", ".join(
            f"builtin:{name} (x{at})"
            for name, _, at in sorted(f.stem.rpartition("-x") for f in folder.glob("*.safetensors"))
        )
        raise ValueError(f"no {weights} at scale {scale}; there are {there}")
    return path
