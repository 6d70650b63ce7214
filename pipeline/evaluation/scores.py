"""The scores of every section of the volumes of a table.yaml, and the three files that are written of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from models.evaluation import table
from models.evaluation.table import Row
from pipeline.config.table import TableConfig
from pipeline.evaluation.metrics import metrics
from pipeline.evaluation.picture import Panel, panels
from pipeline.evaluation.volumes import ScoredVolume, open_volume
from pipeline.viewer.contact_sheet import compose

Section = tuple[ScoredVolume, int]
"""A section to score: its volume and z."""


@dataclass(frozen=True)
class Scores:
    """A row for every section and method, and a row of panels for the middle section of every volume."""

    metrics: Sequence[str]
    rows: Sequence[Row]
    pictures: Sequence[Sequence[Panel]]

    def means(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines of the table of means, as text."""
        return table.cells(self.rows, self.metrics)

    def write(self, folder: Path) -> None:
        """Write table.csv (every section), table.md (the means) and contact-sheet.png into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.csv").write_bytes(table.to_csv(self.rows, self.metrics).encode())
        (folder / "table.md").write_bytes(table.to_markdown(self.rows, self.metrics).encode())
        (folder / "contact-sheet.png").write_bytes(compose(self.pictures))


def score(config: TableConfig, track: Callable[[Sequence[Section]], Iterable[Section]]) -> Scores:
    """Score all volumes. The loop goes through `track`, which may show progress. Raises UserError."""
    chosen = metrics(config.metrics, config.weights)
    sections = [(volume, z) for volume in map(open_volume, config.volumes) for z in volume.sections]
    rows: list[Row] = []
    pictures: list[list[Panel]] = []
    for volume, z in track(sections):
        images = volume.read(z)
        for method, image in images.methods.items():
            scores = {name: metric(image, images.truth) for name, metric in chosen.items()}
            rows.append(Row(volume.name, method, z, scores))
        if z == (volume.sections.start + volume.sections.stop) // 2:
            pictures.append(panels(f"{volume.name}, section {z}", images))
    return Scores(list(chosen), rows, pictures)
