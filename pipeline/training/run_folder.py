"""The folder that a training run writes to: one run at a time, with space enough, and messages where it cannot."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline.base.errors import UserError
from pipeline.training import checkpoint

LOCK = "lock"
KEPT = 3
"""Checkpoints that exist while one is written: itself, the one that it follows, and the one before that."""
FILES = (LOCK, checkpoint.NAME, checkpoint.BEFORE, checkpoint.UNFINISHED, "metrics.jsonl")
FOLDERS = ("tensorboard", "samples")
LAST = "last.safetensors"
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other runs out of it. The lock ends with the process, however that ends.

    Raises UserError where the folder cannot be written, or another run holds it.
    """
    _refuse_others(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by another training ({file.read().strip() or 'it does not say which'})",
                "one training per folder",
                "Wait for it or end it, or give another output",
            ) from None
        except OSError as error:
            print(
                f"emsr: {folder} cannot be locked ({error.strerror}): see that no other training writes there",
                file=sys.stderr,
            )
        with writing(folder):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            for left in folder.glob("*.unfinished"):  # by a run that was killed
                left.unlink()
        yield


def _refuse_others(folder: Path) -> None:
    """Raise UserError where something else stands at the name of a file or folder that a run writes."""
    files = {folder / name for name in FILES} | {*folder.glob("*.safetensors"), *folder.glob("*.unfinished")}
    others = [path for path in files if path.exists() and not path.is_file()]
    others += [path for path in (folder / name for name in FOLDERS) if path.exists() and not path.is_dir()]
    if others:
        kind = "a folder" if others[0].name in FOLDERS else "a file"
        raise UserError(
            f"{others[0]} is not {kind}", "what a training writes there", "Move it away, or give another output"
        )


def refuse_lost_checkpoint(folder: Path) -> None:
    """Raise UserError where an earlier run has left its weights in `folder`, and there is no checkpoint to go on from:
    a new one would write over them.
    """
    if (folder / LAST).exists():
        raise UserError(
            f"{folder} has {LAST} of an earlier training and no checkpoint to go on from",
            "both, or neither",
            f"Put {checkpoint.NAME} back, give another output, or move the weights away to begin anew",
        )


def check_space(folder: Path, checkpoint_bytes: int, weights_bytes: int) -> None:
    """Raise UserError where the folder has no space for the checkpoints and weights of a whole run.

    What is there of them is written again, and counts as free.
    """
    there = [checkpoint.NAME, checkpoint.BEFORE, *(path.name for path in folder.glob("*.safetensors"))]
    free = shutil.disk_usage(folder).free
    usable = free + sum((folder / name).stat().st_size for name in there if (folder / name).exists())
    needed = KEPT * checkpoint_bytes + weights_bytes
    if usable < needed:
        raise UserError(
            f"{folder}: no space for this training ({_size(free)} are free)",
            f"{_size(needed)}: {KEPT} checkpoints of {_size(checkpoint_bytes)} and {_size(weights_bytes)} of weights",
            "Free some space there, or give another output",
        )


@contextmanager
def writing(folder: Path, needed: int = 0) -> Iterator[None]:
    """Within the block, a failure to write becomes a UserError that names the folder, and how much is `needed`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        wanted = f"about {_size(needed)} for what was being written" if needed else ""
        if _is_one_of(error, *_FULL):
            raise UserError(
                f"{folder}: no space left ({_size(shutil.disk_usage(folder).free)} are free; {text})",
                wanted,
                "Free some space there, and the same command goes on from the last checkpoint",
            ) from None
        if _is_one_of(error, errno.EFBIG):
            raise UserError(
                f"{folder}: a file would be larger than this process may write ({text})",
                wanted,
                "Raise `ulimit -f`, and the same command goes on from the last checkpoint",
            ) from None
        raise UserError(
            f"{folder}: cannot be written ({text})", "a folder for what is trained", "Correct output or its permissions"
        ) from None


def _is_one_of(error: Exception, *numbers: int) -> bool:
    """Whether it tells of one of these errors of the system; safetensors tells them in words alone."""
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
