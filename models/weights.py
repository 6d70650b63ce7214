"""Writes a network's weights, and fills networks from files: emsr's own, the authors', VGG19 and SPyNet."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import published, torch7
from models.config import preset_name
from models.flow import MEAN, STD
from models.identify import identify
from models.mask import VGGFeatures
from models.metadata import Metadata, WeightsError, read_metadata
from models.network import SuperResolver
from models.weights_file import digest, listed, read_state

State = dict[str, Tensor]


def save(path: Path, network: SuperResolver, licence: str, card: str = "", half: bool = False) -> Metadata:
    """Write all weights, with those of prior, mask features and flow, and return the file's metadata.

    `licence` is that of the training data, `card` a text about the weights. `half` stores float16, which `load`
    converts back to float32. Raises OSError.
    """
    state = {
        name: value.detach().cpu().to(torch.float16 if half else torch.float32).contiguous()
        for name, value in network.state_dict().items()
    }
    metadata = Metadata(network.params, preset_name(network.params) or "", licence, digest(state), card)
    save_file(state, path, metadata=metadata.to_header())
    return metadata


def load(path: Path, network: SuperResolver) -> Metadata:
    """Read what `save` wrote into a network of the same parameters. Raises WeightsError, OSError."""
    metadata = read_metadata(path)
    if metadata.params != network.params:
        raise WeightsError(
            f"{path} holds x{metadata.scale} {metadata.preset or 'custom'} weights; "
            f"the network is x{network.params.scale} {preset_name(network.params) or 'custom'}. "
            "Set network.scale and network.preset to the file's"
        )
    _fill(network, read_state(path), str(path))
    return metadata


def load_published(network: nn.Module, state: State, source: str = "published weights") -> None:
    """Copy the authors' dictionary into `network`: that of stage III into a SuperResolver, of stage I into a VQGAN, of
    stage II into an Indexer. Tensors that their network never reads may be missing. `source` is what messages call it.

    Raises WeightsError, which names the network that the weights are of, or else the tensors that are missing, unknown
    or of another shape.
    """
    theirs = {published.ours(name, network): name for name in state if not published.unused(name, network)}
    for name, expected in (("mean", MEAN), ("std", STD)):
        if (key := theirs.pop(f"align_module.spynet.{name}", None)) and not torch.allclose(
            state[key].flatten(), torch.tensor(expected), atol=1e-3
        ):
            raise WeightsError(
                f"{key} is {state[key].flatten().tolist()}; wanted ImageNet's {expected}. "
                "This is a checkpoint of another network"
            )
    try:
        _fill(network, {mine: state[name] for mine, name in theirs.items()}, source, theirs)
    except WeightsError:
        if isinstance(network, SuperResolver) and (known := identify(state, network.params)):
            raise WeightsError(f"{source} holds {known}") from None
        raise


def load_vgg19(network: SuperResolver, state: State) -> None:
    """Copy the first two convolutions of torchvision's VGG19 into the mask: `features.0` and `features.2`, or the same
    names without the prefix. Raises WeightsError.
    """
    features = network.mask.features if network.params.mpf else None
    if not isinstance(features, VGGFeatures):
        raise WeightsError(
            "this network's mask does not use VGG19 features. Remove the VGG19 weights, or choose preset paper"
        )
    names = {0: "conv1", 2: "conv2"}
    wanted = {
        f"{mine}.{kind}": _either(state, f"features.{i}.{kind}", f"{i}.{kind}")
        for i, mine in names.items()
        for kind in ("weight", "bias")
    }
    _fill(features, {mine: state[name] for mine, name in wanted.items()}, "VGG19 weights", wanted)


def read_spynet(path: Path) -> State:
    """SPyNet's weights in our names, such as `levels.0.0.weight`.

    The file has the names of BasicSR (`basic_module.0.basic_module.0.weight`) or of pytorch-spynet (`moduleBasic`,
    `netBasic`), or is one of the original .t7 files. Raises WeightsError, OSError.
    """
    if path.is_dir() or path.suffix == ".t7":
        return torch7.read_spynet(path)
    return {_of_spynet(name): value for name, value in read_state(path).items() if name not in ("mean", "std")}


def _of_spynet(name: str) -> str:
    """Our name of a parameter of SPyNet in BasicSR or pytorch-spynet."""
    part = r"(?:basic_module|moduleBasic|netBasic)"
    return re.sub(rf"^(?:spynet\.)?{part}\.(\d+)\.{part}\.", r"levels.\1.", name)


def _either(state: State, *names: str) -> str:
    """The first of `names` that is in `state`. Raises WeightsError where none is."""
    found = [name for name in names if name in state]
    if not found:
        raise WeightsError(f"VGG19 weights: no {' or '.join(names)}. Use torchvision's vgg19 state dict")
    return found[0]


def _fill(network: nn.Module, state: State, source: str, names: dict[str, str] | None = None) -> None:
    """Copy `state` into all tensors of `network`. `names` are the file's own names by ours, for messages. Raises
    WeightsError.
    """
    wanted = network.state_dict()
    shown = names or {}
    complaints = {
        "missing": [name for name in wanted if name not in state],
        "of another shape": [
            f"{shown.get(n, n)} is {tuple(state[n].shape)}, wanted {tuple(wanted[n].shape)}"
            for n in wanted
            if n in state and state[n].shape != wanted[n].shape
        ],
        "not of this network": [shown.get(name, name) for name in state if name not in wanted],
        "no floating numbers": [shown.get(n, n) for n in wanted if n in state and not state[n].is_floating_point()],
    }
    if any(complaints.values()):
        lines = [f"{len(names)} {what}: {listed(names)}" for what, names in complaints.items() if names]
        raise WeightsError(
            f"{source}: the weights do not fit the network. {'; '.join(lines)}. Use the file of this scale and preset"
        )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(state[name])
