"""What a plan must know of a network before it is built; importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """`window` sections enter one output section; lateral `padding` is `mirror` or `edge`; `cell` and `halo` are the
    default lattice in LR voxels and `min_halo` the least that keeps cells without seams; `weights` tells whether it has any.
    """

    window: int
    padding: str
    cell: int
    halo: int
    min_halo: int
    weights: bool


NETWORKS: dict[str, Traits] = {
    "gpemsr": Traits(window=5, padding="mirror", cell=64, halo=8, min_halo=0, weights=True),
    "nearest": Traits(window=1, padding="edge", cell=64, halo=0, min_halo=0, weights=False),
    "bicubic": Traits(window=1, padding="edge", cell=64, halo=8, min_halo=8, weights=False),
}
