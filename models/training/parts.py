"""Weights of one stage that a later stage needs, as safetensors files whose metadata describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import published, weights
from models.config import X8, Params, from_json, preset_name, to_json
from models.metadata import FORMAT as WHOLE
from models.metadata import WeightsError, read_header, written_by_emsr
from models.network import SuperResolver
from models.weights_file import digest, read_state

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
        "sha256": digest(state),
    }
    save_file(state, path, metadata=header)


def load_part(path: Path, kind: str) -> Part:
    """Read what `save_part` wrote. Raises WeightsError where the file is missing, not a part, or of another kind."""
    try:
        header = read_header(path)
    except FileNotFoundError:
        raise WeightsError(f"{path} is not there. Train stage {kind} first, or correct the path") from None
    if header.get("format") != FORMAT or header.get("kind") != kind:
        held = "a whole network" if header.get("format") == WHOLE else header.get("kind", "other weights")
        raise WeightsError(f"{path} holds {held}; wanted {kind}. Name the file that the {kind} stage wrote")
    state = read_state(path)
    try:
        params, facts = from_json(header["params"]), json.loads(header["facts"])
        return Part(kind, params, header["training_data_licence"], state, facts)
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(f"{path}: its metadata does not describe a part ({error}). Copy the file again") from None


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
    """Whether `load_part` is to read the file, which emsr wrote then."""
    return path.suffix == ".safetensors" and written_by_emsr(read_header(path))


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
            f"{path}, of scale {part.params.scale}, preset {preset_name(part.params) or 'custom'}, does not fit this "
            f"network ({len(wrong)} tensors, such as {min(wrong)}). Use the same preset and scale in all stages"
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


def start_from(network: SuperResolver, state: dict[str, Tensor]) -> tuple[int, int]:
    """Copy from `state` the trained tensors whose name and shape fit, for instance of a network of the other scale, and
    return their number and that of all trained tensors. Names may be the authors'. The frozen parts are left as they
    are.
    """
    state = {published.ours(name, network): value for name, value in state.items()}
    frozen = {id(p) for part in network.frozen() for p in part.state_dict(keep_vars=True).values()}
    trained = {n: value for n, value in network.state_dict(keep_vars=True).items() if id(value) not in frozen}
    fitting = [name for name in trained if name in state and state[name].shape == trained[name].shape]
    with torch.no_grad():
        for name in fitting:
            trained[name].copy_(state[name])
    return len(fitting), len(trained)


def _below(part: Part, prefix: str) -> Part:
    """The tensors of a part whose names begin with `prefix`, without it."""
    state = {name[len(prefix) :]: value for name, value in part.state.items() if name.startswith(prefix)}
    return Part(part.kind, part.params, part.licence, state, part.facts)
