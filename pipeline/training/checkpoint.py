"""The checkpoint of a training run: written whole or not at all, checked when read, with the one before beside it."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from models.training.loop import State
from pipeline.base.errors import UserError

NAME, BEFORE, UNFINISHED = "checkpoint.pt", "checkpoint-before.pt", "checkpoint.unfinished"


def write(folder: Path, state: State) -> None:
    """Make `state` the folder's checkpoint; the one that was is kept as BEFORE. Raises OSError, and then both stay.

    A process that is killed meanwhile leaves a checkpoint or the one before.
    """
    unfinished = folder / UNFINISHED
    try:
        with unfinished.open("wb") as file:
            _save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if (folder / NAME).exists():
            os.replace(folder / NAME, folder / BEFORE)
        os.replace(unfinished, folder / NAME)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(folder)


def read(folder: Path, device: torch.device) -> tuple[State | None, list[str]]:
    """The newest readable checkpoint, None where there is none, and a line about each that is damaged.

    Raises UserError where all of them are damaged.
    """
    complaints: list[str] = []
    for path in (folder / NAME, folder / BEFORE):
        if not os.path.lexists(path):  # a link that leads nowhere is a checkpoint that is lost
            continue
        try:
            state = _load(path, device)
        except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            complaints.append(f"{path} is damaged ({why})")
        else:
            return state, complaints
    if complaints:
        raise UserError(
            " and ".join(complaints),
            "a checkpoint as it was written",
            f"Copy it again, or empty {folder} to begin anew",
        )
    return None, []


def _save(state: State, file: BinaryIO) -> None:
    """torch.save, which reports a failed write as a RuntimeError about its own positions. Raises OSError."""
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _load(path: Path, device: torch.device) -> State:
    """The state in `path`, once the CRC-32 that stands with each of its records has been compared: torch does not."""
    with zipfile.ZipFile(path) as records:
        if (damaged := records.testzip()) is not None:
            raise ValueError(f"the CRC-32 of {damaged} differs")
    state: State = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(state, dict) or "step" not in state:
        raise ValueError("it is no checkpoint")
    return state


def _sync(folder: Path) -> None:
    """Make the renames in `folder` durable."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
