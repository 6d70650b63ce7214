"""Runs `emsr run` on this machine's GPU: law 1 over slab shapes, and how busy the network is in a whole run.

    python benchmarks/gpu/volume.py law1 FOLDER
    python benchmarks/gpu/volume.py busy FOLDER [precision=float32] [preset=small] [side=512] [sections=16]

`law1` makes one small volume with three slab shapes, two numbers of workers, and once more, and compares all stored
bytes. `busy` makes `sections` of `side` x `side` LR voxels with one worker, and prints the report's seconds by step.
`paper` has random weights. Every line of output is one JSON object.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
import zarr
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from network_speed import live_network

from examples.make_phantom import phantom
from models import weights
from models.degrade import degrade

REPOSITORY = Path(__file__).parents[2]


def voxels(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """LR voxels (z, y, x): a small phantom, repeated."""
    small = np.stack([degrade(section, 8) for section in phantom((shape[0], 512, 512))])
    times = (1, -(-shape[1] // small.shape[1]), -(-shape[2] // small.shape[2]))
    return np.ascontiguousarray(np.tile(small, times)[:, : shape[1], : shape[2]])


def write(path: Path, stack: NDArray[np.uint8], voxel_size_nm: tuple[float, float, float]) -> Path:
    """`stack` (z, y, x) as an OME-Zarr of one level."""
    group = zarr.open_group(path, mode="w")
    array = group.create_array("0", shape=stack.shape, chunks=(8, 128, 128), dtype="uint8")
    array[:] = stack
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": list(voxel_size_nm)}]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"name": path.stem, "axes": axes, "datasets": datasets}]}
    return path


def source_in(folder: Path, shape: tuple[int, int, int]) -> Path:
    """LR sections of this shape, made once."""
    path = folder / f"lr-{'-'.join(map(str, shape))}.zarr"
    return path if path.exists() else write(path, voxels(shape), (40.0, 80.0, 80.0))


def run(folder: Path, source: Path, name: str, slab: list[int], workers: int, network: dict[str, Any]) -> float:
    """Wall seconds of `emsr run`; raises where it fails."""
    body = {
        "source": {"url": str(source)},
        "target": {
            "url": str(folder / name),
            "format": "ome-zarr",
            "chunk_shape": [8, 256, 256],
            "shard_shape": [8, 512, 512],
        },
        "network": {"name": "gpemsr", "scale": 8} | network,
        "work": {"slab_shape": slab},
        "cluster": {"kind": "local", "workers": workers},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(body))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.run", str(folder / f"{name}.yaml")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(
            json.dumps({"failed": name, "rc": done.returncode, "said": (done.stdout + done.stderr)[-1500:]}), flush=True
        )
    return time.perf_counter() - began


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def law1(folder: Path) -> None:
    source = source_in(folder, (8, 64, 128))
    network = {"weights": "builtin", "cell": 64, "halo": 16}  # several tiles, which slabs share
    trees = []
    for slab, workers in (([8, 64, 64], 1), ([16, 128, 256], 2), ([16, 192, 128], 1), ([8, 64, 64], 1)):
        name = f"sr-{len(trees)}"
        seconds = run(folder, source, name, slab, workers, network)
        trees.append(tree(folder / name))
        print(
            json.dumps(
                {
                    "law1": slab,
                    "workers": workers,
                    "seconds": round(seconds, 1),
                    "objects": len(trees[-1]),
                    "same_as_first": trees[-1] == trees[0],
                    "differ": sum(trees[0].get(key) != value for key, value in trees[-1].items()),
                }
            ),
            flush=True,
        )


def busy(
    folder: Path, precision: str = "float32", preset: str = "small", side: str = "512", sections: str = "16"
) -> None:
    source = source_in(folder, (int(sections), int(side), int(side)))
    network: dict[str, Any] = {"weights": "builtin", "precision": precision}
    if preset == "paper":
        path = folder / "random.safetensors"
        if not path.exists():
            weights.save(path, live_network(8), "none: random")
        network |= {"weights": str(path), "preset": "paper"}
    name = f"busy-{precision}-{preset}"
    seconds = run(folder, source, name, [16, 256, 256], 1, network)
    report = folder / f"{name}.emsr" / "report.json"
    if report.exists():
        body = json.loads(report.read_text())
        found = {key: body.get(key) for key in ("wall_s", "voxels_per_s", "seconds", "memory")}
        print(json.dumps({"run": name, "command_s": round(seconds, 1)} | found), flush=True)


def main(what: str, folder: str, *arguments: str) -> None:
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    {"law1": law1, "busy": busy}[what](path.resolve(), *arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
