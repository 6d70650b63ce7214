"""Trains, scores and installs the weights that come with emsr: the whole recipe from the data on, as it was run.

All stages of a tissue, at the end of which models/builtin/flyem-medulla-x8.safetensors and others are written; one
stage:

    python examples/train/builtin_weights.py flyem-medulla WORK
    python examples/train/builtin_weights.py drosophila-vnc WORK --only network-x8

An interrupted run is resumed by the same command. The script needs `pip install '.[train,evaluate]'` and EMSR_SHARED,
the folder with `data/` and `weights/` (LPIPS' AlexNet serves as a loss; none of its values is in the result). It writes
the stage.yaml of every stage to WORK, for `emsr train`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tifffile import imread

from models.degrade import degrade
from pipeline import evaluate, run, train
from pipeline.base.command import guarded
from pipeline.base.errors import UserError
from pipeline.convert import convert


@dataclass(frozen=True)
class Tissue:
    """A stack of HR sections, with sections [first, one past the last] for training and for validation, the volumes
    whose scores are in the card, and the licence and credit of the data.

    `perceptual` is the weight of LPIPS beside the squared error in the last stage, by scale. It is so small that LPIPS
    is less than a tenth of the squared error, and costs a few hundredths of a dB. The stage longer-x8 takes `cycles`
    times 1000 steps: more where there are more sections to train on.
    """

    stack: str
    voxel_size_nm: tuple[float, float, float]
    trained_on: tuple[int, int]
    held_out: tuple[int, int]
    licence: str
    credit: str
    perceptual: dict[int, float]
    cycles: int
    tests: dict[str, tuple[str, tuple[int, int]]]


TISSUES = {
    "flyem-medulla": Tissue(
        "flyem-medulla-z40",
        (40.0, 10.0, 10.0),
        (0, 85),
        (85, 100),
        "CC BY 3.0 US",
        "FlyEM project, Janelia Research Campus (HHMI): NeuroProof example data, Drosophila medulla, "
        "FIB-SEM at 10 nm, of which every fourth plane was kept (github.com/janelia-flyem/neuroproof_examples, "
        "validation_sample). Takemura et al., Nature 500 (2013) 175-181; Parag et al., PLoS ONE 10 (2015) e0125825",
        {8: 0.0003, 16: 0.0003},
        2,
        {"held-out": ("flyem-medulla-z40", (85, 100)), "another-sample": ("flyem-medulla-labelled-z40", (0, 31))},
    ),
    "drosophila-vnc": Tissue(
        "drosophila-vnc-stack1",
        (45.0, 4.6, 4.6),
        (0, 16),
        (16, 20),
        "CC BY-NC-SA 3.0",
        "Gerhard, Funke, Martel, Cardona, Fetter: Segmented anisotropic ssTEM dataset of neural tissue, figshare, "
        "2013, doi 10.6084/m9.figshare.856713: Drosophila larva, ventral nerve cord, ssTEM, stack 1",
        {8: 0.001, 16: 0.001},
        1,
        {"held-out": ("drosophila-vnc-stack1", (16, 20))},
    ),
}

BUILTIN = Path(__file__).resolve().parents[2] / "models" / "builtin"

COMMON: dict[str, Any] = {"threads": 1, "seed": 1, "checkpoint_every": 200, "accelerator": "cpu"}
"""One thread of a CPU, so that the same machine gives the same weights again; two stages may run side by side."""

PAIRS: dict[str, Any] = {
    "stage": "indexer",
    "crop": 256,
    "batch": 4,
    "steps": 1500,
    "rate": 5e-4,
    "validate_every": 300,
    "after": ["vqgan"],
}
WINDOWS: dict[str, Any] = {"stage": "network", "centres": 4, "validate_every": 250, "precision": "bfloat16"}
"""Settings that the indexer stages, and that the network stages have in common. `after` and `start` name the stages
whose weights they take."""

STAGES: dict[str, dict[str, Any]] = {
    "flow": {"stage": "flow", "crop": 128, "batch": 8, "steps": 3000, "rate": 1e-3, "validate_every": 500},
    "vqgan": {
        "stage": "vqgan",
        "crop": 128,
        "batch": 8,
        "steps": 2500,
        "rate": 1e-3,
        "validate_every": 500,
        "quantise_from": 500,
        "revive_every": 100,
        "losses": {"codebook": 1.0, "adversarial": 0.0, "perceptual": 0.1},
        "precision": "bfloat16",
    },
    "indexer-x8": PAIRS | {"scale": 8},
    "network-x8": WINDOWS
    | {"scale": 8, "crop": 128, "batch": 2, "steps": 1600, "rate": 6e-4, "average": 0.998, "losses": {"squares": True}}
    | {"after": ["vqgan", "indexer-x8", "flow"]},
    "longer-x8": WINDOWS
    | {"scale": 8, "crop": 128, "batch": 2, "steps": 1000, "rate": 6e-4, "average": 0.998, "losses": {"squares": True}}
    | {"after": ["vqgan", "indexer-x8", "flow"], "start": "network-x8"},
    "finish-x8": WINDOWS
    | {
        "scale": 8,
        "crop": 128,
        "batch": 2,
        "steps": 150,
        "rate": 2e-4,
        "average": 0.99,
        "losses": {"squares": True},
        "half": True,
    }
    | {"after": ["vqgan", "indexer-x8", "flow"], "start": "longer-x8"},
    "indexer-x16": PAIRS | {"scale": 16, "steps": 900},
    "network-x16": WINDOWS
    | {"scale": 16, "crop": 192, "batch": 2, "steps": 700, "rate": 6e-4, "average": 0.998, "losses": {"squares": True}}
    | {"after": ["vqgan", "indexer-x16", "flow"], "start": "network-x8"},
    "finish-x16": WINDOWS
    | {
        "scale": 16,
        "crop": 192,
        "batch": 2,
        "steps": 120,
        "rate": 2e-4,
        "average": 0.99,
        "losses": {"squares": True},
        "half": True,
    }
    | {"after": ["vqgan", "indexer-x16", "flow"], "start": "network-x16"},
}

CARD = """# {name}-x{scale}

Weights of `gpemsr`, scale {scale}, preset `small`, for

    network: {{name: gpemsr, scale: {scale}, weights: "builtin:{name}"}}

| | |
|---|---|
| Data | {tissue.credit} |
| Licence | {tissue.licence}, that of the data; name their authors when you pass on these weights or what they make |
| Trained on | sections {tissue.trained_on[0]} to {last}, voxels of {tissue.voxel_size_nm} nm (z, y, x), \
reduced {scale} times in y and x by antialiased bicubic |
| Recipe | `python examples/train/builtin_weights.py {name} WORK`, seed {seed}, on one core: {stages} |
| Contains | values trained by this recipe alone: prior, mask features and optical flow too; \
LPIPS' AlexNet served as a loss. Stored as float16 |

## Scores

{table}

The scores are of whole volumes, super-resolved by `emsr run`; docs/evaluation.md defines them. No section of these
volumes was trained on. `held-out` are sections {tissue.held_out[0]} to {last_held_out} of the same stack, which were
also the validation data.

## Use

The weights are for looking at, and for developing on, tissue, staining and voxel sizes like those above. Other data
need weights of their own (docs/training.md). **Detail is synthesised**: membranes and vesicles finer than a measured
voxel are what such tissue usually looks like there, not what the microscope saw. Do not count, trace or measure
structures that the measured volume does not support. The target's `fidelity/` says where the two disagree.
"""


def stage_yaml(name: str, tissue: Tissue, shared: Path) -> dict[str, Any]:
    """The contents of the stage.yaml of one stage, whose paths are relative to WORK."""
    own = dict(STAGES[name])
    losses, after, start = dict(own.pop("losses", {})), own.pop("after", []), own.pop("start", None)
    if name == "longer-x8":
        own |= {"steps": tissue.cycles * own["steps"], "periods": [own["steps"]]}
    if name.startswith("finish"):
        losses["perceptual"] = tissue.perceptual[own["scale"]]
    if losses.get("perceptual") or own["stage"] in ("vqgan", "network"):
        losses["lpips_alex"] = str(shared / "weights/lpips-alex/alexnet_features_lpips_v0.1.safetensors")
    network: dict[str, Any] = {"scale": own.pop("scale", 8), "preset": "small"}
    network |= {earlier.partition("-")[0]: f"{earlier}/last.safetensors" for earlier in after}
    network |= {"start": f"{start}/last.safetensors"} if start else {}
    # The window of the first held-out centre begins with sections that were trained on; they are not scored.
    neighbours = 2 if own["stage"] == "network" else 0
    data = {
        "train": [{"url": "hr.zarr", "sections": list(tissue.trained_on)}],
        "validate_on": [{"url": "hr.zarr", "sections": [tissue.held_out[0] - neighbours, tissue.held_out[1]]}],
        "licence": tissue.licence,
        "crop": own.pop("crop"),
        "validation_crop": 512,
        "validation_windows": 4,
    }
    return COMMON | own | {"output": name, "data": data, "network": network, "losses": losses}


def make(name: str, work: Path, only: Sequence[str]) -> int:
    """Convert the data, train the stages, score and install finished weights. Returns the first exit code that is not
    0.
    """
    shared, tissue = Path(os.environ.get("EMSR_SHARED", "../shared")).resolve(), TISSUES[name]
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "hr.zarr").exists():
        convert(stack(shared, tissue.stack), work / "hr.zarr", tissue.voxel_size_nm)
    for stage in only or STAGES:
        if code := train.main([str(write(work / f"{stage}.yaml", stage_yaml(stage, tissue, shared)))]):
            return code
    for scale in [at for at in (8, 16) if f"finish-x{at}" in (only or STAGES)]:
        weights = work / f"finish-x{scale}" / "last.safetensors"
        table = scores(work / f"scores-x{scale}", tissue, shared, scale, weights)
        BUILTIN.mkdir(exist_ok=True)
        shutil.copyfile(weights, BUILTIN / f"{name}-x{scale}.safetensors")
        (BUILTIN / f"{name}-x{scale}.md").write_text(card(name, tissue, scale, work, table))
    return 0


def stack(shared: Path, name: str) -> Path:
    """The path of a stack of HR sections. Raises UserError where it is missing."""
    path = shared / "data" / name / "raw.tif"
    if not path.exists():
        raise UserError(f"no {path}", "a stack of HR sections", "Set EMSR_SHARED to the folder with data/ and weights/")
    return path


def write(path: Path, body: dict[str, Any]) -> Path:
    """Write a YAML file and return its path."""
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


def scores(folder: Path, tissue: Tissue, shared: Path, scale: int, weights: Path) -> str:
    """Reduce every test volume, super-resolve it by `emsr run` and score it against the original. Returns table.md."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    volumes = []
    for name, (from_stack, sections) in tissue.tests.items():
        hr = imread(stack(shared, from_stack))[slice(*sections)]
        side = [n // scale * scale for n in hr.shape[1:]]
        lr = np.stack([degrade(np.ascontiguousarray(s[: side[0], : side[1]]), scale) for s in hr])
        convert(hr, folder / f"{name}-hr.zarr", tissue.voxel_size_nm)
        z, y, x = tissue.voxel_size_nm
        convert(lr, folder / f"{name}-lr.zarr", (z, y * scale, x * scale))
        lattice = {"cell": 64, "halo": {8: 16, 16: 24}[scale]}  # that of the cards' scores
        network = {"name": "gpemsr", "scale": scale, "preset": "small", "weights": str(weights), "precision": "float32"}
        network |= lattice
        volume = {
            "source": {"url": f"{name}-lr.zarr"},
            "target": {"url": f"{name}-sr.zarr", "mips": 1},
            "network": network,
            "cluster": {"workers": 2},
        }
        if code := run.main([str(write(folder / f"{name}.yaml", volume))]):
            raise UserError(f"{name} was not finished (exit code {code})", "", "See above")
        volumes.append(
            {"name": name, "sr": f"{name}-sr.zarr", "gt": f"{name}-hr.zarr", "lr": f"{name}-lr.zarr", "crop": True}
        )
    files = {
        "lpips_alex": "lpips-alex/alexnet_features_lpips_v0.1",
        "vgg16": "vgg16-conv/vgg16_features_lpips_v0.1",
        "dists": "dists/dists_alpha_beta",
    }
    table = {
        "volumes": volumes,
        "output": ".",
        "metrics": ["psnr", "ssim", "lpips_alex", "dists"],
        "weights": {key: str(shared / "weights" / f"{file}.safetensors") for key, file in files.items()},
    }
    if code := evaluate.main([str(write(folder / "table.yaml", table))]):
        raise UserError(f"the scores could not be made (exit code {code})", "", "See above")
    return (folder / "table.md").read_text()


def card(name: str, tissue: Tissue, scale: int, work: Path, table: str) -> str:
    """The text that accompanies the weights: data, licence, recipe, scores and limits."""
    told = []
    for stage in STAGES:
        if not stage.endswith(f"x{16 // scale * 8}") or stage == STAGES[f"network-x{scale}"].get("start"):
            last = json.loads((work / stage / "metrics.jsonl").read_text().splitlines()[-1])
            told.append(f"{stage} ({last['step']} steps, {last['step'] / last['steps_per_s'] / 60:.0f} minutes)")
    ends = {"last": tissue.trained_on[1] - 1, "last_held_out": tissue.held_out[1] - 1, "seed": COMMON["seed"]}
    return CARD.format(name=name, scale=scale, tissue=tissue, table=table.strip(), stages=", ".join(told), **ends)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the weights that come with emsr.")
    parser.add_argument("tissue", choices=TISSUES)
    parser.add_argument("work", type=Path, help="folder for data, stages and their results")
    parser.add_argument("--only", nargs="*", choices=STAGES, default=[], help="these stages (default: all)")
    args = parser.parse_args(argv)
    return guarded(lambda: make(args.tissue, args.work, args.only))


if __name__ == "__main__":
    sys.exit(main())
