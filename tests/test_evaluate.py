"""`python -m pipeline.evaluate`: scores equal to scikit-image's and the metric authors' own, and what is refused."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SHARED, texture, write_lr
from PIL import Image
from safetensors.torch import load_file
from scipy import ndimage, signal
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from models.evaluation import fidelity, perceptual
from models.evaluation.table import Row, means, to_csv, to_markdown
from pipeline.evaluate import main

GT = (4, 64, 80)
WEIGHTS = SHARED / "weights"
FILES = {
    "lpips_alex": WEIGHTS / "lpips-alex" / "alexnet_features_lpips_v0.1.safetensors",
    "vgg16": WEIGHTS / "vgg16-conv" / "vgg16_features_lpips_v0.1.safetensors",
    "dists": WEIGHTS / "dists" / "dists_alpha_beta.safetensors",
}
needs_weights = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"no metric weights at {WEIGHTS} (set EMSR_SHARED)")


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """gt, lr (its antialiased eighth) and an sr that is the truth with noise."""
    gt = texture(GT)
    write_lr(tmp_path / "gt.zarr", gt)
    write_lr(
        tmp_path / "lr.zarr",
        np.stack([np.asarray(Image.fromarray(s).resize((10, 8), Image.Resampling.BICUBIC)) for s in gt]),
    )
    noise = np.random.default_rng(1).normal(0, 5, GT)
    write_lr(tmp_path / "sr.zarr", np.clip(gt + noise, 0, 255).astype(np.uint8))
    return tmp_path


def table_yaml(folder: Path, volume: dict[str, Any] | None = None, **changes: Any) -> Path:
    body = {
        "volumes": [{"name": "vnc", "sr": "sr.zarr", "gt": "gt.zarr", "lr": "lr.zarr"} | (volume or {})],
        "output": "scores",
    } | changes
    (folder / "table.yaml").write_text(yaml.safe_dump(body))
    return folder / "table.yaml"


def read(path: Path) -> np.ndarray:
    import zarr

    return np.asarray(zarr.open_array(path / "0", mode="r"))


def test_the_table_as_a_user_makes_it(volumes: Path) -> None:
    """The command in a process of its own; its numbers are scikit-image's, of every section and in the mean."""
    command = [sys.executable, "-m", "pipeline.evaluate", str(table_yaml(volumes))]
    said = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "PSNR (dB)" in said.stdout
    rows = list(csv.DictReader((volumes / "scores" / "table.csv").open()))
    gt, sr, lr = (read(volumes / f"{name}.zarr") for name in ("gt", "sr", "lr"))
    enlarged = np.stack([np.asarray(Image.fromarray(s).resize((80, 64), Image.Resampling.BICUBIC)) for s in lr])
    assert len(rows) == 8
    for row in rows:
        image = {"SR": sr, "bicubic": enlarged}[row["method"]][int(row["section"])]
        truth = gt[int(row["section"])]
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(truth, image, data_range=255), rel=1e-5)
        assert float(row["ssim"]) == pytest.approx(structural_similarity(truth, image, data_range=255), rel=1e-5)
    markdown = (volumes / "scores" / "table.md").read_text()
    mean = np.mean([float(r["psnr"]) for r in rows if r["method"] == "SR"])
    assert f"| vnc | SR | {mean:.2f} |" in markdown
    with Image.open(volumes / "scores" / "contact-sheet.png") as sheet:
        assert sheet.width > 5 * 80


def test_sections_and_crop(volumes: Path) -> None:
    write_lr(volumes / "gt.zarr", texture((4, 66, 85)))
    assert main([str(table_yaml(volumes, {"sections": [1, 3]}))]) == 2
    assert main([str(table_yaml(volumes, {"sections": [1, 3], "crop": True}))]) == 0
    rows = list(csv.DictReader((volumes / "scores" / "table.csv").open()))
    assert [r["section"] for r in rows if r["method"] == "SR"] == ["1", "2"]


def test_means_and_digits() -> None:
    rows = [Row("a", "SR", z, {"psnr": value, "dists": value / 100}) for z, value in enumerate((20.0, 30.0))] + [
        Row("b", "SR", 0, {"psnr": 1.0, "dists": 0.0})
    ]
    assert means(rows, ["psnr"]) == {("a", "SR"): {"psnr": 25.0}, ("b", "SR"): {"psnr": 1.0}}
    assert to_markdown(rows, ["psnr", "dists"]).splitlines()[2] == "| a | SR | 25.00 | 0.2500 |"
    assert to_csv(rows, ["dists"]).splitlines()[1] == "a,SR,0,0.2"


def test_psnr_by_hand() -> None:
    """Off by 5 everywhere: 20 log10(255 / 5)."""
    truth = np.full((8, 8), 100, np.uint8)
    assert fidelity.psnr(truth + 5, truth) == pytest.approx(20 * np.log10(51))
    assert fidelity.psnr(truth, truth) == np.inf


def test_gaussian_ssim_is_that_of_wang_et_al() -> None:
    """Against their formula written out: local moments by one convolution each with their 11 x 11 window, whole windows
    only, C1 = (0.01 * 255)^2 and C2 = (0.03 * 255)^2."""
    truth = texture((1, 40, 52))[0]
    image = np.clip(truth + np.random.default_rng(3).normal(0, 20, truth.shape), 0, 255).astype(np.uint8)
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    x, y = image.astype(float), truth.astype(float)

    def mean(values: np.ndarray) -> np.ndarray:
        return signal.convolve2d(values, window / window.sum(), mode="valid")

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    assert fidelity.ssim_gaussian(image, truth) == pytest.approx(similarity.mean(), abs=1e-6)


def test_the_two_ssims_may_order_two_methods_differently() -> None:
    """A blurred image is the better one by the uniform window, a noisy one by Wang et al.'s (docs/evaluation.md)."""
    truth = texture((1, 64, 80))[0]
    blurred = np.rint(ndimage.gaussian_filter(truth.astype(float), 1.7)).astype(np.uint8)
    noisy = np.clip(truth + np.random.default_rng(0).normal(0, 56, truth.shape), 0, 255).astype(np.uint8)
    assert fidelity.ssim(blurred, truth) > fidelity.ssim(noisy, truth) + 0.01
    assert fidelity.ssim_gaussian(blurred, truth) < fidelity.ssim_gaussian(noisy, truth) - 0.01


def test_the_gaussian_ssim_is_a_column_beside_the_other(volumes: Path) -> None:
    assert main([str(table_yaml(volumes, {"sections": [0, 1]}, metrics=["ssim", "ssim_gaussian"]))]) == 0
    sr, _ = csv.DictReader((volumes / "scores" / "table.csv").open())
    image, truth = (read(volumes / f"{name}.zarr")[0] for name in ("sr", "gt"))
    assert float(sr["ssim"]) == pytest.approx(fidelity.ssim(image, truth), rel=1e-5)
    assert float(sr["ssim_gaussian"]) == pytest.approx(fidelity.ssim_gaussian(image, truth), rel=1e-5)
    assert "SSIM (Gaussian) up" in (volumes / "scores" / "table.md").read_text()


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two colour pairs that numpy makes the same everywhere: blobs against the same blobs, blurred; and against other
    blobs.
    """
    rng = np.random.default_rng(7)
    blobs = ndimage.gaussian_filter(rng.random((2, 3, 96, 96)), (0, 0, 2, 2))
    blobs = (blobs - blobs.min()) / np.ptp(blobs)
    blurred = ndimage.gaussian_filter(blobs[0], (0, 3, 3))
    first = np.stack([blobs[0], blobs[0]])
    second = np.stack([blurred, blobs[1]])
    return torch.from_numpy(first).float(), torch.from_numpy(second).float()


REFERENCE = {
    "lpips_alex": [0.32904, 0.21610],
    "lpips_vgg": [0.29088, 0.53353],
    "dists": [0.25194, 0.20625],
}
"""What the authors' own packages (lpips 0.1.4, DISTS-pytorch 0.1) give for `pairs` with these weights."""


@needs_weights
@pytest.mark.parametrize("name", ["lpips_alex", "lpips_vgg", "dists"])
def test_perceptual_metrics_are_those_of_their_authors(name: str) -> None:
    files = {"lpips_alex": ["lpips_alex"], "lpips_vgg": ["vgg16"], "dists": ["vgg16", "dists"]}[name]
    network = getattr(perceptual, name)(*(FILES[key] for key in files))
    first, second = pairs()
    assert network(first, second).tolist() == pytest.approx(REFERENCE[name], abs=1e-3)
    assert network(first, first).tolist() == pytest.approx([0, 0], abs=1e-5)
    grey = first[:, :1]
    assert torch.allclose(
        network(grey, second[:, :1]), network(grey.repeat(1, 3, 1, 1), second[:, :1].repeat(1, 3, 1, 1)), atol=1e-5
    )


@needs_weights
@pytest.mark.parametrize("name", ["lpips_alex", "lpips_vgg", "dists"])
def test_weights_that_are_not_named_are_fetched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbones from torchvision's cache, as after a download; heads from the packages. Without a cache, here, a
    message.
    """
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    arguments = [None] * (2 if name == "dists" else 1)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first use for good
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    with pytest.raises(OSError, match="urlopen"):
        getattr(perceptual, name)(*arguments)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    for key, cached in {"lpips_alex": "alexnet-owt-7be5be79.pth", "vgg16": "vgg16-397923af.pth"}.items():
        backbone = {k: v for k, v in load_file(FILES[key]).items() if k.startswith("features.")}
        torch.save(backbone, tmp_path / "hub" / "checkpoints" / cached)
    first, second = pairs()
    assert getattr(perceptual, name)(*arguments)(first, second).tolist() == pytest.approx(REFERENCE[name], abs=1e-3)


@needs_weights
def test_perceptual_columns(volumes: Path) -> None:
    metrics = ["lpips_alex", "lpips_vgg", "dists"]
    path = table_yaml(
        volumes, {"sections": [0, 1]}, metrics=metrics, weights={key: str(value) for key, value in FILES.items()}
    )
    assert main([str(path)]) == 0
    sr, bicubic = csv.DictReader((volumes / "scores" / "table.csv").open())
    assert all(0 < float(sr[m]) < float(bicubic[m]) for m in metrics)


def flat(folder: Path) -> dict[str, Any]:
    write_lr(folder / "gt.zarr", np.full(GT, 9, np.uint8))
    return {}


def fewer(folder: Path) -> dict[str, Any]:
    write_lr(folder / "lr.zarr", texture((3, 8, 10)))
    return {}


@pytest.mark.parametrize(
    ("damage", "changes", "words"),
    [
        (flat, {}, "section 0 of the ground truth is constant"),
        (fewer, {}, "LR is (3, 8, 10)"),
        (lambda folder: {"gt": "lr.zarr"}, {}, "Name its own truth"),
        (lambda folder: {"sr": "nothing.zarr"}, {}, "nothing.zarr"),
        (lambda folder: {"sections": [0, 5]}, {}, "sections within [0, 4]"),
        (lambda folder: {}, {"metrics": ["mse"]}, "metrics"),
        (
            lambda folder: {},
            {"metrics": ["lpips_alex"], "weights": {"lpips_alex": "none.safetensors"}},
            "none.safetensors",
        ),
        (lambda folder: {"ground_truth": "gt.zarr"}, {}, "unknown key"),
    ],
)
def test_mistakes(
    volumes: Path,
    damage: Callable[[Path], dict[str, Any]],
    changes: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([str(table_yaml(volumes, damage(volumes), **changes))]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (volumes / "scores").exists()
