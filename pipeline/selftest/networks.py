"""The networks that the doctor runs: those of the reference vectors, and one window through any of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import vectors
from models.vectors import Vector
from pipeline.config.volume import NetworkConfig
from pipeline.inference.describe import describe
from pipeline.inference.network import Network
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process import device


class Formula:
    """Weights by formula, each file written when it is first asked for. `folder` is one of temporary files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def spec(self, vector: Vector) -> NetworkSpec:
        """The network of a vector in float32. Raises OSError where its weights cannot be written."""
        weights = vector.weights
        if weights == vectors.FORMULA:
            path = self._folder / f"{vector.preset}-x{vector.scale}.safetensors"
            if not path.exists():
                vectors.write_weights(path, vector.scale, vector.preset)
            weights = path.as_uri()
        config = NetworkConfig(name="gpemsr", scale=vector.scale, preset=vector.preset, weights=weights)  # type: ignore[arg-type]
        return describe(config)


class Window(NamedTuple):
    """What a network makes of a window: SR of its centre (rH, rW), not clamped, and the indices of its sections; empty
    for a network without a codebook.
    """

    sr: NDArray[np.float32]
    indices: NDArray[np.int64]

    def psnr_db(self, other: Window) -> float | None:
        """Peak signal-to-noise ratio of SR to another's, of a peak of 1; None where nothing differs."""
        error = float(np.mean((self.sr.astype(np.float64) - other.sr) ** 2))
        return float(-10 * np.log10(error)) if error else None

    def changed(self, other: Window) -> int:
        """How many indices differ."""
        return int((self.indices != other.indices).sum())


def with_precision(spec: NetworkSpec, precision: str, cell: int | None = None, batch: int = 1) -> NetworkSpec:
    """The same network, computed otherwise."""
    lattice = spec.lattice if cell is None else replace(spec.lattice, cell=cell)
    return replace(spec, precision=precision, batch=batch, lattice=lattice)


def run_window(network: Network, lr: NDArray[np.uint8], cut: int = 0) -> Window:
    """One window (N, H, W) of LR voxels, of any size that the network takes, through its module. SR is without what
    `cut` LR voxels on each side become.
    """
    import torch

    seen: list[torch.Tensor] = []
    indexer = getattr(getattr(network.module, "prior", None), "indexer", None)
    hook = None if indexer is None else indexer.register_forward_hook(lambda *call: seen.append(call[2].argmax(1)))
    try:
        device.fix_rounding(network.device, network.spec.precision)  # of the network built last, perhaps
        with torch.inference_mode():
            sections = torch.from_numpy(lr).to(network.device).float().div_(255)[:, None, None]
            states = [network.module.encode_section(section) for section in sections]  # type: ignore[operator]
            sr = network.module.fuse_window(states, cut)[0, 0].float().cpu().numpy()  # type: ignore[operator]
    finally:
        if hook is not None:
            hook.remove()
    return Window(sr, torch.cat(seen).cpu().numpy() if seen else np.zeros((0,), np.int64))
