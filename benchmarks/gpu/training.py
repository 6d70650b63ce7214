"""Runs `emsr train` on this machine's GPU for a while and prints its last line: steps per second of a stage.

    python benchmarks/gpu/training.py FOLDER [stage=vqgan] [preset=paper] [precision=32-true] [seconds=25]

The data are a phantom, crops of 256 HR voxels, 8 a step. The line is what `emsr train` says about itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import yaml
from volume import write

from examples.make_phantom import phantom

REPOSITORY = Path(__file__).parents[2]
SHAPE = (16, 512, 512)


def data(folder: Path) -> Path:
    """HR sections, made once."""
    path = folder / "hr.zarr"
    return path if path.exists() else write(path, phantom(SHAPE), (40.0, 10.0, 10.0))


def main(
    folder: str, stage: str = "vqgan", preset: str = "paper", precision: str = "32-true", seconds: str = "25"
) -> None:
    path = Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    body = {
        "stage": stage,
        "output": f"{stage}-{preset}-{precision}",
        "data": {"train": [{"url": str(data(path))}], "licence": "CC0", "crop": 256},
        "network": {"scale": 8, "preset": preset},
        "steps": 1_000_000,
        "batch": 8,
        "precision": precision,
    }
    file = path / f"{body['output']}.yaml"
    file.write_text(yaml.safe_dump(body))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.train", str(file)], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    try:
        _, said = process.communicate(timeout=float(seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    lines = said.strip().splitlines()
    steps = [line for line in lines if line.startswith("step")]
    last = steps[-1:] if steps else lines[-5:]
    print(json.dumps({"training": body["output"], "rc": process.returncode, "said": last}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
