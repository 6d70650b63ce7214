"""The weights that come with emsr, from the data on: the whole recipe, as it was run.

    python examples/train/builtin.py flyem-medulla WORK            trains x8 and x16, then writes models/builtin/flyem-medulla-x8.safetensors, ...
    python examples/train/builtin.py drosophila-vnc WORK --only network-x8       one stage; the same command goes on with a stage that was interrupted

Needs `pip install '.[train,evaluate]'` and EMSR_SHARED, the folder with `data/` and `weights/` (LPIPS' AlexNet is a training loss; none of its values
is in the result). In WORK each stage leaves its stage.yaml, so that `emsr train` alone can repeat it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import train
from pipeline.command import guarded
from pipeline.convert import convert
from pipeline.errors import UserError


@dataclass(frozen=True)
class Tissue:
    """A stack of HR sections: which teach, which are held out, and what must be said of them."""

    stack: str
    voxel_size_nm: tuple[float, float, float]
    taught: tuple[int, int]
    held_out: tuple[int, int]
    licence: str
    card: str


TISSUES = {
    "flyem-medulla": Tissue(
        "flyem-medulla-z40",
        (40.0, 10.0, 10.0),
        (0, 85),
        (85, 100),
        "CC BY 3.0 US",
        "Data: FlyEM / Janelia (HHMI), Drosophila medulla, every fourth plane of a FIB-SEM volume (Takemura et al. 2013; Parag et al. 2015).",
    ),
    "drosophila-vnc": Tissue(
        "drosophila-vnc-stack1",
        (45.0, 4.6, 4.6),
        (0, 16),
        (16, 20),
        "CC BY-NC-SA 3.0",
        "Data: Gerhard, Funke, Martel, Cardona, Fetter 2013, doi 10.6084/m9.figshare.856713, Drosophila larva, ventral nerve cord, ssTEM stack 1.",
    ),
}

COMMON: dict[str, Any] = {"threads": 1, "seed": 1, "checkpoint_every": 200, "accelerator": "cpu"}
"""One thread of a CPU, so that the same machine gives the same weights again; two stages may run side by side."""

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
        "precision": "bf16-mixed",
    },
    "indexer-x8": {"stage": "indexer", "scale": 8, "crop": 256, "batch": 4, "steps": 1500, "rate": 5e-4, "validate_every": 300, "after": ["vqgan"]},
    "network-x8": {
        "stage": "network",
        "scale": 8,
        "crop": 128,
        "batch": 2,
        "centres": 4,
        "steps": 2000,
        "rate": 6e-4,
        "average": 0.998,
        "validate_every": 500,
        "losses": {"squares": True},
        "precision": "bf16-mixed",
        "after": ["vqgan", "indexer-x8", "flow"],
    },
    "indexer-x16": {"stage": "indexer", "scale": 16, "crop": 256, "batch": 4, "steps": 1500, "rate": 5e-4, "validate_every": 300, "after": ["vqgan"]},
}


def stage_yaml(name: str, tissue: Tissue, shared: Path) -> dict[str, Any]:
    """The stage.yaml of one stage, to lie in WORK."""
    own = dict(STAGES[name])
    losses, after, start = dict(own.pop("losses", {})), own.pop("after", []), own.pop("start", None)
    if losses.get("perceptual") or own["stage"] in ("vqgan", "network"):
        losses["lpips_alex"] = str(shared / "weights/lpips-alex/alexnet_features_lpips_v0.1.safetensors")
    network: dict[str, Any] = {"scale": own.pop("scale", 8), "preset": "small"}
    network |= {earlier.partition("-")[0]: f"{earlier}/last.safetensors" for earlier in after}
    network |= {"start": f"{start}/last.safetensors"} if start else {}
    data = {
        "train": [{"url": "hr.zarr", "sections": list(tissue.taught)}],
        "validate_on": [{"url": "hr.zarr", "sections": list(tissue.held_out)}],
        "licence": tissue.licence,
        "crop": own.pop("crop"),
        "validation_crop": 512,
        "validation_windows": 4,
    }
    return COMMON | own | {"output": name, "data": data, "network": network, "losses": losses}


def make(name: str, work: Path, only: Sequence[str]) -> int:
    """Convert, train; returns the first exit code that is not 0."""
    shared = Path(os.environ.get("EMSR_SHARED", "../shared")).resolve()
    tissue = TISSUES[name]
    stack = shared / "data" / tissue.stack / "raw.tif"
    if not stack.exists():
        raise UserError(f"no {stack}", "the stack of HR sections", "Set EMSR_SHARED to the folder with data/ and weights/")
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "hr.zarr").exists():
        convert(stack, work / "hr.zarr", tissue.voxel_size_nm)
    for stage in only or STAGES:
        path = work / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(stage_yaml(stage, tissue, shared), sort_keys=False))
        if code := train.main([str(path)]):
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train the weights that come with emsr.")
    parser.add_argument("tissue", choices=TISSUES)
    parser.add_argument("work", type=Path, help="folder for data, stages and their results")
    parser.add_argument("--only", nargs="*", choices=STAGES, default=[], help="these stages (default: all)")
    args = parser.parse_args(argv)
    return guarded(lambda: make(args.tissue, args.work, args.only))


if __name__ == "__main__":
    sys.exit(main())
