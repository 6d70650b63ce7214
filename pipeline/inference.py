"""Arrays in, arrays out: the padded LR voxels of a slab become its SR voxels. The only door to models/."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import models
from pipeline.config import NetworkConfig
from pipeline.errors import NetworkError
from pipeline.geometry import ZYX, Box
from pipeline.plan import Lattice, Plan, Slab

if TYPE_CHECKING:
    import torch

DEVICE_LOCK = threading.Lock()
"""Held by one slab at a time around `super_resolve`: two slabs in flight overlap their I/O, never the device."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network by everything that changes its output. `weights_sha256` is empty for networks without weights."""

    name: str
    scale: int
    preset: str | None
    weights_sha256: str
    precision: str
    lattice: Lattice


def describe(config: NetworkConfig) -> NetworkSpec:
    """What volume.yaml asks for, with defaults filled in. Imports no torch. Raises NetworkError."""
    traits = models.NETWORKS.get(config.name)
    if traits is None:
        known = ", ".join(models.NETWORKS)
        raise NetworkError(f"network.name {config.name} is not in this version", f"one of {known}", "Set network.name to one of them")
    if not traits.weights:
        given = [key for key in ("preset", "weights", "sha256") if getattr(config, key) is not None]
        if given:
            raise NetworkError(f"network.{given[0]} is set, but {config.name} has no weights", "", f"Remove network.{given[0]}")
        if config.precision != "float32":
            raise NetworkError(f"network.precision {config.precision} for {config.name}", "float32", "Remove network.precision")
    cell = traits.cell if config.cell is None else config.cell
    halo = traits.halo if config.halo is None else config.halo
    if halo < traits.min_halo:
        raise NetworkError(
            f"network.halo {halo} would show the cell borders of {config.name}", f"at least {traits.min_halo} LR voxels", "Raise or remove network.halo"
        )
    lattice = Lattice(cell, halo, traits.window, traits.padding)
    return NetworkSpec(config.name, config.scale, config.preset, "", config.precision, lattice)


class Network:
    """A network on its device, ready to run. Building it is slow; run it under DEVICE_LOCK."""

    def __init__(self, spec: NetworkSpec) -> None:
        import torch

        self.spec = spec
        self.device = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, int(os.environ.get("EMSR_THREADS", "0")) or len(os.sched_getaffinity(0))))
        self.module = models.build(spec.name, spec.scale, spec.preset).to(self.device).eval()

    def tile(self, sections: NDArray[np.uint8], out: NDArray[np.uint8], keep: tuple[slice, slice]) -> None:
        """One tile through all its sections: (D + window - 1, T, T) uint8 in, (D, rh, rw) uint8 into `out`.

        `keep` cuts the cell out of the (rT, rT) output. Each section is encoded once; a ring of `window` states slides over z.
        """
        import torch

        window = self.spec.lattice.window
        ring: list[object] = []
        with torch.inference_mode():
            for z in range(len(sections)):
                section = torch.from_numpy(sections[z]).to(self.device).float().div_(255)[None, None]
                ring.append(self.module.encode_section(section))  # type: ignore[operator]
                if len(ring) == window:
                    sr = self.module.fuse_window(ring)  # type: ignore[operator]
                    out[z - window + 1] = _quantise(sr[0, 0][keep])
                    ring.pop(0)


def _quantise(sr: torch.Tensor) -> NDArray[np.uint8]:
    import torch

    grey: NDArray[np.uint8] = sr.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()
    return grey


def pad_laterally(voxels: NDArray[np.uint8], have: Box, want: Box, mode: str) -> NDArray[np.uint8]:
    """`voxels` hold the real voxels of `have`; the result covers `want` in y and x, invented by `mode` outside.

    `mirror` reflects about the volume's face (the end voxel twice), as often as it takes; `edge` repeats the end voxel.
    """
    rows = _sources(want.start.y, want.stop.y, have.start.y, have.stop.y, mode)
    cols = _sources(want.start.x, want.stop.x, have.start.x, have.stop.x, mode)
    padded: NDArray[np.uint8] = voxels[:, rows][:, :, cols]
    return padded


def _sources(start: int, stop: int, low: int, high: int, mode: str) -> NDArray[np.intp]:
    i, n = np.arange(start, stop) - low, high - low
    if mode == "edge":
        return np.clip(i, 0, n - 1)
    i = np.mod(i, 2 * n)
    return np.where(i < n, i, 2 * n - 1 - i)


def super_resolve(network: Network, lr: NDArray[np.uint8], plan: Plan, slab: Slab) -> NDArray[np.uint8]:
    """SR voxels of `slab`. `lr` holds its sections with z-halo (ends and bad sections already replaced), laterally slab.read.

    Works tile by tile on the lattice, so the result is the same for every slab that contains a voxel (law 1).
    """
    lattice, scale = plan.lattice, plan.scale
    have = Box(ZYX(0, slab.read.start.y, slab.read.start.x), ZYX(len(lr), slab.read.stop.y, slab.read.stop.x))
    out = np.empty(tuple(slab.lr.shape.lateral(scale)), np.uint8)
    for cell in lattice.cells(slab.lr):
        want = lattice.padded(cell)
        tile = pad_laterally(lr[_crop(want, have)], have.intersect(_laterally(want, have)), want, lattice.padding)
        keep = cell.lateral(scale).slices(want.start.lateral(scale))
        place = cell.lateral(scale).slices(slab.lr.start.lateral(scale))
        network.tile(np.ascontiguousarray(tile), out[place], keep[1:])
    return out


def _laterally(want: Box, have: Box) -> Box:
    return Box(ZYX(have.start.z, want.start.y, want.start.x), ZYX(have.stop.z, want.stop.y, want.stop.x))


def _crop(want: Box, have: Box) -> tuple[slice, slice, slice]:
    return have.intersect(_laterally(want, have)).slices(have.start)


def back_projection_error(lr: NDArray[np.uint8], sr: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """|mean of each r x r block of SR - measured LR voxel|, grey levels rounded half up: (D, h, w) from (D, h, w), (D, rh, rw).

    What the upsampled image claims, measured again with the coarse pixel: 0 where it agrees with the microscope.
    """
    d, h, w = lr.shape
    sums = sr.reshape(d, h, scale, w, scale).sum(axis=(2, 4), dtype=np.int32)
    area = scale * scale
    error: NDArray[np.uint8] = ((2 * np.abs(sums - lr.astype(np.int32) * area) + area) // (2 * area)).astype(np.uint8)
    return error
