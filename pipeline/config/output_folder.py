"""The output folder of `train` and `evaluate`, looked at before any work: what cannot take files there is refused."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.config.urls import local_path


def check_output(output: Path, volumes: Iterable[str]) -> None:
    """Raise UserError where `output` cannot be a folder that takes files, or lies in one of `volumes`, which are
    normalised URLs. Nothing is made.
    """
    real = Path(os.path.realpath(output))
    for url in volumes:
        path = local_path(url)
        if path is not None and real.is_relative_to(os.path.realpath(path)):
            raise UserError(f"output {output} lies in the volume {url}", "a folder of its own", "Choose another output")
    there = next(folder for folder in (real, *real.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"output {output}: {there} is a file", "a folder", "Choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output {output}: {there} takes no files (its rights, or a read-only file system)",
            "a folder that can be written",
            "Choose another output",
        )
