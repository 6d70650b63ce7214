"""The parameters that define a network, and presets of them, as frozen values. Importing this does not import torch."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

VGG19 = "vgg19"
ENCODER = "encoder"
PRIOR_WIDTHS = (64, 64, 128, 256, 512, 512, 512)
"""Channels of the VQGAN at 1, 1/2, 1/4, ... of the HR size; a compression patch p uses the first log2(p) + 1 of
them.
"""


@dataclass(frozen=True)
class PriorParams:
    """Parameters of VQGAN and indexer (paper, sections 3.2 and 3.3).

    `widths` are the VQGAN's channels at HR size, 1/2, 1/4, ...; `indexer_widths` those of the indexer's blocks. `codes`
    and `code_width` are v and d of the paper's table 4. `norm_groups` is the number of groups of the group
    normalisation.
    """

    widths: tuple[int, ...]
    indexer_widths: tuple[int, int, int, int]
    codes: int
    code_width: int
    norm_groups: int

    @property
    def patch(self) -> int:
        """The compression patch p: HR voxels along one side of a code."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True)
class Params:
    """Parameters of the five-section network. Raises ValueError where they contradict each other.

    `width` is the number of channels at LR size. `mask` names the features that the mask compares, `vgg19` or
    `encoder`. `flow_widths` and `flow_levels` are SPyNet's, `flow_features` the channels of POD's flow features,
    `offset_groups` the groups of its deformable convolutions. `feature_blocks` and `trunk_blocks` count residual blocks
    before MPF and after 3DA. `mpf`, `pod` and `three_da` are the switches of the paper's table 5: a module that is off
    is replaced by residual blocks with about as many parameters.
    """

    scale: int
    width: int
    prior: PriorParams
    mask: str
    flow_widths: tuple[int, int, int, int]
    flow_levels: int = 6
    flow_features: int = 16
    offset_groups: int = 8
    feature_blocks: int = 5
    trunk_blocks: int = 10
    window: int = 5
    mpf: bool = True
    pod: bool = True
    three_da: bool = True

    def __post_init__(self) -> None:
        if self.scale not in (4, 8, 16):
            raise ValueError(f"scale {self.scale}: use 4, 8 or 16")
        if self.mask not in (VGG19, ENCODER):
            raise ValueError(f"mask features {self.mask!r}: use {VGG19!r} or {ENCODER!r}")
        if not self.scale // 2 <= self.prior.patch <= 8 * self.scale:
            raise ValueError(
                f"compression patch {self.prior.patch} at scale {self.scale}: use {self.scale // 2} to {8 * self.scale}"
            )
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window}: an odd number of sections has a centre")

    @property
    def multiple(self) -> int:
        """H and W of a section must be multiples of this: POD halves them twice and a code covers p / scale LR
        voxels.
        """
        return max(4, self.prior.patch // self.scale)


def with_patch(params: Params, patch: int) -> Params:
    """The same network with a compression patch of 8, 16, 32 or 64 HR voxels: the ablation of the paper's table 3."""
    widths = PRIOR_WIDTHS[: patch.bit_length()]
    if params.prior.widths[0] != PRIOR_WIDTHS[0]:
        full = params.prior.widths
        widths = (full + (full[-1],) * len(PRIOR_WIDTHS))[: patch.bit_length()]
    return dataclasses.replace(params, prior=dataclasses.replace(params.prior, widths=widths))


def with_codebook(params: Params, codes: int, code_width: int) -> Params:
    """The same parameters with a codebook of `codes` rows of `code_width` numbers (paper, table 4)."""
    return dataclasses.replace(params, prior=dataclasses.replace(params.prior, codes=codes, code_width=code_width))


PRIOR = PriorParams(
    widths=PRIOR_WIDTHS[:5], indexer_widths=(64, 128, 256, 512), codes=1024, code_width=512, norm_groups=32
)
X8 = Params(scale=8, width=64, prior=PRIOR, mask=VGG19, flow_widths=(32, 64, 32, 16))
X16 = dataclasses.replace(X8, scale=16)

SMALL_PRIOR = PriorParams(
    widths=(16, 16, 32, 64, 128), indexer_widths=(32, 64, 96, 128), codes=512, code_width=128, norm_groups=8
)
X8_SMALL = Params(scale=8, width=32, prior=SMALL_PRIOR, mask=ENCODER, flow_widths=(8, 16, 16, 8), feature_blocks=3)
X16_SMALL = dataclasses.replace(X8_SMALL, scale=16)

PRESETS: dict[tuple[int, str], Params] = {
    (8, "paper"): X8,
    (16, "paper"): X16,
    (8, "small"): X8_SMALL,
    (16, "small"): X16_SMALL,
}


def preset(scale: int, name: str) -> Params:
    """The parameters of a preset. Raises ValueError with a list of all presets."""
    if (scale, name) not in PRESETS:
        raise ValueError(f"no preset {name} at scale {scale}; there are {', '.join(f'{n} (x{s})' for s, n in PRESETS)}")
    return PRESETS[scale, name]


def preset_name(params: Params) -> str | None:
    """The name of the preset that `params` equal, or None."""
    return next((name for (_, name), known in PRESETS.items() if known == params), None)


def to_json(params: Params) -> str:
    """One line of JSON with sorted keys, so that equal parameters give equal text."""
    return json.dumps(dataclasses.asdict(params), sort_keys=True)


def from_json(text: str) -> Params:
    """The parameters that `to_json` wrote. Raises ValueError for any other text."""
    try:
        body = json.loads(text)
        prior = PriorParams(**_tuples(body.pop("prior")))
        return Params(prior=prior, **_tuples(body))
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"not the parameters of a network: {error}") from None


def _tuples(body: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in body.items()}
