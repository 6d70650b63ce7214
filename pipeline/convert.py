"""`python -m pipeline.convert SOURCE TARGET --voxel-size-nm Z Y X`: TIFF or PNG sections into OME-Zarr.

SOURCE is a multi-page TIFF file, or a folder with one TIFF or PNG file per section (2 comes before 10).
Grey values are kept as they are, uint8 or uint16. An existing TARGET is never touched.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from emsr import start
from pipeline.base.command import guarded
from pipeline.base.errors import SourceError, UserError
from pipeline.base.geometry import ZYX
from pipeline.base.words import counted
from pipeline.config import urls
from pipeline.storage.conversion.ome_zarr_stack import layer_shapes, write_stack
from pipeline.storage.conversion.section_files import Section, Stack, open_stack


def convert(
    source: Stack | str | Path | Section,
    target: str | Path,
    voxel_size_nm: Sequence[float],
    chunk: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    on_sections: Callable[[int], None] | None = None,
) -> Stack:
    """Write `source` as OME-Zarr 0.5 to `target`, a path or a file://, s3:// or gs:// URL. Returns what was written.

    `source` is a path of image files or an array (z, y, x). `voxel_size_nm` and `chunk` (voxels) are in the order z, y,
    x. The volume's lower corner lies at 0 nm. `attributes` are added to the group's; `on_sections` is called with the
    number of sections stored so far. Raises SourceError, TargetError or UserError for a mistake of the user's.
    """
    if len(voxel_size_nm) != 3 or not all(math.isfinite(v) and v > 0 for v in voxel_size_nm):
        raise UserError(f"voxel size {list(voxel_size_nm)}", "three positive numbers in nm, in the order z y x")
    if chunk is not None and (len(chunk) != 3 or min(chunk) < 1):
        raise UserError(f"chunk {list(chunk)}", "three whole numbers of at least 1, in the order z y x")
    url = urls.normalise(str(target), Path.cwd())
    if urls.split_format(url)[0]:
        raise UserError(
            f"target {target} names a format", "a path or URL alone: the target is always OME-Zarr 0.5 (zarr v3)"
        )
    if not isinstance(source, Stack):
        source = Stack.of(source) if isinstance(source, np.ndarray) else open_stack(source)
    z, y, x = (float(v) for v in voxel_size_nm)
    write_stack(
        source, url, (z, y, x), chunk=ZYX.of(chunk) if chunk else None, attributes=attributes, on_sections=on_sections
    )
    return source


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, or 2 after a message on stderr about a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=start.program("convert"), description="TIFF or PNG sections into OME-Zarr 0.5."
    )
    parser.add_argument(
        "source", metavar="SOURCE", help="multi-page TIFF file, or folder with one TIFF or PNG file per section"
    )
    parser.add_argument("target", metavar="TARGET", help="folder (or s3://, gs:// URL) to make")
    parser.add_argument(
        "--voxel-size-nm", nargs=3, type=float, metavar=("Z", "Y", "X"), help="size of a voxel in nm; must be given"
    )
    parser.add_argument(
        "--chunk", nargs=3, type=int, metavar=("Z", "Y", "X"), help="chunk shape in voxels (default: 8 256 256)"
    )
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    if args.voxel_size_nm is None:
        raise UserError(
            "no voxel size",
            "the size of a voxel in nm",
            "Add --voxel-size-nm Z Y X, for example --voxel-size-nm 45 4 4",
        )
    stack = open_stack(args.source)
    chunk, _ = layer_shapes(stack.shape, ZYX.of(args.chunk) if args.chunk and min(args.chunk) > 0 else None)
    held = chunk.z * stack.shape.y * stack.shape.x * (2 if stack.dtype == "uint16" else 1)
    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    size = f"{counted(stack.shape.z, 'section')} of {stack.shape.y} x {stack.shape.x} {stack.dtype}"
    console.print(f"{size}, {chunk.z} ({held / 2**20:.0f} MiB) in memory at a time", markup=False)
    rule = "natural order: 2 before 10" if os.path.isdir(os.path.expanduser(args.source)) else "as in the file"
    console.print(f"order: {_shortened(stack.names)} ({rule})", markup=False)
    for remark in stack.remarks:
        console.print(f"note: {remark}", markup=False)
    columns = (TextColumn("sections"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task("sections", total=stack.shape.z)
            convert(
                stack,
                args.target,
                args.voxel_size_nm,
                args.chunk,
                on_sections=lambda done: progress.update(task, completed=done),
            )
    except SourceError as error:
        raise SourceError(
            error.saw,
            error.wanted,
            f"{error.do or 'Mend it'}. {args.target} is unfinished: remove it before the next try",
        ) from error
    console.print(
        f"written: {args.target} (OME-Zarr 0.5, voxel {' x '.join(f'{v:g}' for v in args.voxel_size_nm)} nm)",
        markup=False,
    )
    return 0


def _shortened(names: Sequence[str]) -> str:
    shown = names if len(names) <= 6 else (*names[:3], "...", *names[-2:])
    return ", ".join(shown)


if __name__ == "__main__":
    sys.exit(main())
