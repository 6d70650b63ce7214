"""`python -m pipeline.evaluate table.yaml`: super-resolved volumes against ground truth, as tables and a picture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from pipeline.base.command import guarded
from pipeline.base.errors import UserError
from pipeline.config import table as table_yaml
from pipeline.config.table import TableConfig

if TYPE_CHECKING:
    from pipeline.evaluation.scores import Scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description="Score super-resolved volumes against ground truth."
    )
    parser.add_argument("table", help="path of table.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: evaluate(table_yaml.load(args.table)))


def evaluate(config: TableConfig) -> int:
    """Write table.csv, table.md and contact-sheet.png to the output folder and print the means. Raises UserError."""
    try:
        from pipeline.evaluation.scores import score
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed", "it is needed for evaluation", "pip install 'emsr[evaluate]'"
        ) from None
    console = Console(stderr=True)
    quiet = not sys.stderr.isatty()
    scores = score(config, lambda work: track(work, description="sections", console=console, disable=quiet))
    scores.write(config.output)
    _print(scores, config.output)
    return 0


def _print(scores: Scores, output: Path) -> None:
    head, lines = scores.means()
    means = Table(*head)
    for line in lines:
        means.add_row(*line)
    console = Console()
    console.print(means)
    console.print(f"every section, the means and a picture: {output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
