"""The metadata of a weights file, read from its header without torch, so that a plan can check it before a network is
built."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.config import Params, from_json, to_json

FORMAT = "emsr-weights-1"
MAX_HEAD_BYTES = 100_000_000
"""As safetensors itself bounds it."""
LFS_POINTER = b"version https://git-lfs"
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml")


class WeightsError(ValueError):
    """A file or dictionary of weights that cannot be used. The message says what was seen, what was wanted, what to
    do.
    """


@dataclass(frozen=True)
class Metadata:
    """What a weights file says about its weights: the network's parameters, the name of their preset or "", the licence
    of the training data, the digest of the stored tensors (`weights.digest`), and the card, a text about how they were
    made.
    """

    params: Params
    preset: str
    licence: str
    sha256: str
    card: str = ""

    @property
    def scale(self) -> int:
        return self.params.scale

    def to_header(self) -> dict[str, str]:
        """The same as texts by name, which is all that the metadata of a safetensors file can hold."""
        return {
            "format": FORMAT,
            "params": to_json(self.params),
            "scale": str(self.scale),
            "preset": self.preset,
            "training_data_licence": self.licence,
            "sha256": self.sha256,
            "card": self.card,
        }


def refuse_other_content(path: Path) -> None:
    """Raises WeightsError for a folder, an empty file, and what stands for a file that was not fetched; OSError."""
    if path.is_dir():
        raise WeightsError(f"{path} is a folder. Name the file of weights in it")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes). Copy the file again")
    if head.startswith(LFS_POINTER):
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the weights it stands for. Run `git lfs pull` there, or fetch them"
        )
    if head.lstrip().lower().startswith(WEB_PAGES):
        raise WeightsError(f"{path} is a web page, not weights. Fetch the file that the page offers")


def read_header(path: Path) -> dict[str, str]:
    """The metadata in the head of a safetensors file, 8 bytes of length, then JSON; empty where it has none. Raises
    WeightsError, OSError.
    """
    refuse_other_content(path)
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if size > MAX_HEAD_BYTES:
            raise WeightsError(
                f"{path} is no safetensors file: its head would have {size:,} bytes, at most {MAX_HEAD_BYTES:,} are "
                "read. Copy the file again, or name one by the ending of its format"
            )
        if not 0 < size <= path.stat().st_size - 8:
            raise WeightsError(
                f"{path} is no safetensors file: its head is cut or of another format. "
                "Copy the file again, or name one by the ending of its format"
            )
        text = file.read(size)
    try:
        return dict(json.loads(text).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f"{path} is no safetensors file: its head is not JSON. "
            "Copy the file again, or name one by the ending of its format"
        ) from None


def written_by_emsr(header: Mapping[str, str]) -> bool:
    """Whether emsr wrote the file of this metadata: weights of a network, or of one of its parts."""
    return str(header.get("format")).startswith("emsr-")


def is_ours(path: Path) -> bool:
    """Whether emsr wrote this file of weights. Raises WeightsError, OSError."""
    return path.suffix == ".safetensors" and written_by_emsr(read_header(path))


def read_metadata(path: Path) -> Metadata:
    """What a file of weights that emsr wrote says about them. Raises WeightsError, OSError."""
    header = read_header(path)
    if "kind" in header and written_by_emsr(header):
        raise WeightsError(
            f"{path} holds what stage {header['kind']} trained, a part of the network. "
            "Name the file that stage network wrote"
        )
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{path} says format {header.get('format')!r}; wanted {FORMAT!r}. Name a file that emsr wrote"
        )
    try:
        params = from_json(header["params"])
        return Metadata(
            params, header["preset"], header["training_data_licence"], header["sha256"], header.get("card", "")
        )
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path}: its metadata does not describe a network ({error}). Write the file again with this version"
        ) from None
