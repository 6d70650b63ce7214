"""SPyNet: coarse-to-fine optical flow between two sections (network.md, section 3, step 7)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import Narrow, channels_last

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SPyNet(nn.Module):
    """Flow from `first` to `second`; a grey image is shown as three channels by ImageNet's means and deviations."""

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
        """Two (B, 1, H, W) -> (B, 2, H, W), x then y, in voxels of H and W."""
        height, width = first.shape[-2:]
        padded = (-(-height // 32) * 32, -(-width // 32) * 32)
        flow = resize(
            self._flow(self._pyramid(resize(first, padded)), self._pyramid(resize(second, padded))), (height, width)
        )
        shrink = torch.tensor((width / padded[1], height / padded[0]), dtype=flow.dtype, device=flow.device)
        return flow * shrink.view(1, 2, 1, 1)

    def _pyramid(self, image: Tensor) -> list[Tensor]:
        """Grey, coarsest first."""
        pyramid = [image]
        for _ in self.levels[1:]:
            pyramid.insert(0, functional.avg_pool2d(pyramid[0], 2))
        return pyramid

    def _flow(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        b, _, h, w = first[0].shape
        flow = first[0].new_zeros(b, 2, h, w)
        for level, near, far in zip(self.levels, first, second, strict=True):
            if flow.shape[-2:] != near.shape[-2:]:
                flow = 2 * functional.interpolate(flow, size=near.shape[-2:], mode="bilinear", align_corners=True)
            images = [(image - self.mean) / self.std for image in (near, warp(far, flow))]
            flow = flow + level(channels_last(torch.cat([*images, flow], 1)))
        return flow


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """`image` (B, C, H, W) read at x + flow_x, y + flow_y; outside, the border's value."""
    _, _, h, w = image.shape
    y, x = torch.meshgrid(
        torch.arange(h, device=flow.device, dtype=flow.dtype),
        torch.arange(w, device=flow.device, dtype=flow.dtype),
        indexing="ij",
    )
    grid = torch.stack([2 * (x + flow[:, 0]) / max(w - 1, 1) - 1, 2 * (y + flow[:, 1]) / max(h - 1, 1) - 1], -1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return (
        image
        if tuple(image.shape[-2:]) == size
        else functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
    )
