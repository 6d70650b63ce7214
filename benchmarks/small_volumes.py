"""Measures what a small volume loses on the lattice that it gets by default: one cell as large as itself, without halo.

    PYTHONPATH=.:benchmarks python benchmarks/small_volumes.py WEIGHTS STACK.tif FIRST STOP [sides=16,30,48] [crops=8]
                                                               [halos=0,8,16]

STACK.tif holds HR sections. `crops` volumes of side x side LR voxels are cut from it, evenly spread, their centre
sections evenly spread over FIRST .. STOP - 1. LR is made from whole HR sections; a crop sees nothing beyond its faces.
Each is computed on a lattice of cell 64 with the network's default halo, and of one cell that covers it with each of
`halos`. Printed for each lattice:

  truth      PSNR against HR, dB, mean over the crops
  gain       truth minus that of cell 64, dB: mean over the crops and standard error of that mean
  area       computed voxels over those of the volume
  cpu        CPU seconds for a section of the volume in a long z column
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from lattice import Bytes, load, on_lattice, psnr
from tifffile import imread

import models
from models.degrade import degrade
from models.metadata import read_metadata
from models.network import SuperResolver
from pipeline.base.geometry import ZYX, Box
from pipeline.plan.lattice import Lattice


def cut(stack: Bytes, first: int, stop: int, side: int, crops: int, scale: int) -> list[tuple[Bytes, Bytes]]:
    """(LR sections of a window, HR of its centre) of each crop. Beyond the stack's ends the end section is repeated."""
    rows, cols = (size // scale for size in stack.shape[1:])
    found = []
    for i in range(crops):
        z = first + i * (stop - first) // crops
        y, x = (round((size - side) * ((i * step + 0.5) / crops % 1)) for size, step in ((rows, 1), (cols, 3)))
        sections = [stack[min(max(z + d, 0), len(stack) - 1), : rows * scale, : cols * scale] for d in range(-2, 3)]
        lr = np.stack([degrade(np.ascontiguousarray(each), scale)[y : y + side, x : x + side] for each in sections])
        found.append((lr, sections[2][y * scale : (y + side) * scale, x * scale : (x + side) * scale]))
    return found


def measure(network: SuperResolver, crops: list[tuple[Bytes, Bytes]], lattice: Lattice) -> tuple[list[float], float]:
    """PSNR against HR of each crop, dB, and mean CPU seconds of a section."""
    scores, seconds = [], []
    for lr, truth in crops:
        computed = on_lattice(network, lr, lattice, ZYX(0, 0, 0))
        tiles = sum(1 for _ in lattice.cells(Box.of((0, 0, 0), lr.shape)))
        scores.append(psnr(computed.sr[0], truth.astype(np.float32) / 255))
        seconds.append(computed.cpu_s * tiles)
    return scores, float(np.mean(seconds))


def main(
    weights: str, stack: str, first: str, stop: str, sides: str = "16,30,48", crops: str = "8", halos: str = "0,8,16"
) -> None:
    torch.set_num_threads(1)
    scale = read_metadata(Path(weights)).scale
    network = load(weights, scale)
    hr = imread(stack)
    default = Lattice(64, models.NETWORKS["gpemsr"].halo[scale], 5, "mirror")
    print("| side | cell | halo | truth, dB | gain, dB | area | CPU s |\n|---|---|---|---|---|---|---|")
    for side in map(int, sides.split(",")):
        volumes = cut(hr, int(first), int(stop), side, int(crops), scale)
        one = [Lattice(-(-side // 8) * 8, int(halo), 5, "mirror") for halo in halos.split(",")]
        usual: list[float] = []
        for lattice in (default, *one):
            scores, cpu_s = measure(network, volumes, lattice)
            usual = usual or scores
            gain = np.subtract(scores, usual)
            area = (-(-side // lattice.cell) * lattice.tile / side) ** 2
            gained = f"{gain.mean():+.3f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.3f}"
            print(
                f"| {side} | {lattice.cell} | {lattice.halo} | {np.mean(scores):.3f} | {gained} | {area:.2f} "
                f"| {cpu_s:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
