"""Measures what the neighbouring sections gain: trained weights see the window, and then the centre section five times.

    PYTHONPATH=. python benchmarks/neighbours.py WEIGHTS STACK.tif [first=88] [stop=93] [side=512]

STACK.tif holds HR sections. The upper left corner of `side` voxels is cut from each and reduced by antialiased bicubic.
Printed is the PSNR of the centres first .. stop - 1 and their mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tifffile import imread

from models import weights
from models.degrade import degrade
from models.evaluation.fidelity import psnr
from models.metadata import read_metadata
from models.network import SuperResolver


def main(path: str, stack: str, first: str = "88", stop: str = "93", side: str = "512") -> None:
    params = read_metadata(Path(path)).params
    network = SuperResolver(params)
    weights.load(Path(path), network)
    hr = imread(stack)[int(first) - 2 : int(stop) + 2, : int(side), : int(side)]
    lr = np.stack([degrade(np.ascontiguousarray(section), params.scale) for section in hr])
    print("| centre | bicubic, dB | five sections | the centre five times |")
    print("|---|---|---|---|")
    rows = []
    for i in range(2, len(hr) - 2):
        window = torch.from_numpy(lr[i - 2 : i + 3].copy()).float().div(255)[None, :, None]
        bicubic = np.asarray(Image.fromarray(lr[i]).resize(hr.shape[:0:-1], Image.Resampling.BICUBIC))
        with torch.no_grad():
            shown = [
                (network(window, alone=alone)[0, 0].clamp(0, 1) * 255).round().byte().numpy() for alone in (False, True)
            ]
        rows.append([psnr(image, hr[i]) for image in (bicubic, *shown)])
        print(f"| {int(first) + i - 2} | " + " | ".join(f"{value:.3f}" for value in rows[-1]) + " |", flush=True)
    print("| mean | " + " | ".join(f"{value:.3f}" for value in np.mean(rows, 0)) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
