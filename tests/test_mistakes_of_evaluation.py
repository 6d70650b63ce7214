"""Law 7 for `emsr evaluate` and `emsr convert`: a line or two, exit code 2, nothing touched."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from conftest import REPOSITORY, texture, tree, write_lr
from PIL import Image

from pipeline import convert
from pipeline.evaluate import main

GT = (4, 40, 48)
ALEX = "lpips_alex"


def pair(voxels: np.ndarray, truth: np.ndarray, sr_nm: Any = (45, 4, 4), gt_nm: Any = (45, 4, 4), **keys: Any) -> Any:
    def made(folder: Path) -> dict[str, Any]:
        write_lr(folder / "sr.zarr", voxels, sr_nm)
        write_lr(folder / "gt.zarr", truth, gt_nm)
        return {"volumes": [{"name": "v", "sr": "sr.zarr", "gt": "gt.zarr"} | keys]}

    return made


def of(**keys: Any) -> Any:
    return pair(texture(GT, 1), texture(GT), **keys)


def table(**keys: Any) -> Any:
    return lambda folder: of()(folder) | keys


def weights(write: Callable[[Path], object]) -> Any:
    def made(folder: Path) -> dict[str, Any]:
        write(folder / "w.pth")
        return of()(folder) | {"metrics": [ALEX], "weights": {ALEX: "w.pth"}}

    return made


def file_at(name: str) -> Any:
    def made(folder: Path) -> dict[str, Any]:
        (folder / name.partition("/")[0]).write_text("")
        return of()(folder) | {"output": name}

    return made


def damaged(folder: Path) -> dict[str, Any]:
    keys: dict[str, Any] = of()(folder)
    chunk = next(path for path in sorted((folder / "sr.zarr" / "0" / "c").rglob("*")) if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:10])
    return keys


MISTAKES: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("sections of 5 x 5", pair(texture((3, 5, 5), 1), texture((3, 5, 5))), "sections of 5 x 5: SSIM needs 7 x 7"),
    ("other voxels", of(gt_nm=(45, 8, 8)), "SR's voxels are 45 x 4 x 4 nm, the ground truth's 45 x 8 x 8 nm"),
    ("another shape", pair(texture((4, 32, 48)), texture(GT)), "SR is (4, 32, 48), ground truth (4, 40, 48)"),
    ("one section of four", pair(texture((1, 40, 48)), texture(GT)), "SR is (1, 40, 48)"),
    ("sr is gt", of(gt="sr.zarr"), "sr and gt are one volume"),
    ("sections [2, 2]", of(sections=[2, 2]), "0 <= first < last, not [2, 2]"),
    ("sections of one number", of(sections=[2]), "volumes.0.sections"),
    ("sections of three", of(sections=[0, 1, 2]), "saw [0, 1, 2], wanted at most 2 items, not 3"),
    ("sections in words", of(sections="2-3"), "saw '2-3', wanted a list"),
    ("sections beyond", of(sections=[2, 9]), "sections within [0, 4]"),
    ("window upside down", of(intensity_window=[9, 3]), "low < high"),
    ("a window for uint8", of(intensity_window=[0, 9]), "intensity_window is given, and all its volumes are uint8"),
    ("uint16 without window", pair(texture(GT).astype(np.uint16), texture(GT)), "volumes.0.intensity_window"),
    ("float32", pair(texture(GT).astype(np.float32), texture(GT)), "float32"),
    ("constant truth", pair(texture(GT), np.full(GT, 7, np.uint8)), "section 0 of the ground truth is constant"),
    ("a cut chunk", damaged, "section 0 of file:"),
    ("no such mask", of(mask="none.zarr"), "nothing is at volumes.0.mask"),
    ("no such volume", of(sr="none.zarr"), "nothing is at volumes.0.sr"),
    ("a name of two lines", of(name="a\n| b"), "volumes.0.name: saw 'a\\n| b', wanted one line of text"),
    ("no name", of(name=""), "volumes.0.name: saw '', wanted one line of text"),
    ("one name twice", lambda f: {"volumes": of()(f)["volumes"] * 2}, "a name of its own for every volume"),
    ("no volumes", table(volumes=[]), "volumes: saw [], wanted at least 1 item"),
    ("an unknown metric", table(metrics=["mse"]), "saw 'mse', wanted 'psnr', 'ssim'"),
    ("a metric for a list", table(metrics="psnr"), "metrics: saw 'psnr', wanted a list"),
    ("unknown weights", table(weights={"lpips": "a"}), "Did you mean lpips_alex?"),
    ("weights that are not there", table(metrics=[ALEX], weights={ALEX: "no.pth"}), "weights of lpips_alex cannot be"),
    ("empty weights", weights(lambda p: p.write_bytes(b"")), "is empty (0 bytes)"),
    ("a web page", weights(lambda p: p.write_bytes(b"<html>")), "is a web page"),
    ("other weights", weights(lambda p: torch.save({"a": torch.ones(1)}, p)), "has no tensor features.0.weight"),
    (
        "no kernels",
        weights(lambda p: torch.save({f"features.0.{k}": torch.ones(3) for k in ("weight", "bias")}, p)),
        "features.0 has a weight of (3,)",
    ),
    ("output is a file", file_at("scores"), "scores is a file. Wanted: a folder"),
    ("output under a file", file_at("s/x"), "/s is a file. Wanted: a folder"),
    ("output is SR", table(output="sr.zarr"), "lies in the volume"),
    ("output in the truth", table(output="gt.zarr/scores"), "lies in the volume"),
    ("output where nothing can be", table(output="/proc/scores"), "a folder that takes files"),
    ("output of nobody", table(output="~nosuchuser/scores"), "a path written out, as this machine knows no home"),
    ("output on S3", table(output="s3://bucket/scores"), "output: saw 's3://bucket/scores', wanted a path on this"),
    ("output of zero bytes", table(output="a\0b"), "wanted a path, of printable letters"),
    ("a volume of nobody", of(sr="~nosuchuser/sr"), "volumes.0.sr: url '~nosuchuser/sr'"),
    ("weights at a URL", table(weights={ALEX: "https://h/w.pth"}), "weights.lpips_alex: saw 'https://h/w.pth'"),
]


@pytest.mark.parametrize(("damage", "words"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_in_a_table(
    damage: Callable[[Path], dict[str, Any]], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"output": "scores"} | damage(tmp_path)))
    before = tree(tmp_path)
    assert main([str(tmp_path / "table.yaml")]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, said
    assert tree(tmp_path) == before


def test_a_name_in_brackets_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(of(name="[b]x[/c]")(tmp_path) | {"output": "scores"}))
    assert main([str(tmp_path / "table.yaml")]) == 0
    assert "[b]x[/c]" in capsys.readouterr().out


def test_scores_are_shown_where_they_cannot_be_written(tmp_path: Path) -> None:
    """The process may write no file of more than 10 bytes: the tables are printed, and those of before stay."""
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(of()(tmp_path) | {"output": "scores"}))
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores" / "table.csv").write_text("of before")
    before = tree(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.evaluate", str(tmp_path / "table.yaml")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "PSNR (dB)" in done.stdout
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == before


NM = ["--voxel-size-nm", "45", "4", "4"]
VOLUME = texture((4, 24, 32))


def tiff(folder: Path, **options: Any) -> Path:
    tifffile.imwrite(folder / "s.tif", VOLUME, photometric="minisblack", **options)
    return folder / "s.tif"


def with_bytes(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder / name


def mixed(folder: Path) -> Path:
    (folder / "d").mkdir()
    Image.fromarray(VOLUME[0]).save(folder / "d" / "a.png")
    tifffile.imwrite(folder / "d" / "b.tif", VOLUME[1])
    return folder / "d"


@pytest.mark.parametrize(
    ("source", "target", "arguments", "words"),
    [
        (tiff, "o", [], "no voxel size"),
        (tiff, "o", ["--voxel-size-nm", "0", "4", "4"], "three positive numbers in nm"),
        (tiff, "o", ["--voxel-size-nm", "inf", "4", "4"], "three positive numbers in nm"),
        (tiff, "o", ["--voxel-size-nm", "45", "4"], "expected 3 arguments"),
        (tiff, "o", [*NM, "--chunk", "0", "1", "1"], "three whole numbers of at least 1"),
        (tiff, "s.tif", NM, "s.tif is a file"),
        (tiff, "s.tif/o", NM, "s.tif is a file"),
        (tiff, "/proc/o", NM, "a folder that takes files"),
        (tiff, "n5://o", NM, "names a format"),
        (lambda f: f / "none.tif", "o", NM, "is not there"),
        (lambda f: with_bytes(f, "a.tif", b""), "o", NM, "not a TIFF file"),
        (lambda f: with_bytes(f, "a.tif", b"<html>"), "o", NM, "not a TIFF file"),
        (lambda f: with_bytes(f, "a.jpg", b"x"), "o", NM, "is not a TIFF file by its name"),
        (lambda f: with_bytes(f, "d/readme.txt", b"x").parent, "o", NM, "holds no sections"),
        (lambda f: with_bytes(f, "d/a.png", b"").parent, "o", NM, "no PNG header"),
        (lambda f: with_bytes(f, "c.tif", tiff(f).read_bytes()[:-1000]), "o", NM, "is cut off"),
        (mixed, "o", NM, "both TIFF and PNG"),
    ],
)
def test_a_mistake_in_a_conversion(
    source: Callable[[Path], Path],
    target: str,
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = source(tmp_path)
    before = tree(tmp_path)
    assert convert.main([str(path), target, *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert tree(tmp_path) == before


def test_names_without_numbers_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    for name, section in zip(("front", "back"), VOLUME, strict=False):
        Image.fromarray(section).save(tmp_path / "d" / f"{name}.png")
    assert convert.main([str(tmp_path / "d"), str(tmp_path / "o"), *NM]) == 0
    assert "note: 2 names have no number: back.png, front.png" in capsys.readouterr().err
