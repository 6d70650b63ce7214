"""SPyNet: coarse-to-fine optical flow between two sections (Ranjan and Black, 2017; network.md, section 3, step 7)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import Narrow, channels_last

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SPyNet(nn.Module):
    """Optical flow from `first` to `second`. Normalising a grey image with ImageNet's means and standard deviations of
    three channels makes it the three-channel image that the network takes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, widths: tuple[int, int, int, int], levels: int) -> None:
        super().__init__()
        channels = (8, *widths, 2)
        self.levels = nn.ModuleList()
        for _ in range(levels):
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(channels[:-1]):
                layers += [nn.Conv2d(inputs, outputs, 7, 1, 3), nn.ReLU(inplace=True)]
            self.levels.append(nn.Sequential(*layers, Narrow(channels[-2], channels[-1], 7)))
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two (B, 1, H, W) in 0..1 -> the flow (B, 2, H, W), x then y, in voxels: first(x) = second(x + flow(x)).

        Images whose sides are no multiples of 32 are resized to the next ones, and the flow back.
        """
        height, width = first.shape[-2:]
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        flow = resize(
            self._flow(self._pyramid(resize(first, padded)), self._pyramid(resize(second, padded))), (height, width)
        )
        if padded == (height, width):
            return flow  # every tile of the pipeline: nothing here makes a GPU wait for the host
        shrink = torch.tensor((width / padded[1], height / padded[0]), dtype=flow.dtype, device=flow.device)
        return flow * shrink.view(1, 2, 1, 1)

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """(B, 1, H, W) -> the image at every level's size, coarsest first, each side half that of the next."""
        pyramid = [image]
        for _ in self.levels[1:]:
            pyramid.insert(0, functional.avg_pool2d(pyramid[0], 2))
        return pyramid

    def _flow(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        b, _, h, w = first[0].shape
        flow = first[0].new_zeros(b, 2, h, w)
        for level, one, other in zip(self.levels, first, second, strict=True):
            if flow.shape[-2:] != one.shape[-2:]:
                flow = 2 * functional.interpolate(flow, size=one.shape[-2:], mode="bilinear", align_corners=True)
            images = [(image - self.mean) / self.std for image in (one, warp(other, flow))]  # two (B, 3, h, w)
            flow = flow + level(channels_last(torch.cat([*images, flow], 1)))  # (B, 8, h, w) -> (B, 2, h, w)
        return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` (B, C, H, W) sampled bilinearly at (x + flow_x, y + flow_y) of `flow` (B, 2, H, W); positions outside
    take the nearest border voxel.
    """
    _, _, h, w = image.shape
    y, x = torch.meshgrid(
        torch.arange(h, device=flow.device, dtype=flow.dtype),
        torch.arange(w, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    grid = torch.stack([2 * (x + flow[:, 0]) / max(w - 1, 1) - 1, 2 * (y + flow[:, 1]) / max(h - 1, 1) - 1], -1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resizing of (B, C, H, W) to `size`, with half-pixel centres."""
    return (
        image
        if tuple(image.shape[-2:]) == size
        else functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
    )
