"""The scores of every section of the volumes of a table.yaml, and the four files that are written of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.evaluation import table
from models.evaluation.table import MIN_SIDE, WHOLE_SECTIONS, Row, Summary
from pipeline.base.errors import DiskError, UserError
from pipeline.config.table import TableConfig
from pipeline.evaluation.likeness import likeness
from pipeline.evaluation.metrics import Metric, metrics
from pipeline.evaluation.picture import Panel, panels
from pipeline.evaluation.volumes import SR, ScoredVolume, SectionImages, open_volume
from pipeline.storage.files import put_all
from pipeline.viewer.contact_sheet import compose

Section = tuple[ScoredVolume, int]
"""A section to score: its volume and z."""
Track = Callable[[Sequence[Section], str], Iterable[Section]]
"""Goes through sections and may show how far it is; the text says what is done with them."""


@dataclass(frozen=True)
class Scores:
    """A row for every section and method, a summary of every volume, and a row of panels for one section of each."""

    metrics: Sequence[str]
    rows: Sequence[Row]
    summaries: Sequence[Summary]
    pictures: Sequence[Sequence[Panel]]

    def means(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table of means, as text."""
        return table.cells(self.rows, self.metrics, self.summaries)

    def remarks(self) -> list[str]:
        """What a reader of the scores must know, a line each."""
        return [f"{summary.volume}: {remark}" for summary in self.summaries for remark in summary.remarks]

    def write(self, folder: Path) -> None:
        """Write table.csv (every section), table.md (the means), table.json (both) and contact-sheet.png into
        `folder`, each whole or not at all. Raises UserError.
        """
        made = {
            "table.csv": table.to_csv(self.rows, self.metrics).encode(),
            "table.md": table.to_markdown(self.rows, self.metrics, self.summaries).encode(),
            "table.json": table.to_json(self.rows, self.metrics, self.summaries).encode(),
            "contact-sheet.png": compose(self.pictures),
        }
        try:
            put_all(folder, made)
        except DiskError as error:
            raise UserError(str(error), "a folder that takes files", "Choose another output") from None


def score(config: TableConfig, track: Track) -> Scores:
    """Score all volumes. The loops go through `track`, which may show progress. Raises UserError."""
    chosen = metrics(config.metrics, config.weights)
    volumes = [open_volume(volume, i) for i, volume in enumerate(config.volumes)]
    for volume in volumes:
        _check_sides(volume, config.metrics)
    sections = [(volume, z) for volume in volumes for z in volume.sections]
    for volume, z in track(sections, "sections looked at"):
        _check_contrast(volume, z)
    rows: list[Row] = []
    share = {volume.name: 0.0 for volume in volumes}
    shown: dict[str, tuple[int, SectionImages]] = {}
    likenesses: dict[str, list[str]] = {}
    for volume, z in track(sections, "sections scored"):
        images = volume.read(z)
        if not images.scored:
            continue
        if volume.name not in likenesses:
            likenesses[volume.name] = likeness(images, volume.read_truth(volume.sections[-1]))
        share[volume.name] += images.scored / len(volume.sections)
        if volume.name not in shown or z <= (volume.sections.start + volume.sections.stop) // 2:
            shown[volume.name] = z, images
        rows.extend(_rows(volume, z, images, chosen))
    for volume in volumes:
        if volume.name not in shown:
            raise UserError(
                f"{volume.name}: no voxel of its {len(volume.sections)} sections is scored: they were skipped by SR's "
                "run, or the mask is 0 there",
                "at least one",
                "Choose other sections, or another mask",
            )
    summaries = [_summary(volume, share[volume.name], rows, likenesses[volume.name]) for volume in volumes]
    pictures = [panels(f"{name}, section {z}", images) for name, (z, images) in shown.items()]
    return Scores(list(chosen), rows, summaries, pictures)


def _rows(volume: ScoredVolume, z: int, images: SectionImages, chosen: dict[str, Metric]) -> Iterable[Row]:
    for method, image in images.methods.items():
        scores = {name: metric(image, images.truth, images.valid) for name, metric in chosen.items()}
        yield Row(volume.name, method, z, scores, images.scored)


def _summary(volume: ScoredVolume, share: float, rows: Sequence[Row], likeness: Sequence[str]) -> Summary:
    mine = [row for row in rows if (row.volume, row.method) == (volume.name, SR)]
    remarks = [*volume.place.remarks, *likeness]
    if share < 1:
        remarks.append(f"{share:.2%} of the voxels are scored; the others were skipped by the run, or the mask is 0")
    if equal := sum(row.scores.get("psnr") == np.inf for row in mine):
        remarks.append(
            f"{equal} of {len(mine)} sections equal the truth: their PSNR, and with it the mean, is infinite"
        )
    remarks.extend(
        f"{name} needs whole sections, so that {some} of {len(mine)} have none"
        for name in WHOLE_SECTIONS
        if (some := sum(name in row.scores and row.scores[name] is None for row in mine))
    )
    return Summary(volume.name, len(volume.sections), share, tuple(remarks))


def _check_sides(volume: ScoredVolume, names: Sequence[str]) -> None:
    """Raises UserError where the sections are smaller than a metric needs."""
    shape = volume.place.common.shape
    short = [name for name in names if min(shape.y, shape.x) < MIN_SIDE[name]]
    if short:
        needs = ", ".join(f"{table.TITLES[name]} needs {MIN_SIDE[name]} x {MIN_SIDE[name]}" for name in short)
        left = [name for name in names if name not in short] or ["psnr"]
        raise UserError(
            f"{volume.name}: sections of {shape.y} x {shape.x}: {needs}",
            "larger sections, or metrics for small ones",
            f"metrics: [{', '.join(left)}]",
        )


def _check_contrast(volume: ScoredVolume, z: int) -> None:
    """A constant section of the truth has no structure to compare with. Raises UserError."""
    if volume.read_truth(z).std() == 0:
        raise UserError(
            f"{volume.name}: section {z} of the ground truth is constant",
            "an EM image",
            "Leave it out with sections, or correct the url",
        )
