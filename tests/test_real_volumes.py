"""The main job on real EM (EMSR_SHARED): all source and target formats against bicubic of the whole volume."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import source_volumes
import tifffile
import zarr
import zarr.codecs
from cloudvolume import CloudVolume
from conftest import run_here, texture, volume_yaml, write_lr
from PIL import Image
from test_inference import whole_bicubic

from pipeline import verify
from pipeline.storage.targets.open import open_target
from pipeline.worker.pyramid import halve

STACKS = {
    "drosophila-vnc-stack1": (45.0, 4.6, 4.6),
    "flyem-medulla-z40": (40.0, 10.0, 10.0),
    "flyem-medulla-labelled-z40": (40.0, 10.0, 10.0),
}


def low_resolution(hr: np.ndarray, scale: int) -> np.ndarray:
    """The paper's degradation: antialiased bicubic per section, rounded."""
    height, width = (n // scale for n in hr.shape[1:])
    return np.stack(
        [
            np.asarray(
                Image.fromarray(s[: height * scale, : width * scale]).resize((width, height), Image.Resampling.BICUBIC)
            )
            for s in hr
        ]
    )


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("scale", [8, 16])
def test_real_em_equals_bicubic_of_the_whole_and_resembles_the_truth(
    name: str, scale: int, shared_data: Path, tmp_path: Path
) -> None:
    z, y, x = STACKS[name]
    hr = tifffile.imread(shared_data / name / "raw.tif")[:12]
    lr = low_resolution(hr, scale)
    write_lr(tmp_path / "lr.zarr", lr, (z, y * scale, x * scale))
    path = volume_yaml(
        tmp_path / "v.yaml",
        "lr.zarr",
        "sr",
        network__scale=scale,
        work__slab_shape=[4, 32, 32],
        target__shard_shape=[4, 256, 256],
    )
    job = run_here(path)
    sr = np.asarray(zarr.open_array(tmp_path / "sr" / "0", mode="r"))
    assert np.abs(sr.astype(int) - whole_bicubic(lr, scale)).max() <= 1
    assert np.allclose(job.target.voxel_size_nm, (z, y, x))
    truth = hr[:, : sr.shape[1], : sr.shape[2]].astype(float)
    psnr = 10 * np.log10(255**2 / np.mean((sr - truth) ** 2))
    shifted = 10 * np.log10(255**2 / np.mean((np.roll(sr, scale // 2, 1) - truth) ** 2))
    assert psnr > 14
    assert psnr > shifted, "half an LR voxel of displacement would be seen"
    assert verify.main([str(path)]) == 0


SOURCES = {
    "zarr2-blosc": lambda p, v: source_volumes.zarr2(p, _blosc(), voxels=v),
    "zarr3": lambda p, v: source_volumes.zarr3(p, zarr.codecs.ZstdCodec(), voxels=v),
    "zarr3-sharded": lambda p, v: source_volumes.zarr3(p, zarr.codecs.ZstdCodec(), sharded=True, voxels=v),
    "n5": lambda p, v: source_volumes.n5(p, voxels=v),
    "precomputed-offset": lambda p, v: source_volumes.precomputed(p, voxels=v),
    "precomputed-sharded": lambda p, v: source_volumes.precomputed(p, sharded=True, voxels=v),
}
TARGETS = {
    "ome-zarr": {"target__encoding": "zstd"},
    "precomputed-raw": {"target__format": "precomputed", "target__encoding": "raw", "target__shard_shape": None},
    "precomputed-png": {"target__format": "precomputed", "target__encoding": "png", "target__shard_shape": None},
    "precomputed-jpeg": {"target__format": "precomputed", "target__encoding": "jpeg", "target__shard_shape": None},
    "precomputed-jxl": {"target__format": "precomputed", "target__encoding": "jxl", "target__shard_shape": None},
    "precomputed-sharded-jxl": {
        "target__format": "precomputed",
        "target__encoding": "jxl",
        "target__shard_shape": [2, 128, 128],
        "target__chunk_shape": [2, 64, 64],
    },
    "precomputed-sharded": {
        "target__format": "precomputed",
        "target__shard_shape": [2, 128, 128],
        "target__chunk_shape": [2, 128, 128],
    },
}


def _blosc() -> object:
    import numcodecs

    return numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_into_every_target(source: str, target: str, tmp_path: Path) -> None:
    voxels = source_volumes.truth((6, 40, 50))
    written = SOURCES[source](tmp_path / "lr", voxels)
    keys = dict(TARGETS[target])
    if not written.has_voxel_size:
        keys["source__voxel_size_nm"] = [40, 8, 4]
    job = run_here(volume_yaml(tmp_path / "v.yaml", "lr", "sr", **keys))
    found = read_back(tmp_path / "sr", job.target.format, len(job.target.levels))
    expected = whole_bicubic(voxels, 8)
    lossy = job.target.encoding == "jpeg"
    difference = np.abs(found[0].astype(int) - expected)
    assert difference.max() <= (12 if lossy else 1)
    assert difference.mean() < (2 if lossy else 0.01)
    for finer, coarser in itertools.pairwise(found):
        assert lossy or (coarser == halve(finer)).all()
    stored = open_target(job.target)
    assert (stored.read(0, job.plan.slab(0).write) == found[0][job.plan.slab(0).write.slices()]).all()
    if job.target.format == "precomputed":
        offset = CloudVolume(f"file://{tmp_path}/sr", progress=False).voxel_offset[::-1]
        assert tuple(offset) == (written.start[0], written.start[1] * 8, written.start[2] * 8)


def read_back(path: Path, kind: str, levels: int) -> list[np.ndarray]:
    """All levels, by a reader that is not the pipeline's: zarr-python or cloud-volume."""
    if kind == "ome-zarr":
        return [np.asarray(zarr.open_array(path / str(k), mode="r")) for k in range(levels)]
    return [
        np.asarray(CloudVolume(f"file://{path}", mip=k, progress=False, fill_missing=False)[:])[..., 0].T
        for k in range(levels)
    ]


def test_ome_positions_coincide(tmp_path: Path) -> None:
    """LR voxel i centred at 45 i, 32 i nm: SR voxel 0 of a box at 3 begins where LR voxel 3 begins.

    That is half a voxel before its centre.
    """
    write_lr(tmp_path / "lr.zarr", texture((6, 48, 48)))
    run_here(volume_yaml(tmp_path / "v.yaml", "lr.zarr", "sr", source__box={"start": [1, 3, 5], "stop": [5, 40, 40]}))
    datasets = zarr.open_group(tmp_path / "sr", mode="r").attrs["ome"]["multiscales"][0]["datasets"]
    scale, translation = (datasets[0]["coordinateTransformations"][i][k] for i, k in ((0, "scale"), (1, "translation")))
    assert scale == [45, 4, 4]
    assert translation == [45, 3 * 32 - 16 + 2, 5 * 32 - 16 + 2]
    assert datasets[1]["coordinateTransformations"][1]["translation"] == [45, 3 * 32 - 16 + 4, 5 * 32 - 16 + 4]
