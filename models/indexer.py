"""Stage II: the latent vector indexer W, which predicts codes from an LR section (paper, section 3.3)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from models.config import PriorParams
from models.layers import NormResidual, SelfAttention, Up, channels_last, conv3, pointwise, weights_channels_last


class Indexer(nn.Module):
    """(B, 1, H, W) LR section -> (B, v, rH/p, rW/p) logits, Z_w of eq. 3."""

    def __init__(self, params: PriorParams, scale: int) -> None:
        super().__init__()
        first, second, third, last = params.indexer_widths
        groups = params.norm_groups
        self.input = conv3(1, first)
        body: list[nn.Module] = [NormResidual(first, first, groups) for _ in range(3)]
        halvings = (params.patch // scale).bit_length() - 1
        for place, (inputs, outputs) in enumerate(((first, second), (second, third), (third, last))):
            body.append(_widen(inputs, outputs, groups, place, halvings))
            if outputs != last:
                body.append(NormResidual(outputs, outputs, groups))
        self.body = nn.Sequential(*body, SelfAttention(last, groups))
        self.head = nn.Sequential(*(NormResidual(last, last, groups) for _ in range(3)))
        self.project = pointwise(last, params.code_width)
        self.logits = nn.Linear(params.code_width, params.codes)
        weights_channels_last(self)

    def forward(self, section: Tensor) -> Tensor:
        """LR section in 0..1 -> logits of the v codes for every token."""
        x = functional.relu_(self.input(channels_last(section)))
        x = self.project(self.head(self.body(x)))
        return self.logits(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def _widen(inputs: int, outputs: int, groups: int, place: int, halvings: int) -> nn.Module:
    """Block `place`, 0 to 2, of those with more outputs than inputs. The last `halvings` of them halve the size, or
    with -1 the last one doubles it, so that the output has one position per token.
    """
    if place >= 3 - halvings:
        return conv3(inputs, outputs, stride=2)
    if place == 2 and halvings < 0:
        return Up(inputs, outputs)
    return NormResidual(inputs, outputs, groups)
