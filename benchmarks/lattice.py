"""Measures what a tile's extent does to the output: the tile lattice against the whole section.

    python benchmarks/lattice.py [weights=small] [volume=phantom] [scale=8] [side=128] [centres=1]
                                 [cells=32,48,64,96,128] [halos=8,16,24,32]

`weights` is a .safetensors file, or `small` or `paper` for random weights. `volume` is a zarr array of HR sections, or
`phantom`. The first side x side LR voxels of its first sections, made from HR, are computed whole and then on every
lattice. Halos are multiples of 8, as all sizes of the lattice. Printed for each lattice:

  psnr       PSNR against the whole section's output, dB
  truth      PSNR against HR, dB; in the line of the whole section that of its output
  of_whole   truth minus the whole section's, dB: what tiles cost
  changed    share of the reference's indices that differ
  seam       mean |difference| between neighbours across cell borders, over that across LR voxels' borders inside cells
  excess     seam over the whole section's at the same places, which leaves out the tissue's share
  cpu        CPU seconds per Mpx of SR in a long z column
  area       tile over cell
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import zarr
from network_speed import Clock, live_network
from numpy.typing import NDArray

import models
from examples.make_phantom import phantom
from models.degrade import degrade
from models.metadata import read_metadata
from models.network import SuperResolver
from pipeline.base.geometry import ZYX, Box
from pipeline.inference.tiles import pad_laterally
from pipeline.plan.lattice import Lattice

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Computed:
    """`sr` is (centres, rH, rW) in 0..1; `indices` are the first centre's; `cpu_s` is for one of a long z column."""

    sr: Floats
    indices: NDArray[np.int64]
    cpu_s: float


def load(weights: str, scale: int) -> SuperResolver:
    if weights in ("small", "paper"):
        return live_network(scale, weights)
    network = models.build("gpemsr", scale, read_metadata(Path(weights)).preset)
    models.load(Path(weights), network)
    assert isinstance(network, SuperResolver)
    return network.eval()


def tile(network: SuperResolver, sections: Bytes) -> Computed:
    """Computes one tile from its sections, (centres + 4, H, W)."""
    clock, seen = Clock(), []
    hook = network.prior.indexer.register_forward_hook(
        lambda _module, _inputs, logits: seen.append(logits.argmax(1)[0])
    )
    with torch.inference_mode():
        inputs = torch.from_numpy(sections.copy()).float().div_(255)[:, None, None]
        states = [clock("encode", network.encode_section, each) for each in inputs]
        centres = len(states) - 4
        sr = torch.cat([clock("fuse", network.fuse_window, states[z : z + 5])[0] for z in range(centres)])
    hook.remove()
    return Computed(
        sr.clamp(0, 1).numpy(), seen[2].numpy(), clock.cpu["encode"] / len(states) + clock.cpu["fuse"] / centres
    )


def on_lattice(network: SuperResolver, sections: Bytes, lattice: Lattice, origin: ZYX) -> Computed:
    """Computes a volume whose first voxel is `origin`, tile by tile. CPU seconds are the mean of a tile."""
    scale, prior = network.params.scale, network.params.prior.patch
    box = Box.at(origin, ZYX.of(sections.shape))
    _, height, width = sections.shape
    sr = np.empty((len(sections) - 4, scale * height, scale * width), np.float32)
    indices = np.empty((height * scale // prior, width * scale // prior), np.int64)
    seconds = []
    for cell in lattice.cells(box):
        want = lattice.with_halo(cell)
        computed = tile(network, pad_laterally(sections, box, want, lattice.padding))
        inside, place = cell.slices(want.start)[1:], cell.slices(origin)[1:]
        sr[:, *enlarged(place, scale, 1)] = computed.sr[:, *enlarged(inside, scale, 1)]
        indices[enlarged(place, scale, prior)] = computed.indices[enlarged(inside, scale, prior)]
        seconds.append(computed.cpu_s)
    return Computed(sr, indices, float(np.mean(seconds)))


def enlarged(place: tuple[slice, ...], by: int, over: int) -> tuple[slice, ...]:
    return tuple(slice(s.start * by // over, s.stop * by // over) for s in place)


def psnr(image: Floats, truth: Floats) -> float:
    return float(-10 * np.log10(np.mean((image - truth) ** 2, dtype=np.float64) + 1e-12))


def steps(sr: Floats, scale: int) -> Iterator[Floats]:
    """Yields, for rows and then columns, the mean |difference| across every inner border between LR voxels."""
    for axis in (1, 2):
        moved = np.moveaxis(sr, axis, 0)
        at = np.arange(scale, len(moved), scale)
        yield np.abs(moved[at] - moved[at - 1]).mean((1, 2))


def seam(sr: Floats, scale: int, cell: int, origin: int) -> float:
    """Mean step across cell borders over mean step inside cells."""
    borders: list[float] = []
    inside: list[float] = []
    for row in steps(sr, scale):
        on_border = (origin + 1 + np.arange(len(row))) % cell == 0
        borders.extend(row[on_border])
        inside.extend(row[~on_border])
    return float(np.mean(borders) / np.mean(inside))


def read(volume: str, sections: int, side: int) -> Bytes:
    if volume == "phantom":
        return phantom((sections, side, side))
    array = zarr.open_array(volume, mode="r")
    return np.asarray(array[:sections, :side, :side])


def measure(
    weights: str, volume: str, scale: int, side: int, centres: int, lattices: list[tuple[int, int]]
) -> list[dict[str, float]]:
    network = load(weights, scale)
    hr = read(volume, centres + 4, side * scale)
    lr = np.stack([degrade(section, scale) for section in hr])
    truth = hr[2:-2].astype(np.float32) / 255
    whole = tile(network, lr)
    print(
        {
            "whole": f"{side} x {side}",
            "truth": round(psnr(whole.sr, truth), 2),
            "cpu": round(whole.cpu_s / (side * scale) ** 2 * 1e6, 2),
        },
        flush=True,
    )
    found = []
    for cell, halo in lattices:
        origin = (cell - side // 16 * 8) % cell  # a border in the middle of the section, whatever the cell
        computed = on_lattice(network, lr, Lattice(cell, halo, 5, "mirror"), ZYX(0, origin, origin))
        row = {
            "cell": cell,
            "halo": halo,
            "psnr": psnr(computed.sr, whole.sr),
            "truth": psnr(computed.sr, truth),
            "of_whole": psnr(computed.sr, truth) - psnr(whole.sr, truth),
            "changed": float((computed.indices != whole.indices).mean()),
            "seam": seam(computed.sr, scale, cell, origin),
            "excess": seam(computed.sr, scale, cell, origin) / seam(whole.sr, scale, cell, origin),
            "cpu": computed.cpu_s / (cell * scale) ** 2 * 1e6,
            "area": ((cell + 2 * halo) / cell) ** 2,
        }
        found.append(row)
        print({key: round(value, 3) for key, value in row.items()}, flush=True)
    return found


def main(
    weights: str = "small",
    volume: str = "phantom",
    scale: str = "8",
    side: str = "128",
    centres: str = "1",
    *lists: str,
) -> None:
    torch.set_num_threads(1)
    cells, halos = (
        [int(n) for n in given.split(",")] for given in (*lists, *("32,48,64,96,128", "8,16,24,32")[len(lists) :])
    )
    measure(weights, volume, int(scale), int(side), int(centres), [(cell, halo) for cell in cells for halo in halos])


if __name__ == "__main__":
    main(*sys.argv[1:])
