"""The weights that come with emsr: small, labelled, and better than bicubic on real EM that they have not seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from conftest import REPOSITORY, SHARED, run_here, volume_yaml, write_lr
from PIL import Image
from tifffile import imread

from models import builtin, read_metadata
from models.degrade import degrade
from models.evaluation import fidelity, perceptual

FOLDER = REPOSITORY / "models" / "builtin"
FILES = sorted(FOLDER.glob("*.safetensors"))
LICENCES = {"flyem-medulla": "CC BY 3.0 US", "drosophila-vnc": "CC BY-NC-SA 3.0"}
UNSEEN = {
    "flyem-medulla": ("flyem-medulla-z40", slice(88, 93)),
    "drosophila-vnc": ("drosophila-vnc-stack1", slice(16, 20)),
}
ALEX = SHARED / "weights" / "lpips-alex" / "alexnet_features_lpips_v0.1.safetensors"


def test_these_come_with_emsr() -> None:
    assert [path.stem for path in FILES] == [
        "drosophila-vnc-x16",
        "drosophila-vnc-x8",
        "flyem-medulla-x16",
        "flyem-medulla-x8",
    ]
    assert builtin("builtin", 8) == builtin("builtin:flyem-medulla", 8)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_small_and_says_what_it_is(path: Path) -> None:
    tissue, scale = re.fullmatch(r"(.*)-x(\d+)", path.stem).groups()  # type: ignore[union-attr]
    metadata = read_metadata(path)
    assert path.stat().st_size < 12e6
    assert (metadata.scale, metadata.preset, metadata.licence) == (int(scale), "small", LICENCES[tissue])
    assert json.loads(metadata.card)["recipe"]["seed"] == 1
    card = path.with_suffix(".md").read_text()
    for wanted in (
        LICENCES[tissue],
        "Recipe",
        "seed 1",
        "minutes",
        "PSNR",
        "LPIPS",
        "DISTS",
        "synthesised",
        "fidelity",
    ):
        assert wanted in card, wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_unseen_em_comes_nearer_to_the_truth_than_bicubic(path: Path, shared_data: Path, tmp_path: Path) -> None:
    """Through the pipeline, a corner of sections that were not learnt from: by PSNR, and by LPIPS."""
    tissue, scale = re.fullmatch(r"(.*)-x(\d+)", path.stem).groups()  # type: ignore[union-attr]
    stack, sections = UNSEEN[tissue]
    hr = imread(shared_data / stack / "raw.tif")[sections, :512, :512]
    lr = np.stack([degrade(np.ascontiguousarray(section), int(scale)) for section in hr])
    write_lr(tmp_path / "lr.zarr", lr)
    keys = {
        "network__name": "gpemsr",
        "network__scale": int(scale),
        "network__weights": f"builtin:{tissue}",
        "target__mips": 1,
        "work__slab_shape": [4, 64, 64],
    }
    run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", **keys))
    sr = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r"))
    bicubic = np.stack(
        [np.asarray(Image.fromarray(section).resize((512, 512), Image.Resampling.BICUBIC)) for section in lr]
    )
    gain = np.mean([fidelity.psnr(a, t) - fidelity.psnr(b, t) for a, b, t in zip(sr, bicubic, hr, strict=True)])
    assert gain > {"8": 0.4, "16": 0.1}[scale]
    if not ALEX.exists():
        pytest.skip(f"no LPIPS weights at {ALEX} (set EMSR_SHARED)")
    lpips = perceptual.lpips_alex(ALEX)
    with torch.no_grad():
        of_sr, of_bicubic = (
            float(lpips(*(torch.tensor(x)[:, None].float() / 255 for x in (image, hr))).mean())
            for image in (sr, bicubic)
        )
    assert of_sr < 0.85 * of_bicubic
    provenance = json.loads((tmp_path / "sr" / "zarr.json").read_text())["attributes"]["emsr"]
    assert provenance["network"]["weights_licence"] == LICENCES[tissue]
