"""Says which network a file of weights is of, by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models import published
from models.config import PRESETS, Params
from models.indexer import Indexer
from models.network import SuperResolver
from models.vqgan import VQGAN

BESIDE = ("align_module.spynet.mean", "align_module.spynet.std")
"""Tensors of the authors' files that are no parameters."""


def identify(state: Mapping[str, Tensor], wanted: Params) -> str:
    """What the weights are of and what to do, as two sentences; empty where they are of no network that is known, or of
    the one of `wanted`.
    """
    shapes = {name: value.shape for name, value in state.items() if name not in BESIDE}
    for network, what in _known(wanted):
        theirs = {published.ours(n, network): s for n, s in shapes.items() if not published.unused(n, network)}
        if theirs == {name: value.shape for name, value in network.state_dict().items()}:
            return what
    return ""


def _known(wanted: Params) -> Iterator[tuple[nn.Module, str]]:
    """Every preset's network but `wanted`, and its parts, without numbers, and what `identify` says of them."""
    for scale, preset in PRESETS:
        params = PRESETS[scale, preset]
        with torch.device("meta"):
            network = SuperResolver(params)
            parts = {
                "stage I (VQGAN) alone": VQGAN(params.prior),
                "stage II (indexer) alone": Indexer(params.prior, scale),
            }
        if params != wanted:
            yield network, f"weights of scale {scale}, preset {preset}. Set network.scale and network.preset to these"
        for what, part in parts.items():
            yield part, f"weights of {what}. Name those of stage III, the whole network"
