"""POD: pyramid optical-flow deformable alignment of the sections of a window with its centre (network.md, section 3,
steps 6 to 12).

Shapes: B windows of N sections, C = `width` channels, F = `flow_features` channels, LR size H x W. Level i has the size
H / 2^i x W / 2^i, written h_i x w_i below. Each window gives N pairs (neighbour, centre), the centre with itself among
them, so that maps of pairs have B * N rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import Params
from models.deformable import DeformableConv
from models.flow import SPyNet
from models.layers import bilinear, channels_last, conv3, joined, lrelu

LEVELS = 3


class Level(nn.Module):
    """Alignment at one size. Every level but the coarsest also takes the coarser level's result.

    The convolutions `guide1` to `guide3` compute the offset features: the map from which `deform` reads its offsets.
    """

    def __init__(self, params: Params, coarsest: bool) -> None:
        super().__init__()
        width = params.width
        self.guide1 = conv3(2 * width + 2 * params.flow_features + 2, width)
        self.guide2 = nn.Identity() if coarsest else conv3(2 * width, width)
        self.guide3 = conv3(width, width)
        self.deform = DeformableConv(width, params.offset_groups)
        self.merge = nn.Identity() if coarsest else conv3(2 * width, width)

    def forward(self, inputs: list[Tensor], coarser: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`inputs` are, at this level's size, the features of neighbour and centre (B * N, C, h_i, w_i), two flow
        features (B * N, F, h_i, w_i), and the images of neighbour and centre (B * N, 1, h_i, w_i). `coarser` is what
        the coarser level returned, its second map activated, both (B * N, C, h_i / 2, w_i / 2); None at the coarsest
        level.

        Returns offset features and aligned features before their activation, both (B * N, C, h_i, w_i).
        """
        guide = lrelu(self.guide1(joined(*inputs)))  # 2C + 2F + 2 -> C channels
        if coarser is None:
            guide = lrelu(self.guide3(guide))  # (B * N, C, h_i, w_i)
            return guide, self.deform(inputs[0], guide)
        # the coarser offsets, at this size, are twice as long in voxels: two (B * N, C, h_i, w_i) -> one
        guide = lrelu(self.guide2(joined(guide, bilinear(coarser[0], 2).mul_(2))))
        guide = lrelu(self.guide3(guide))  # (B * N, C, h_i, w_i)
        aligned = self.deform(inputs[0], guide)  # (B * N, C, h_i, w_i)
        return guide, self.merge(joined(aligned, bilinear(coarser[1], 2)))  # 2C -> C channels


class Cascade(nn.Module):
    """A last deformable alignment of the aligned features with the centre's, at LR size."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.guide1 = conv3(2 * params.width, params.width)
        self.guide2 = conv3(params.width, params.width)
        self.deform = DeformableConv(params.width, params.offset_groups)

    def forward(self, aligned: Tensor, centre: Tensor) -> Tensor:
        """Two (B * N, C, H, W) -> (B * N, C, H, W)."""
        guide = lrelu(self.guide1(joined(aligned, centre)))  # 2C -> C channels
        guide = lrelu(self.guide2(guide))  # (B * N, C, H, W)
        return lrelu(self.deform(aligned, guide))


class POD(nn.Module):
    """`pyramid` is computed once per section, `forward` once per window. `flow_down` are two chains of convolutions
    with weights of their own; both take the same flow.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        width, features = params.width, params.flow_features
        self.halve = nn.ModuleList(
            nn.Sequential(conv3(width, width, stride=2), conv3(width, width)) for _ in range(LEVELS - 1)
        )
        self.flow = SPyNet(params.flow_widths, params.flow_levels)
        self.flow_down = nn.ModuleList(
            nn.Sequential(
                conv3(2, features, stride=4), *(conv3(features, features, stride=2) for _ in range(LEVELS - 1))
            )
            for _ in range(2)
        )
        self.levels = nn.ModuleList(Level(params, coarsest=level == LEVELS - 1) for level in range(LEVELS))
        self.cascade = Cascade(params)

    def pyramid(self, features: Tensor) -> tuple[Tensor, ...]:
        """(B, C, H, W) -> the same, (B, C, H/2, W/2) and (B, C, H/4, W/4)."""
        pyramid = [features]
        for pair in self.halve:
            first, second = pair.children()
            pyramid.append(lrelu(second(lrelu(first(pyramid[-1])))))  # (B, C, h_i, w_i)
        return tuple(pyramid)

    def forward(self, sections: Tensor, pyramids: list[tuple[Tensor, ...]]) -> Tensor:
        """LR sections (B, N, 1, H, W) and their N pyramids of (B, C, h_i, w_i) -> features aligned with the centre's,
        (B, N, C, H, W). All pairs of all windows are one batch.
        """
        b, n = sections.shape[:2]
        centre = n // 2
        images = sections.flatten(0, 1)  # (B * N, 1, H, W)
        # per level i, features of the pairs' neighbours and centres: (B * N, C, h_i, w_i)
        neighbours = [channels_last(torch.stack(level, 1).flatten(0, 1)) for level in zip(*pyramids, strict=True)]
        centres = [level.repeat_interleave(n, 0) for level in pyramids[centre]]
        enlarged = bilinear(images, 4)  # (B * N, 1, 4H, 4W)
        # the flow (B * N, 2, 4H, 4W) becomes, per level i, two (B * N, F, h_i, w_i)
        flows = self.flow_features(self.flow(enlarged, _of_centre(enlarged, n)))
        # per level i (B * N, 1, h_i, w_i), in the type of the features with which they are concatenated
        halved = [images.to(neighbours[0].dtype)]
        for _ in range(LEVELS - 1):
            halved.append(bilinear(halved[-1], 0.5))
        coarser: tuple[Tensor, Tensor] | None = None
        for i in reversed(range(LEVELS)):
            inputs = [neighbours[i], centres[i], *flows[i], halved[i], _of_centre(halved[i], n)]
            guide, aligned = self.levels[i](inputs, coarser)  # two (B * N, C, h_i, w_i)
            coarser = guide, lrelu(aligned) if i else aligned
        return self.cascade(aligned, centres[0]).unflatten(0, (b, n))  # type: ignore[no-any-return]

    def flow_features(self, flow: Tensor) -> list[list[Tensor]]:
        """(B * N, 2, 4H, 4W) -> per level i two (B * N, F, h_i, w_i)."""
        levels: list[list[Tensor]] = []
        chains = [flow, flow]
        for i in range(LEVELS):
            chains = [chain[i](x) for chain, x in zip(self.flow_down, chains, strict=True)]  # type: ignore[index]
            levels.append(chains)
        return levels


def _of_centre(sections: Tensor, n: int) -> Tensor:
    """(B * N, ...) -> the same shape, with the centre of each window at all of its N places."""
    return sections[n // 2 :: n].repeat_interleave(n, 0)
