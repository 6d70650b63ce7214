"""The metadata of a weights file, read from its header without torch, so that a plan can check it before a network is
built."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from models.config import Params, from_json, to_json

FORMAT = "emsr-weights-1"
MAX_HEAD_BYTES = 100_000_000
"""As safetensors itself bounds it."""


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


def read_metadata(path: Path) -> Metadata:
    """Read the metadata from the header of a safetensors file: 8 bytes of length, then JSON. Raises WeightsError,
    OSError.
    """
    with path.open("rb") as file:
        head = file.read(8)
        size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if size > MAX_HEAD_BYTES:
            raise WeightsError(
                f"{path} is no safetensors file: its head would have {size:,} bytes, at most {MAX_HEAD_BYTES:,} are "
                "read. Name a .safetensors file that emsr wrote"
            )
        if not 0 < size <= path.stat().st_size - 8:
            raise WeightsError(
                f"{path} is no safetensors file: its head is cut or of another format. "
                "Name a .safetensors file that emsr wrote"
            )
        text = file.read(size)
    try:
        header = dict(json.loads(text).get("__metadata__", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise WeightsError(
            f"{path} is no safetensors file: its head is not JSON. Name a .safetensors file that emsr wrote"
        ) from None
    if header.get("format") != FORMAT:
        raise WeightsError(
            f"{path} says format {header.get('format')!r}; wanted {FORMAT!r}. "
            "Name a file that emsr wrote, or convert this one"
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
