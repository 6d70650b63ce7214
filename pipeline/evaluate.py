"""`python -m pipeline.evaluate table.yaml`: super-resolved volumes against ground truth, bicubic beside them, as tables and a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline import evaluate_config
from pipeline.command import guarded
from pipeline.config import SourceConfig
from pipeline.contact_sheet import SIDE, compose, heat
from pipeline.errors import DataError, NetworkError, UserError
from pipeline.evaluate_config import TableConfig, VolumeConfig, WeightsConfig
from pipeline.geometry import ZYX, Box
from pipeline.storage.sources import open_source
from pipeline.storage.volume import Source, Uint8Array

Metric = Callable[[Uint8Array, Uint8Array], float]
SR, BICUBIC = "SR", "bicubic"
ERROR_TOP = 96


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluate", description="Score super-resolved volumes against ground truth.")
    parser.add_argument("table", help="path of table.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: evaluate(evaluate_config.load(args.table)))


def evaluate(config: TableConfig) -> int:
    """Write table.csv, table.md and contact-sheet.png to the output folder and print the means. Raises UserError."""
    try:
        from models.evaluation import table
    except ImportError as error:
        raise UserError(f"{error.name} is not installed", "it is needed for evaluation", "pip install 'emsr[evaluate]'") from None
    metrics = {name: _metric(name, config.weights) for name in config.metrics}
    volumes = [_open(volume) for volume in config.volumes]
    rows, panels = [], []
    work = [(volume, z) for volume in volumes for z in range(*volume.sections)]
    for volume, z in track(work, description="sections", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        images = volume.read(z)
        truth = images.pop("GT")
        shown = images.pop("LR", None)
        for method, image in images.items():
            rows.append(table.Row(volume.name, method, z, {name: score(image, truth) for name, score in metrics.items()}))
        if z == (volume.sections[0] + volume.sections[1]) // 2:
            panels.append(_panels(volume.name, z, shown, images, truth))
    config.output.mkdir(parents=True, exist_ok=True)
    for name, content in {
        "table.csv": table.to_csv(rows, list(metrics)).encode(),
        "table.md": table.to_markdown(rows, list(metrics)).encode(),
        "contact-sheet.png": compose(panels),
    }.items():
        (config.output / name).write_bytes(content)
    _print(*table.cells(rows, list(metrics)), config.output)
    return 0


@dataclass(frozen=True)
class _Volume:
    """An SR volume, its truth and, if given, its LR, with the sections that are scored."""

    name: str
    sr: Source
    gt: Source
    lr: Source | None
    sections: tuple[int, int]

    def read(self, z: int) -> dict[str, Uint8Array]:
        """Section z of SR, GT and, where there is LR, of LR and its bicubic enlargement."""
        shape = self.sr.info.bounds.shape
        found = {SR: _section(self.sr, z, shape), "GT": _section(self.gt, z, shape)}
        if self.lr is None:
            return found
        lr = _section(self.lr, z, self.lr.info.bounds.shape)
        enlarged = Image.fromarray(lr).resize((shape.x, shape.y), Image.Resampling.BICUBIC)
        return found | {BICUBIC: np.asarray(enlarged), "LR": lr}


def _open(config: VolumeConfig) -> _Volume:
    def source(url: str) -> Source:
        return open_source(SourceConfig(url=url, intensity_window=config.intensity_window))

    sr, gt = source(config.sr), source(config.gt)
    found, wanted = sr.info.bounds.shape, gt.info.bounds.shape
    within = all(a <= b for a, b in zip(found, wanted, strict=True))
    if not (within if config.crop else found == wanted):
        hint = "Use crop: true to leave out what the truth has more" if within else "Name its own truth"
        raise UserError(f"{config.name}: SR is {tuple(found)}, ground truth {tuple(wanted)}", "one shape (z, y, x)", hint)
    lr = None if config.lr is None else source(config.lr)
    if lr is not None:
        shape = lr.info.bounds.shape
        scale = found.y // max(1, shape.y)
        if shape.z != found.z or scale < 2 or (shape.y * scale, shape.x * scale) != (found.y, found.x):
            raise UserError(
                f"{config.name}: LR is {tuple(shape)}, SR {tuple(found)}", "the same sections, y and x smaller by one whole number", "Name its own LR"
            )
    first, stop = config.sections or (0, found.z)
    if stop > found.z:
        raise UserError(f"{config.name}: sections [{first}, {stop}] of a volume of {found.z}", f"sections within [0, {found.z}]", "Correct sections")
    volume = _Volume(config.name, sr, gt, lr, (first, stop))
    for z in range(first, stop):
        if _section(gt, z, found).std() == 0:
            raise UserError(f"{config.name}: section {z} of the ground truth is constant", "an EM image", "Leave it out with sections, or correct the url")
    return volume


def _section(source: Source, z: int, shape: ZYX) -> Uint8Array:
    start = source.info.bounds.start + ZYX(z, 0, 0)
    try:
        whole = source.read(Box(start, start + ZYX(1, shape.y, shape.x)))
    except DataError as error:
        raise UserError(f"section {z} of {source.info.url} cannot be read: {error}", "", "Finish or mend the volume, or leave the section out") from None
    section: Uint8Array = whole[0]
    return section


def _metric(name: str, weights: WeightsConfig) -> Metric:
    from models import WeightsError
    from models.evaluation import fidelity

    if name in ("psnr", "ssim", "ssim_gaussian"):
        metric: Metric = getattr(fidelity, name)
        return metric
    import torch

    from models.evaluation import perceptual

    files: dict[str, list[Path | None]] = {"lpips_alex": [weights.lpips_alex], "lpips_vgg": [weights.vgg16], "dists": [weights.vgg16, weights.dists]}
    try:
        network: Any = getattr(perceptual, name)(*files[name])
    except (OSError, WeightsError, KeyError) as error:
        fetched = None in files[name]
        raise NetworkError(
            f"weights of {name} cannot be {'fetched' if fetched else 'read'}: {error}",
            "the files of docs/evaluation.md",
            "Name them under weights" if fetched else "Check the paths",
        ) from None

    def score(image: Uint8Array, truth: Uint8Array) -> float:
        with torch.no_grad():
            pair = [torch.tensor(part)[None, None].float() / 255 for part in (image, truth)]
            return float(network(*pair))

    return score


def _panels(name: str, z: int, lr: Uint8Array | None, images: dict[str, Uint8Array], truth: Uint8Array) -> list[tuple[str, Image.Image]]:
    """LR, bicubic, SR, GT and the error of SR, in the middle of a section."""
    height, width = (min(SIDE, n) for n in truth.shape)
    top, left = ((n - m) // 2 for n, m in zip(truth.shape, (height, width), strict=True))
    middle = (slice(top, top + height), slice(left, left + width))
    row = []
    if lr is not None:
        nearest = Image.fromarray(lr).resize(truth.shape[::-1], Image.Resampling.NEAREST)
        row = [(f"{name}, section {z}: LR", Image.fromarray(np.asarray(nearest)[middle])), (BICUBIC, Image.fromarray(images[BICUBIC][middle]))]
    error = np.abs(images[SR].astype(np.int16) - truth)[middle].astype(np.uint8)
    return [
        *row,
        (SR, Image.fromarray(images[SR][middle])),
        ("ground truth", Image.fromarray(truth[middle])),
        (f"|SR - truth|, 0 to {ERROR_TOP} grey levels", heat(error, ERROR_TOP)),
    ]


def _print(head: list[str], lines: list[list[str]], output: Path) -> None:
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    console = Console()
    console.print(shown)
    console.print(f"every section, the means and a picture: {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
