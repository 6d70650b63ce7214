"""Reads the tensors of a file of weights, whoever wrote it. Pickled objects are never loaded."""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.metadata import WeightsError, read_header, refuse_other_content, written_by_emsr

WRAPPERS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "network", "net", "generator", "netG")
"""Keys under which training programs keep a network's tensors, those of averaged weights first."""
PREFIXES = ("module.", "model.", "network.", "net.", "generator.", "netG.")
"""What such programs put before the name of every tensor."""
COMPILED = "_orig_mod."
"""What torch.compile puts into the names of tensors."""
MAX_NAMES = 4
"""Names that one message lists; a file of another network has hundreds that do not fit."""
STATE_DICT = "Where it was made, save the tensors alone: torch.save(network.state_dict(), 'weights.pth')"


class State(dict[str, Tensor]):
    """Tensors by name, those of the file `path`. A tensor that is asked for and not there raises WeightsError."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise WeightsError(f"{self.path} has no tensor {name} (it has {listed(list(self))}). Name the file that has it")


def read_state(path: Path) -> State:
    """The tensors by name of a .safetensors file, or of a PyTorch file that has nothing but tensors.

    Dictionaries and prefixes around them are taken off. Raises WeightsError where the file is damaged, holds anything
    else, or numbers that are not finite; OSError.
    """
    refuse_other_content(path)
    found = _safetensors(path) if path.suffix == ".safetensors" else _pytorch(path)
    state = State(path, _without_prefixes(found))
    spoilt = [n for n, value in state.items() if value.is_floating_point() and not torch.isfinite(value.float()).all()]
    if spoilt:
        raise WeightsError(
            f"{path} holds numbers that are not finite, in {listed(spoilt)}. "
            "Copy the file again, or take weights of a training that did not fail"
        )
    return state


def convolution(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight (outputs, inputs, height, width) and bias (outputs) of the convolution `name` of a state from
    `read_state`. Raises WeightsError.
    """
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    if weight.ndim != 4 or bias.shape != weight.shape[:1]:
        of = getattr(state, "path", "this file of weights")
        raise WeightsError(
            f"{of}: {name} has a weight of {tuple(weight.shape)} and a bias of {tuple(bias.shape)}; "
            "wanted those of a convolution. Name the file of that network"
        )
    return weight, bias


def digest(state: dict[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values of all tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "") or "none"


def _safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file; those of a file that emsr wrote are compared with the digest in its head."""
    header = read_header(path)
    try:
        with safe_open(path, "pt") as file:
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {_sentence(error)}. Copy the file again") from None
    if written_by_emsr(header) and header.get("sha256") not in (None, digest(state)):
        raise WeightsError(
            f"{path}: its tensors are not those it was written with (sha256 differs). Copy the file again"
        )
    return state


def _pytorch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    if archive:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they advise to load pickled objects
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (RuntimeError, EOFError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {_sentence(error)}. Copy the file again") from None
    except Exception as error:  # pickle.UnpicklingError among others: a hostile file may raise anything
        kind = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickled object ({kind[1]})" if kind else "no PyTorch file, or more than tensors"
        raise WeightsError(
            f"{path} holds {what}. Pickles may run any program, so none is loaded. {STATE_DICT}"
        ) from None
    return _flat(path, found)


def _check_archive(path: Path) -> None:
    """Raises WeightsError where a zip archive is damaged, or is not one that torch.save wrote.

    The CRC-32 that stands with each record is compared, which torch does not do; 0 stands for one that was not counted.
    """
    try:
        with zipfile.ZipFile(path) as records:
            names = records.namelist()
            for record in records.infolist():
                if record.CRC:
                    with records.open(record) as file:
                        while file.read(1 << 20):
                            pass
    except OSError:
        raise
    except Exception as error:  # zipfile has a dozen errors for damage
        raise WeightsError(f"{path} is damaged or cut short ({_sentence(error)}). Copy the file again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise WeightsError(f"{path} is a TorchScript program, which is never run; wanted tensors. {STATE_DICT}")
    if not any(name.endswith("data.pkl") for name in names):
        raise WeightsError(
            f"{path} is a zip archive of other files ({listed(names)}). Unpack it, and name the file of weights"
        )


def _flat(path: Path, found: Any) -> dict[str, Tensor]:
    """The dictionary of tensors inside those that training programs wrap around it. Raises WeightsError."""
    for _ in WRAPPERS:
        inner = [found[key] for key in WRAPPERS if isinstance(found, dict) and isinstance(found.get(key), dict)]
        if not inner:
            break
        found = inner[0]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        what = f"a dictionary of {listed([str(key) for key in found])}" if isinstance(found, dict) else "no dictionary"
        raise WeightsError(f"{path} holds {what}; wanted tensors by name. {STATE_DICT}")
    return {str(name): value for name, value in found.items()}


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without what wrappers put into the names: before all of them, `module.` also before some."""
    state = {name.replace(COMPILED, "").removeprefix("module."): value for name, value in state.items()}
    while state and (common := [p for p in PREFIXES if all(name.startswith(p) for name in state)]):
        state = {name.removeprefix(common[0]): value for name, value in state.items()}
    return state


def _sentence(error: Exception) -> str:
    """What an error says first; torch's go on with advice for its own users."""
    return (str(error).splitlines() or [""])[0].partition(". ")[0].rstrip(".") or type(error).__name__
