"""Tables of scores: every section as CSV, means per volume and method as Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

HIGHER = {"psnr": True, "ssim": True, "ssim_gaussian": True, "lpips_alex": False, "lpips_vgg": False, "dists": False}
"""All metrics by name, and whether a larger value is better."""
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
    """The scores by metric of one section of one volume, super-resolved by one method."""

    volume: str
    method: str
    section: int
    scores: dict[str, float]


def to_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """All rows with a header, numbers with six significant digits."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["volume", "method", "section", *metrics])
    for row in rows:
        writer.writerow([row.volume, row.method, row.section, *(f"{row.scores[m]:.6g}" for m in metrics)])
    return out.getvalue()


def means(rows: Sequence[Row], metrics: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """The mean of every metric over sections, by (volume, method), in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.volume, row.method), []).append(row)
    return {key: {m: sum(r.scores[m] for r in group) / len(group) for m in metrics} for key, group in groups.items()}


def cells(rows: Sequence[Row], metrics: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table of means, cell by cell as text."""
    head = ["volume", "method", *(f"{TITLES[m]} {'up' if HIGHER[m] else 'down'}" for m in metrics)]
    lines = [
        [*key, *(f"{scores[m]:.{DIGITS.get(m, 4)}f}" for m in metrics)] for key, scores in means(rows, metrics).items()
    ]
    return head, lines


def to_markdown(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """The table of means in Markdown."""
    head, lines = cells(rows, metrics)
    rule = ["---", "---", *("---:" for _ in metrics)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])
