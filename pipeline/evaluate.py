"""`python -m pipeline.evaluate table.yaml`: super-resolved volumes against ground truth, as tables and a picture."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from emsr import start
from pipeline.base.command import guarded
from pipeline.base.errors import UserError
from pipeline.config import table as table_yaml
from pipeline.config.output_folder import check_output
from pipeline.config.table import TableConfig

if TYPE_CHECKING:
    from pipeline.evaluation.scores import Scores

T = TypeVar("T")
TELL_S = 20.0
"""Seconds between two lines that say how far it is, where there is no terminal."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=start.program("evaluate"), description="Score super-resolved volumes against ground truth."
    )
    parser.add_argument("table", help="path of table.yaml")
    args = parser.parse_args(argv)
    return guarded(lambda: evaluate(table_yaml.load(args.table)))


def evaluate(config: TableConfig) -> int:
    """Write the tables and contact-sheet.png to the output folder and print the means. Raises UserError."""
    try:
        from pipeline.evaluation.scores import score
    except ImportError as error:
        raise UserError(
            f"{error.name} is not installed", "it is needed for evaluation", "pip install 'emsr[evaluate]'"
        ) from None
    volumes = [url for v in config.volumes for url in (v.sr, v.gt, v.lr, v.mask) if url is not None]
    check_output(config.output, volumes)
    scores = score(config, _shown)
    _print(scores)  # first, so that they are not lost where they cannot be written
    scores.write(config.output)
    print(f"every section, the means and a picture: {config.output}")
    return 0


def _shown(work: Sequence[T], what: str) -> Iterator[T]:
    """`work`, with a bar on a terminal, else with a line now and then."""
    if sys.stderr.isatty():
        yield from track(work, description=what, console=Console(stderr=True))
        return
    told = time.monotonic()
    for done, item in enumerate(work):
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            print(f"{what}: {done} of {len(work)}", file=sys.stderr, flush=True)
        yield item


def _print(scores: Scores) -> None:
    head, lines = scores.means()
    means = Table(*head)
    for line in lines:
        means.add_row(*(escape(cell) for cell in line))
    console = Console()
    console.print(means)
    for remark in scores.remarks():
        console.print(remark, highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    sys.exit(main())
