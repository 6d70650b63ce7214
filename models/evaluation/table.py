"""Tables of scores: every section as CSV, means per volume and method as Markdown, both as JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
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
MIN_SIDE = {"psnr": 1, "ssim": 7, "ssim_gaussian": 11, "lpips_alex": 31, "lpips_vgg": 16, "dists": 1}
"""Voxels across the smallest section that a metric scores: its window, or what its network's poolings leave one of."""
WHOLE_SECTIONS = ("lpips_alex", "lpips_vgg", "dists")
"""Metrics that score no part of a section."""


@dataclass(frozen=True)
class Row:
    """The scores by metric of one section of one volume, super-resolved by one method.

    A score is None where too little was left to score; `scored` is the share of the section's voxels that is.
    """

    volume: str
    method: str
    section: int
    scores: Mapping[str, float | None]
    scored: float = 1.0


@dataclass(frozen=True)
class Summary:
    """How many sections a volume has, what share of their voxels is scored, and what readers must know."""

    volume: str
    sections: int
    scored: float
    remarks: tuple[str, ...] = ()


def to_csv(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """All rows with a header, numbers with six significant digits; the share that is scored where it is not all."""
    partly = ["scored"] if any(row.scored < 1 for row in rows) else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["volume", "method", "section", *metrics, *partly])
    for row in rows:
        scores = ["" if (score := row.scores[m]) is None else f"{score:.6g}" for m in metrics]
        writer.writerow([row.volume, row.method, row.section, *scores, *(f"{row.scored:.6g}" for _ in partly)])
    return out.getvalue()


def means(rows: Sequence[Row], metrics: Sequence[str]) -> dict[tuple[str, str], dict[str, float | None]]:
    """The mean of every metric over the sections that have it, by (volume, method), in the order of their first rows;
    None where none has.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.volume, row.method), []).append(row)

    def mean(scores: list[float]) -> float | None:
        return sum(scores) / len(scores) if scores else None

    return {
        key: {m: mean([score for row in group if (score := row.scores[m]) is not None]) for m in metrics}
        for key, group in groups.items()
    }


def cells(
    rows: Sequence[Row], metrics: Sequence[str], summaries: Sequence[Summary] = ()
) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table of means, cell by cell as text.

    Where a volume is scored in part, the last column tells which share.
    """
    shares = {summary.volume: summary.scored for summary in summaries}
    partly = any(share < 1 for share in shares.values())
    head = ["volume", "method", *(f"{TITLES[m]} {'up' if HIGHER[m] else 'down'}" for m in metrics)]
    lines = [
        [
            *key,
            *("none" if (score := scores[m]) is None else f"{score:.{DIGITS.get(m, 4)}f}" for m in metrics),
            *([f"{shares[key[0]]:.2%}"] if partly else []),
        ]
        for key, scores in means(rows, metrics).items()
    ]
    return [*head, *(["scored"] if partly else [])], lines


def to_markdown(rows: Sequence[Row], metrics: Sequence[str], summaries: Sequence[Summary] = ()) -> str:
    """The table of means in Markdown, and below it the remarks."""
    head, lines = cells(rows, metrics, summaries)
    rule = ["---", "---", *("---:" for _ in head[2:])]
    table = "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])
    remarks = [f"* {summary.volume}: {remark}\n" for summary in summaries for remark in summary.remarks]
    return table + "".join(["\n", *remarks] if remarks else [])


def to_json(rows: Sequence[Row], metrics: Sequence[str], summaries: Sequence[Summary]) -> str:
    """Every volume with its means, sections, share and remarks. An infinite score is "inf", one that is not, null."""

    def plain(scores: Mapping[str, float | None]) -> dict[str, float | str | None]:
        return {m: "inf" if (score := scores[m]) == math.inf else score for m in metrics}

    found = means(rows, metrics)
    volumes = [
        {
            "name": summary.volume,
            "sections": summary.sections,
            "scored": summary.scored,
            "remarks": summary.remarks,
            "means": {method: plain(scores) for (volume, method), scores in found.items() if volume == summary.volume},
            "scores": [
                {"method": row.method, "section": row.section, "scored": row.scored, **plain(row.scores)}
                for row in rows
                if row.volume == summary.volume
            ],
        }
        for summary in summaries
    ]
    return json.dumps({"volumes": volumes}, indent=1, allow_nan=False) + "\n"
