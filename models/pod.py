"""POD: pyramid optical-flow deformable alignment of every section of a window with the centre (network.md, section 3, steps 6-12)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.config import Params
from models.deformable import DeformableConv
from models.flow import SPyNet
from models.layers import bilinear, conv3, lrelu

LEVELS = 3


class Level(nn.Module):
    """Alignment at one size; every level but the coarsest takes the coarser one's guide and result."""

    def __init__(self, params: Params, coarsest: bool) -> None:
        super().__init__()
        width = params.width
        self.guide1 = conv3(2 * width + 2 * params.flow_features + 2, width)
        self.guide2 = nn.Identity() if coarsest else conv3(2 * width, width)
        self.guide3 = conv3(width, width)
        self.deform = DeformableConv(width, params.offset_groups)
        self.merge = nn.Identity() if coarsest else conv3(2 * width, width)

    def forward(self, evidence: list[Tensor], coarser: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`evidence` is neighbour, centre, two flow features and the two images at this size -> guide, aligned (not activated)."""
        guide = lrelu(self.guide1(torch.cat(evidence, 1)))
        if coarser is None:
            guide = lrelu(self.guide3(guide))
            return guide, self.deform(evidence[0], guide)
        guide = lrelu(self.guide2(torch.cat([guide, bilinear(coarser[0], 2).mul_(2)], 1)))
        guide = lrelu(self.guide3(guide))
        aligned = self.deform(evidence[0], guide)
        return guide, self.merge(torch.cat([aligned, bilinear(coarser[1], 2)], 1))


class Cascade(nn.Module):
    """A last alignment of the aligned section."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.guide1 = conv3(2 * params.width, params.width)
        self.guide2 = conv3(params.width, params.width)
        self.deform = DeformableConv(params.width, params.offset_groups)

    def forward(self, aligned: Tensor, centre: Tensor) -> Tensor:
        guide = lrelu(self.guide2(lrelu(self.guide1(torch.cat([aligned, centre], 1)))))
        return lrelu(self.deform(aligned, guide))


class POD(nn.Module):
    """`pyramid` belongs to a section, `forward` to a window. `flow_down` are two chains of their own on the same flow."""

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
        """(B, C, H, W) -> the same and its halves, (B, C, H/2, W/2) and (B, C, H/4, W/4)."""
        pyramid = [features]
        for pair in self.halve:
            first, second = pair.children()
            pyramid.append(lrelu(second(lrelu(first(pyramid[-1])))))
        return tuple(pyramid)

    def forward(self, sections: Tensor, pyramids: list[tuple[Tensor, ...]]) -> Tensor:
        """LR sections (B, N, 1, H, W) and their N pyramids -> features aligned with the centre's, (B, N, C, H, W).

        All N pairs of a centre, its own among them, are one batch.
        """
        b, n = sections.shape[:2]
        centre = n // 2
        images = sections.flatten(0, 1)
        near = [torch.stack(level, 1).flatten(0, 1) for level in zip(*pyramids, strict=True)]
        far = [level.repeat_interleave(n, 0) for level in pyramids[centre]]
        enlarged = bilinear(images, 4)
        flows = self.flow_features(self.flow(enlarged, _of_centre(enlarged, n)))
        shrunk = [images]
        for _ in range(LEVELS - 1):
            shrunk.append(bilinear(shrunk[-1], 0.5))
        coarser: tuple[Tensor, Tensor] | None = None
        for i in reversed(range(LEVELS)):
            guide, aligned = self.levels[i]([near[i], far[i], *flows[i], shrunk[i], _of_centre(shrunk[i], n)], coarser)
            coarser = guide, lrelu(aligned) if i else aligned
        return self.cascade(aligned, far[0]).unflatten(0, (b, n))  # type: ignore[no-any-return]

    def flow_features(self, flow: Tensor) -> list[list[Tensor]]:
        """(B, 2, 4H, 4W) -> per level two (B, 16, ., .)."""
        levels: list[list[Tensor]] = []
        chains = [flow, flow]
        for i in range(LEVELS):
            chains = [chain[i](x) for chain, x in zip(self.flow_down, chains, strict=True)]  # type: ignore[index]
            levels.append(chains)
        return levels


def _of_centre(sections: Tensor, n: int) -> Tensor:
    """(B * N, ...) -> the centre of each N, N times over."""
    return sections[n // 2 :: n].repeat_interleave(n, 0)
