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
import zarr

from examples.make_phantom import phantom

REPOSITORY = Path(__file__).parents[2]
SHAPE = (16, 512, 512)


def data(folder: Path) -> Path:
    path = folder / "hr.zarr"
    if not path.exists():
        group = zarr.open_group(path, mode="w")
        array = group.create_array("0", shape=SHAPE, chunks=(8, 128, 128), dtype="uint8")
        array[:] = phantom(SHAPE)
        axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
        scale = [{"type": "scale", "scale": [40.0, 10.0, 10.0]}]
        datasets = [{"path": "0", "coordinateTransformations": scale}]
        group.attrs["ome"] = {"version": "0.5", "multiscales": [{"name": "hr", "axes": axes, "datasets": datasets}]}
    return path


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
