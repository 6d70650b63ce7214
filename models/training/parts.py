"""Weights of one stage that a later stage needs, as safetensors files whose metadata describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models import weights
from models.config import X8, Params, from_json, to_json
from models.metadata import WeightsError
from models.network import SuperResolver

FORMAT = "emsr-part-1"
VQGAN, INDEXER, FLOW = "vqgan", "indexer", "flow"


@dataclass(frozen=True)
class Part:
    """The weights of one trained part of the network.

    `kind` is vqgan, indexer or flow, `params` are those of the network it was trained for, `licence` is that of the
    training data, and `state` has the tensors by name. `facts` may hold anything that JSON can: scores, recipe, earlier
    parts.
    """

    kind: str
    params: Params
    licence: str
    state: dict[str, Tensor]
    facts: Mapping[str, Any]


def save_part(path: Path, part: Part) -> None:
    """Write a part, as `load_part` reads it. Raises OSError."""
    state = {name: value.detach().cpu().contiguous() for name, value in part.state.items()}
    header = {
        "format": FORMAT,
        "kind": part.kind,
        "params": to_json(part.params),
        "training_data_licence": part.licence,
        "facts": json.dumps(dict(part.facts), sort_keys=True),
    }
    save_file(state, path, metadata=header)


def load_part(path: Path, kind: str) -> Part:
    """Read what `save_part` wrote. Raises WeightsError where the file is missing, not a part, or of another kind."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except FileNotFoundError:
        raise WeightsError(f"{path} is not there. Train stage {kind} first, or correct the path") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights ({error}). Name a file that `emsr train` wrote") from None
    if header.get("format") != FORMAT or header.get("kind") != kind:
        raise WeightsError(
            f"{path} holds {header.get('kind', 'other weights')}; wanted {kind}. "
            f"Name the file that the {kind} stage wrote"
        )
    return Part(kind, from_json(header["params"]), header["training_data_licence"], state, json.loads(header["facts"]))


def load_flow(path: Path, params: Params) -> Part:
    """The optical flow that stage flow wrote, or SPyNet as published in any layout that `weights.read_spynet` reads.

    Raises WeightsError, OSError.
    """
    if not path.exists() or _is_ours(path):
        return load_part(path, FLOW)
    if params.flow_widths != X8.flow_widths:
        raise WeightsError(
            f"{path} is no file of stage flow, and SPyNet as published fits preset paper only. "
            "Train stage flow, or use preset paper"
        )
    return Part(FLOW, params, "", weights.read_spynet(path), {})


def _is_ours(path: Path) -> bool:
    """Whether `load_part` is to read the file: it is a part, or cannot be read."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError):
        return True  # load_part raises with the reason


def fill(network: nn.Module, part: Part, path: Path) -> None:
    """Copy a part's tensors into `network`. Raises WeightsError where names or shapes differ, as with another
    preset.
    """
    wanted = network.state_dict()
    wrong = [
        n
        for n in wanted.keys() | part.state.keys()
        if n not in wanted or n not in part.state or wanted[n].shape != part.state[n].shape
    ]
    if wrong:
        raise WeightsError(
            f"{path} does not fit this network ({len(wrong)} tensors, such as {min(wrong)}). "
            "Use the same preset and scale in all stages"
        )
    network.load_state_dict(part.state)


def assemble(
    network: SuperResolver, vqgan: Part | None, indexer: Part | None, flow: Part | None, paths: Mapping[str, Path]
) -> None:
    """Copy the frozen parts into the network of stage III: codebook, decoder and mask features from `vqgan`, the
    indexer and the optical flow. `paths` are their files by kind, for messages. Raises WeightsError where one does not
    fit.
    """
    if vqgan is not None and network.params.mpf:
        for module, prefix in ((network.prior.codebook, "codebook."), (network.prior.decoder, "decoder.")):
            fill(module, _below(vqgan, prefix), paths[VQGAN])
        if network.params.mask == "encoder":
            first = {"encoder.input.": "input.", "encoder.body.0.": "block."}
            state = {
                new + n[len(old) :]: v
                for old, new in first.items()
                for n, v in vqgan.state.items()
                if n.startswith(old)
            }
            fill(network.mask.features, Part(VQGAN, vqgan.params, vqgan.licence, state, {}), paths[VQGAN])
    if indexer is not None and network.params.mpf:
        fill(network.prior.indexer, indexer, paths[INDEXER])
    if flow is not None and network.params.pod:
        fill(network.pod.flow, flow, paths[FLOW])  # type: ignore[arg-type]


def start_from(network: SuperResolver, state: dict[str, Tensor]) -> int:
    """Copy from `state` the trained tensors whose name and shape fit, for instance of a network of the other scale, and
    return their number. The frozen parts are left as they are.
    """
    frozen = {id(p) for part in network.frozen() for p in part.state_dict(keep_vars=True).values()}
    taken = 0
    with torch.no_grad():
        for name, value in network.state_dict(keep_vars=True).items():
            if id(value) not in frozen and name in state and state[name].shape == value.shape:
                value.copy_(state[name])
                taken += 1
    return taken


def _below(part: Part, prefix: str) -> Part:
    """The tensors of a part whose names begin with `prefix`, without it."""
    state = {name[len(prefix) :]: value for name, value in part.state.items() if name.startswith(prefix)}
    return Part(part.kind, part.params, part.licence, state, part.facts)
