"""What a network is, as values: everything that changes its output."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.plan.lattice import Lattice


@dataclass(frozen=True)
class NetworkSpec:
    """A network by name and numbers.

    `batch` is the number of tiles that are computed at once. On a GPU another number gives other last bits.
    `weights_sha256` is empty for networks without weights. `weights` says where they lie, which changes no output.
    `weights_licence` is the licence of the data that they were trained on; it goes into the provenance.
    """

    name: str
    scale: int
    preset: str | None
    weights_sha256: str
    precision: str
    lattice: Lattice
    weights: str = ""
    weights_licence: str = ""
    batch: int = 1

    @property
    def narrow(self) -> bool:
        """Whether kernels are stored in two bytes a number."""
        return self.precision in ("bfloat16", "float16")
