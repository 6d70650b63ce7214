"""Reads SPyNet's original files (anuragranj/spynet): for each level one Torch7 file, such as `modelL1_F.t7`, with a
network of five convolutions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.metadata import WeightsError

LEVELS = 6
"""Levels of SPyNet."""
_NAME = re.compile(r"modelL(\d)(.*)\.t7")
_CONVOLUTIONS = (b"SpatialConvolution", b"SpatialConvolutionMM")
_CONTAINERS = (b"Sequential", b"DataParallelTable")


def read_spynet(path: Path) -> dict[str, Tensor]:
    """The weights of all levels, `levels.<0..5>.<0, 2, 4, 6, 8>.{weight, bias}`, level 0 being the coarsest.

    `path` is a folder with one set of files, or one file of the set. A set of five files (those trained on Flying
    Chairs) gives its fifth twice, as spynet.lua does. Raises WeightsError, OSError.
    """
    files = _set_of(path)
    state: dict[str, Tensor] = {}
    for level in range(LEVELS):
        for i, (weight, bias) in enumerate(_level(files[min(level, len(files) - 1)])):
            state |= {f"levels.{level}.{2 * i}.weight": weight, f"levels.{level}.{2 * i}.bias": bias}
    return state


def _set_of(path: Path) -> list[Path]:
    """The files of the set that `path` names, coarsest level first. Raises WeightsError where there is no single
    set.
    """
    named = None if path.is_dir() else _NAME.fullmatch(path.name)
    sets: dict[str, dict[int, Path]] = {}
    for file in sorted(path.iterdir() if path.is_dir() else path.parent.iterdir()):
        if (found := _NAME.fullmatch(file.name)) and (named is None or found[2] == named[2]):
            sets.setdefault(found[2], {})[int(found[1])] = file
    if not path.is_dir() and named is None:
        raise WeightsError(
            f"{path.name} is no file of SPyNet's. Name one such as modelL1_F.t7, with the other levels beside it"
        )
    if len(sets) > 1:
        first = ", ".join(str(levels[min(levels)].name) for levels in sets.values())
        raise WeightsError(
            f"{path} holds {len(sets)} sets of SPyNet's files. Name one file of the set that is meant: {first}"
        )
    levels = next(iter(sets.values()), {})
    if list(levels) not in ([*range(1, LEVELS)], [*range(1, LEVELS + 1)]):
        raise WeightsError(
            f"{path} has SPyNet's levels {[*levels] or 'none'}; wanted 1 to 6, or 1 to 5. "
            "Put modelL1 to modelL6 there, as .t7"
        )
    return list(levels.values())


def _level(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weight (outputs, inputs, 7, 7) and bias of each convolution in a file. Raises WeightsError, OSError."""
    try:
        import torchfile
    except ImportError:
        raise WeightsError(
            f"{path.name} is a Torch7 file, and the torchfile package is not installed. pip install 'emsr[train]'"
        ) from None
    for kind in (b"torch.FloatTensor", b"torch.DoubleTensor", b"torch.CudaTensor"):
        torchfile.register_handler(kind)(_tensor)
    try:
        found = [(c[b"weight"].float(), c[b"bias"].float()) for c in _convolutions(torchfile.load(str(path)), path)]
        return [(weight.reshape(len(bias), -1, 7, 7), bias) for weight, bias in found]  # stored flat or with four axes
    except (WeightsError, OSError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise WeightsError(
            f"{path} cannot be read as a Torch7 file ({type(error).__name__}: {error}). Copy it again"
        ) from None


def _tensor(reader: Any, version: bytes) -> Tensor:
    """Reads one tensor in place of torchfile's own reader. Where the storage of a tensor is cut, that one would read
    the memory behind it; torch raises.
    """
    axes = reader.read_int()
    shape, strides = reader.read_long_array(axes), reader.read_long_array(axes)
    start = reader.read_long() - 1
    storage = reader.read_obj()
    return torch.empty(0) if storage is None else torch.from_numpy(storage).as_strided(shape, strides, start)


def _convolutions(module: Any, path: Path) -> Iterator[Any]:
    """The convolutions of a Torch7 network in their order. Raises WeightsError for layers that SPyNet does not have."""
    name = module.torch_typename()
    kind = name.rpartition(b".")[2]
    if kind in _CONVOLUTIONS:
        yield module
    elif kind in _CONTAINERS:
        inner = module[b"modules"]
        for child in inner[:1] if kind == b"DataParallelTable" else inner:  # the others there are copies
            yield from _convolutions(child, path)
    elif kind != b"ReLU":
        raise WeightsError(
            f"{path} holds a {name.decode(errors='replace')}; wanted convolutions and ReLU. "
            "This is no level of SPyNet's"
        )
