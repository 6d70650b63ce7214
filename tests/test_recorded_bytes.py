"""The same volume.yaml gives the same bytes as before: checksums of three targets, recorded at 0.1.0's commit d64f5a3.

A change that must alter them raises FORMAT_VERSION and records them anew: `python tests/test_recorded_bytes.py`.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from conftest import main_job, volume_yaml, write_lr

RECORDED = Path(__file__).parent / "recorded"
PASSING = {"url", "fingerprint", "digest", "emsr"}
"""Keys of the provenance whose values do not count: they differ by place, by version, or by who wrote the source."""

VOLUMES: dict[str, dict[str, Any]] = {
    "ome-zarr": {
        "source__bad_sections": {"list": [3]},
        "source__box": {"start": [1, 5, 3], "stop": [9, 60, 70]},
        "target__mips": 4,
    },
    "precomputed": {
        "source__mask": "mask",
        "target__format": "precomputed",
        "target__encoding": "raw",
        "target__shard_shape": [2, 128, 128],
        "network__name": "nearest",
        "network__scale": 16,
        "work__slab_shape": [2, 16, 16],
    },
    "gpemsr": {
        "source__box": {"start": [2, 8, 8], "stop": [4, 24, 24]},
        "target__shard_shape": [2, 128, 128],
        "network__name": "gpemsr",
        "network__weights": "builtin",
        "network__cell": 16,
        "network__halo": 8,
        "work__slab_shape": [2, 16, 16],
    },
}


def lr() -> np.ndarray:
    """A pattern of integers alone, the same with every numpy."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in (10, 64, 80)), indexing="ij")
    return ((37 * z + 3 * (y * y // 16) + 11 * x + y * x // 24) % 251).astype(np.uint8)


def made(name: str, folder: Path) -> Path:
    """The target of one of VOLUMES."""
    keys = dict(VOLUMES[name])
    if keys.get("source__mask"):
        inside = np.zeros_like(lr())
        inside[:, 20:50, 10:60] = 1
        keys["source__mask"] = {"url": str(write_lr(folder / "mask.zarr", inside))}
    main_job(volume_yaml(folder / "v.yaml", write_lr(folder / "lr.zarr", lr()), folder / "sr", **keys), script="run")
    return folder / "sr"


def checksums(target: Path) -> dict[str, str]:
    """How many objects each folder of the target holds, and the CRC-32 over their paths and bytes.

    Metadata count as their JSON without what is PASSING.
    """
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        place = path.relative_to(target)
        count, crc = found.get(place.parts[0], (0, 0))
        found[place.parts[0]] = count + 1, zlib.crc32(_essence(path.read_bytes()), zlib.crc32(str(place).encode(), crc))
    return {folder: f"{count} objects, {crc:08x}" for folder, (count, crc) in found.items()}


def _essence(stored: bytes) -> bytes:
    try:
        return json.dumps(_without(json.loads(stored)), sort_keys=True).encode()
    except ValueError:
        return stored


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        if value.get("name") == "sr":  # of the pyramid: every target was called emsr when this was recorded
            value = value | {"name": "emsr"}
        return {key: _without(child) for key, child in value.items() if key not in PASSING}
    return [_without(child) for child in value] if isinstance(value, list) else value


def mip_0(target: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(target / "0", mode="r"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((RECORDED / "targets.json").read_text())
    return found


@pytest.mark.parametrize("name", ["ome-zarr", "precomputed"])
def test_bytes_are_those_recorded(name: str, recorded: dict[str, dict[str, str]], tmp_path: Path) -> None:
    assert checksums(made(name, tmp_path)) == recorded[name]


def test_the_networks_bytes_are_those_recorded(recorded: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """On other processors, where float32 differs in its last bits, a voxel in a thousand may be off by one level."""
    target = made("gpemsr", tmp_path)
    voxels, wanted = mip_0(target).astype(int), np.load(RECORDED / "gpemsr.npy")
    assert np.abs(voxels - wanted).max() <= 1
    assert np.mean(voxels != wanted) < 1e-3
    if np.array_equal(voxels, wanted):
        assert checksums(target) == recorded["gpemsr"]


if __name__ == "__main__":
    RECORDED.mkdir(exist_ok=True)
    found: dict[str, dict[str, str]] = {}
    for volume in VOLUMES:
        with tempfile.TemporaryDirectory() as place:
            written = made(volume, Path(place))
            found[volume] = checksums(written)
            if volume == "gpemsr":
                np.save(RECORDED / "gpemsr.npy", mip_0(written))
    (RECORDED / "targets.json").write_text(json.dumps(found, indent=1) + "\n")
