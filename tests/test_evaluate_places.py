"""What of SR and truth is compared with what: positions, voxel sizes, skipped slabs and masks decide, and are told."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import texture, volume_yaml, write_lr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.config import volume as volume_config
from pipeline.config.urls import sidecar
from pipeline.evaluate import main
from pipeline.plan.receipt import QUARANTINED, Receipt
from pipeline.prepare.place import claim
from pipeline.prepare.prepare import prepare
from pipeline.storage.kv import Store
from pipeline.storage.ledger import Ledger
from pipeline.worker.lease import process_lease

NM = (45.0, 4.0, 4.0)
TRUTH = (4, 96, 80)


def placed(path: Path, voxels: np.ndarray, first: tuple[float, float, float] = (0, 0, 0), nm: Any = NM) -> Path:
    """An OME-Zarr whose first voxel's centre lies at `first`, in voxels."""
    import zarr

    write_lr(path, voxels, nm)
    group = zarr.open_group(path, mode="r+")
    ome = dict(group.attrs["ome"])
    steps = ome["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    steps.append({"type": "translation", "translation": [f * n for f, n in zip(first, nm, strict=True)]})
    group.attrs["ome"] = ome
    return path


def evaluated(folder: Path, capsys: pytest.CaptureFixture[str], code: int = 0, **volume: Any) -> str:
    """What the command says on both streams; its exit code is `code`."""
    own = {key: volume.pop(key) for key in ("metrics",) if key in volume}
    body = {
        "volumes": [{"name": "v", "sr": "sr.zarr", "gt": "gt.zarr"} | volume],
        "output": "scores",
        "metrics": ["psnr"],
    } | own
    (folder / "table.yaml").write_text(yaml.safe_dump(body))
    capsys.readouterr()
    found = main([str(folder / "table.yaml")])
    said = capsys.readouterr()
    assert found == code, said.err
    assert "Traceback" not in said.err
    assert "inside emsr" not in said.err
    return " ".join((said.out + said.err).split())


def scores(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "scores" / "table.csv").open()))


def noisy(voxels: np.ndarray, seed: int = 1) -> np.ndarray:
    return np.clip(voxels + np.random.default_rng(seed).normal(0, 5, voxels.shape), 0, 255).astype(np.uint8)


def test_a_part_is_compared_with_the_same_part_of_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SR of a box lies where it says, not at the truth's corner."""
    truth = texture(TRUTH)
    placed(tmp_path / "gt.zarr", truth)
    sr = noisy(truth[1:3, 24:56, 16:64])
    placed(tmp_path / "sr.zarr", sr, (1, 24, 16))
    assert "crop: true" in evaluated(tmp_path, capsys, 2)
    evaluated(tmp_path, capsys, crop=True)
    found = [float(row["psnr"]) for row in scores(tmp_path)]
    wanted = [peak_signal_noise_ratio(t, s, data_range=255) for t, s in zip(truth[1:3, 24:56, 16:64], sr, strict=True)]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_sr_that_reaches_beyond_its_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What both have is scored, and what that is, told; sections keep SR's numbers."""
    whole = texture((4, 40, 80))
    placed(tmp_path / "gt.zarr", whole[:3, :, :48])
    placed(tmp_path / "sr.zarr", noisy(whole[1:, :, 16:]), (1, 0, 16))
    said = evaluated(tmp_path, capsys, crop=True)
    assert "only voxels (0, 0, 0)..(2, 40, 32) of SR's (3, 40, 64) lie in the ground truth" in said
    assert [row["section"] for row in scores(tmp_path)] == ["0", "1"]
    assert all(float(row["psnr"]) > 30 for row in scores(tmp_path))
    assert "has only [0, 2]" in evaluated(tmp_path, capsys, 2, crop=True, sections=[1, 3])


@pytest.mark.parametrize("scale", [8, 16])
@pytest.mark.parametrize("box", [0, 2])
def test_levels_with_one_centre_for_their_first_voxels(
    scale: int, box: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Many writers state no translation for any level. SR shares LR's corner, so that it is half an LR voxel less half
    an SR voxel off by what is stated; it is compared as it was meant, and that is told.
    """
    truth = texture((2, 96, 96))
    write_lr(tmp_path / "gt.zarr", truth, NM)
    sr = noisy(truth[:, box * scale :, box * scale :])
    placed(tmp_path / "sr.zarr", sr, (0, *[box * scale - (scale - 1) / 2] * 2))
    said = evaluated(tmp_path, capsys, crop=True)
    assert f"positions are {(scale - 1) / 2:g} voxels off" in said
    assert all(float(row["psnr"]) > 30 for row in scores(tmp_path))


def test_a_fraction_of_a_voxel_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = texture((2, 40, 48))
    placed(tmp_path / "gt.zarr", truth)
    placed(tmp_path / "sr.zarr", noisy(truth), (0, 0.3, 0))
    assert "off by (+0, +0.3, +0) voxels" in evaluated(tmp_path, capsys)
    told = json.loads((tmp_path / "scores" / "table.json").read_text())["volumes"][0]
    assert any("+0.3" in remark for remark in told["remarks"])
    assert "+0.3" in (tmp_path / "scores" / "table.md").read_text()


def test_no_position(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where one volume states none, nothing says which part of the other it is; of one shape they are compared, with a
    word. `align: first_voxels` is the user's own word."""
    import tensorstore as ts

    truth = texture(TRUTH)
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": f"{tmp_path}/gt.n5/"}}
    array = ts.open(
        spec,
        create=True,
        dtype=ts.uint8,
        shape=TRUTH[::-1],
        chunk_layout=ts.ChunkLayout(chunk_shape=[80, 96, 4]),
    ).result()
    array.write(np.ascontiguousarray(truth.T)).result()
    attributes = json.loads((tmp_path / "gt.n5" / "attributes.json").read_text())
    attributes |= {"resolution": list(NM[::-1]), "units": ["nm"] * 3}
    (tmp_path / "gt.n5" / "attributes.json").write_text(json.dumps(attributes))
    placed(tmp_path / "sr.zarr", noisy(truth[:, :32]), (0, 0, 0))
    said = evaluated(tmp_path, capsys, 2, gt="gt.n5", crop=True)
    assert "gt state no position" in said
    evaluated(tmp_path, capsys, gt="gt.n5", crop=True, align="first_voxels")
    assert all(float(row["psnr"]) > 30 for row in scores(tmp_path))
    placed(tmp_path / "sr.zarr", noisy(truth), (0, 64, 64))
    assert "compared from the first voxel of each" in evaluated(tmp_path, capsys, gt="gt.n5")


def elsewhere(folder: Path) -> dict[str, Any]:
    placed(folder / "sr.zarr", texture((2, 40, 48)), (0, 500, 0))
    return {"crop": True}


def larger_voxels(folder: Path) -> dict[str, Any]:
    placed(folder / "sr.zarr", texture((2, 40, 48)), nm=(45.0, 8.0, 8.0))
    return {}


def thicker(folder: Path) -> dict[str, Any]:
    placed(folder / "sr.zarr", texture((2, 40, 48)), nm=(50.0, 4.0, 4.0))
    return {}


def exchanged(folder: Path) -> dict[str, Any]:
    placed(folder / "sr.zarr", texture((2, 48, 40)))
    return {}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (elsewhere, "no voxel in common"),
        (larger_voxels, "SR's voxels are 45 x 8 x 8 nm, the ground truth's 45 x 4 x 4 nm"),
        (thicker, "SR's voxels are 50 x 4 x 4 nm"),
        (exchanged, "axes of one of them may be exchanged"),
        (lambda folder: {"sr": "gt.zarr"}, "sr and gt are one volume"),
        (lambda folder: {"intensity_window": [0, 500]}, "volumes.0.intensity_window is given"),
        (lambda folder: {"mask": "nothing.zarr"}, "volumes.0.mask"),
        (lambda folder: {"sr": "nothing.zarr"}, "volumes.0.sr"),
    ],
)
def test_mistakes(
    damage: Callable[[Path], dict[str, Any]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("sr", "gt")):
        placed(tmp_path / f"{name}.zarr", texture((2, 40, 48), seed))
    said = evaluated(tmp_path, capsys, 2, **damage(tmp_path))
    assert words in said
    assert "source." not in said
    assert not (tmp_path / "scores").exists()


def test_sections_smaller_than_a_metric_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("sr", "gt")):
        placed(tmp_path / f"{name}.zarr", texture((2, 10, 30), seed))
    said = evaluated(tmp_path, capsys, 2, metrics=["psnr", "ssim", "ssim_gaussian"])
    assert "sections of 10 x 30: SSIM (Gaussian) needs 11 x 11" in said
    assert "metrics: [psnr, ssim]" in said
    evaluated(tmp_path, capsys, metrics=["psnr", "ssim"])


def test_one_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = "volumes:\n  - {name: v, sr: sr.zarr, gt: gt.zarr, sections: [2, 2]}\noutput: scores\n"
    (tmp_path / "table.yaml").write_text(body)
    assert main([str(tmp_path / "table.yaml")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    (tmp_path / "table.yaml").write_text("volumes: []\noutput: scores\n")
    assert main([str(tmp_path / "table.yaml")]) == 2
    assert "volumes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("turn", "word"),
    [
        (lambda v: v[:, ::-1], "mirrored in y"),
        (lambda v: v[:, :, ::-1], "mirrored in x"),
        (lambda v: v.transpose(0, 2, 1), "y and x exchanged"),
        (lambda v: v[::-1], "reverse order"),
    ],
)
def test_an_image_that_is_turned_over_is_told(
    turn: Callable[[np.ndarray], np.ndarray], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = np.random.default_rng(0).integers(0, 255, (3, 48, 48), np.uint8)
    placed(tmp_path / "gt.zarr", sections)
    placed(tmp_path / "sr.zarr", np.ascontiguousarray(turn(noisy(sections))))
    assert word in evaluated(tmp_path, capsys)


def test_equal_sections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An infinite PSNR is shown, explained, and JSON stays JSON."""
    truth = texture((2, 40, 48))
    placed(tmp_path / "gt.zarr", truth)
    placed(tmp_path / "sr.zarr", np.stack([truth[0], noisy(truth)[1]]))
    assert "1 of 2 sections equal the truth" in evaluated(tmp_path, capsys)
    text = (tmp_path / "scores" / "table.json").read_text()
    told = json.loads(text, parse_constant=lambda word: pytest.fail(word))["volumes"][0]
    assert told["means"]["SR"]["psnr"] == "inf"


def test_truth_of_16_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The window is for it alone: SR is uint8."""
    truth = texture((2, 40, 48))
    placed(tmp_path / "gt.zarr", truth.astype(np.uint16) * 100)
    placed(tmp_path / "sr.zarr", noisy(truth))
    assert "volumes.0.intensity_window" in evaluated(tmp_path, capsys, 2)
    evaluated(tmp_path, capsys, intensity_window=[0, 25500])
    assert all(float(row["psnr"]) > 30 for row in scores(tmp_path))


def test_truth_of_an_inverted_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SR shows what the inverted source was: truth and LR, in any type, are inverted before they are compared."""
    truth = texture((2, 40, 48))
    placed(tmp_path / "gt.zarr", (127 - truth.astype(np.int16)).astype(np.int8))
    placed(tmp_path / "sr.zarr", noisy(truth))
    evaluated(tmp_path, capsys, intensity_window=[-128, 127], invert=True)
    assert all(float(row["psnr"]) > 30 for row in scores(tmp_path))


def run(folder: Path, **changes: Any) -> tuple[Path, Ledger]:
    """SR by a run with 2 x 2 slabs of 64 x 64, the lower two of which are empty, and its truth. Nothing else is
    recorded as done but what the ledger says."""
    lr = np.random.default_rng(0).integers(1, 255, (2, 32, 32), np.uint8)
    lr[:, 16:] = 7
    write_lr(folder / "em.zarr", lr)
    path = volume_yaml(
        folder / "volume.yaml",
        "em.zarr",
        "sr.zarr",
        source__skip_empty=True,
        work__slab_shape=[2, 16, 16],
        **changes,
    )
    wanted = volume_config.load(path)
    prepared = prepare(wanted)
    claim(prepared)
    ledger = Ledger(Store(sidecar(wanted.target.url)), prepared.job.digest, prepared.job.plan.tasks, "here")
    for stage in prepared.job.plan.passes():
        ledger.record(process_lease(prepared.job, stage.start, stage.stop).receipts)
    ledger.flush()
    write_lr(folder / "gt.zarr", noisy(lr.repeat(8, 1).repeat(8, 2)), NM)
    return path, ledger


def test_what_was_skipped_is_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import zarr

    run(tmp_path)
    said = evaluated(tmp_path, capsys, metrics=["psnr", "ssim"])
    assert "50.00% of the voxels are scored" in said
    sr, truth = (np.asarray(zarr.open_array(tmp_path / f"{name}.zarr" / "0", mode="r")) for name in ("sr", "gt"))
    assert not sr[:, 128:].any()
    for row, image, true in zip(scores(tmp_path), sr[:, :128], truth[:, :128], strict=True):
        assert float(row["scored"]) == 0.5
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(true, image, data_range=255), rel=1e-5)
        assert float(row["ssim"]) == pytest.approx(structural_similarity(true, image, data_range=255), rel=1e-5)
    told = json.loads((tmp_path / "scores" / "table.json").read_text())["volumes"][0]
    assert told["scored"] == 0.5
    assert "50.00%" in (tmp_path / "scores" / "table.md").read_text()


def test_a_bad_section_left_empty_is_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, source__bad_sections={"list": [0], "output": "empty"})
    assert "25.00% of the voxels are scored" in evaluated(tmp_path, capsys)
    assert [row["section"] for row in scores(tmp_path)] == ["1"]


def test_a_mask_of_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Coarser than SR; outside its bounds it is 0."""
    truth = texture((2, 64, 64))
    sr = noisy(truth)
    placed(tmp_path / "gt.zarr", truth)
    placed(tmp_path / "sr.zarr", sr)
    mask = np.zeros((2, 4, 3), np.uint8)
    mask[0, 1:, 1:] = 1
    placed(tmp_path / "mask.zarr", mask, nm=(45.0, 64.0, 64.0))
    evaluated(tmp_path, capsys, mask="mask.zarr")
    [row] = scores(tmp_path)
    assert float(row["scored"]) == 48 * 32 / 64**2
    wanted = peak_signal_noise_ratio(truth[0, 16:, 16:48], sr[0, 16:, 16:48], data_range=255)
    assert float(row["psnr"]) == pytest.approx(wanted, rel=1e-5)
    placed(tmp_path / "mask.zarr", mask * 0, nm=(45.0, 64.0, 64.0))
    assert "no voxel of its 2 sections is scored" in evaluated(tmp_path, capsys, 2, mask="mask.zarr")


def test_a_run_that_is_not_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ledger's own words, before anything is scored; an absent chunk that no ledger explains names the key."""
    _, ledger = run(tmp_path)
    ledger.record([Receipt(1, QUARANTINED, error="chunk (0, 1, 2) is damaged")])
    ledger.flush()
    said = evaluated(tmp_path, capsys, 2)
    assert "1 slabs of SR are quarantined; the first is task 1" in said
    assert "chunk (0, 1, 2) is damaged" in said
    for segment in tmp_path.glob("sr.zarr.emsr/ledger-*/segment-*"):
        segment.unlink()
    assert "not finished: 4 of the 4 slabs" in evaluated(tmp_path, capsys, 2)
    (tmp_path / "sr.zarr.emsr").rename(tmp_path / "gone")
    assert "volumes.0.missing_chunks: {fill: 0}" in evaluated(tmp_path, capsys, 2)
    evaluated(tmp_path, capsys, missing_chunks={"fill": 0})
    assert "scored" not in scores(tmp_path)[0]
