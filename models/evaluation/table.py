"""Scores as a table: every section in CSV, means per volume and method in Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

HIGHER = {"psnr": True, "ssim": True, "ssim_gaussian": True, "lpips_alex": False, "lpips_vgg": False, "dists": False}
"""Which metrics there are, and whether more is better."""
TITLES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ssim_gaussian": "SSIM (Gaussian)",
    "lpips_alex": "LPIPS (Alex)",
    "lpips_vgg": "LPIPS (VGG)",
    "dists": "DISTS",
}
DIGITS = {"psnr": 2}


@dataclass(frozen=True)
class Row:
    """Scores of one section of one volume by one method."""

    volume: str
    method: str
    section: int
    scores: dict[str, float]


def to_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["volume", "method", "section", *metrics])
    for row in rows:
        writer.writerow([row.volume, row.method, row.section, *(f"{row.scores[m]:.6g}" for m in metrics)])
    return out.getvalue()


def means(rows: Sequence[Row], metrics: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """(volume, method) -> mean over sections, in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.volume, row.method), []).append(row)
    return {key: {m: sum(r.scores[m] for r in group) / len(group) for m in metrics} for key, group in groups.items()}


def cells(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table of means, as text."""
    head = ["volume", "method", *(f"{TITLES[m]} {'up' if HIGHER[m] else 'down'}" for m in metrics)]
    lines = [
        [*key, *(f"{scores[m]:.{DIGITS.get(m, 4)}f}" for m in metrics)] for key, scores in means(rows, metrics).items()
    ]
    return head, lines


def to_markdown(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    head, lines = cells(rows, metrics)
    rule = ["---", "---", *("---:" for _ in metrics)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])
