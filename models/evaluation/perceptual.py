"""LPIPS (Zhang et al., 2018) and DISTS (Ding et al., 2022) of grey or colour images. They are differentiable, so that
training can use LPIPS."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.evaluation import fetch
from models.weights_file import convolution, read_state

Layer = tuple[int, int, int]
"""A convolution's index in torchvision's `features`, its stride and its padding."""
ALEX: list[list[Layer]] = [[(0, 4, 2)], [(3, 1, 2)], [(6, 1, 1)], [(8, 1, 1)], [(10, 1, 1)]]
VGG16: list[list[Layer]] = [
    [(i, 1, 1) for i in block] for block in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
]
EPSILON = 1e-6
"""c1 and c2 of DISTS, added to numerators and divisors."""


class LPIPS(nn.Module):
    """The weighted squared distance of normalised features at five depths of a network; 0 for equal images.

    Images are (B, 1 or 3, H, W) in 0..1; a grey one stands for three equal channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor], blocks: list[list[Layer]]) -> None:
        super().__init__()
        self.pool = 3 if blocks is ALEX else 2
        self.pooled = (1, 2) if blocks is ALEX else (1, 2, 3, 4)
        self.blocks = nn.ModuleList(nn.ModuleList(_conv(state, *layer) for layer in block) for block in blocks)
        self.heads = nn.ParameterList(state[f"lin{i}.model.1.weight"] for i in range(len(blocks)))
        self.register_buffer("mean", torch.tensor((-0.030, -0.088, -0.188)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.458, 0.448, 0.450)).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of images -> their distances (B,)."""
        total = a.new_zeros(len(a))
        for x, y, head in zip(self._features(a), self._features(b), self.heads, strict=True):
            difference = (_unit(x) - _unit(y)).square()
            total = total + functional.conv2d(difference, head).mean((1, 2, 3))
        return total

    def _features(self, image: Tensor) -> list[Tensor]:
        x = (2 * image - 1 - self.mean) / self.std
        found = []
        for i, block in enumerate(self.blocks):
            if i in self.pooled:
                x = functional.max_pool2d(x, self.pool, 2)
            for conv in block:  # type: ignore[attr-defined]
                x = functional.relu(conv(x))
            found.append(x)
        return found


def lpips_alex(path: Path | None) -> LPIPS:
    """LPIPS with AlexNet. The file has `features.<n>.*` in torchvision's names and `lin<n>.model.1.weight`; without a
    path the weights are fetched (`fetch.lpips`). Raises WeightsError, OSError.
    """
    return LPIPS(read_state(path) if path else fetch.lpips("alex"), ALEX)


def lpips_vgg(path: Path | None) -> LPIPS:
    """LPIPS with VGG16; otherwise like `lpips_alex`."""
    return LPIPS(read_state(path) if path else fetch.lpips("vgg"), VGG16)


def _conv(state: dict[str, Tensor], index: int, stride: int, padding: int) -> nn.Conv2d:
    weight, bias = convolution(state, f"features.{index}")
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], int(weight.shape[2]), stride, padding)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv


def _unit(x: Tensor) -> Tensor:
    """Features (B, C, h, w) divided by their norm over channels."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


class DISTS(nn.Module):
    """1 minus the weighted similarity of structure and texture of the image and of features at five depths of VGG16; 0
    for equal images. VGG16's max pooling is replaced by L2 pooling with a Hann window.

    Images are (B, 1 or 3, H, W) in 0..1; a grey one stands for three equal channels.
    """

    mean: Tensor
    std: Tensor
    window: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(self, vgg: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList(_conv(vgg, *layer) for layer in block) for block in VGG16)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))
        hann = torch.tensor((0.5, 1.0, 0.5))
        self.register_buffer("window", (hann[:, None] * hann / hann.sum() ** 2).view(1, 1, 3, 3))
        total = weights["alpha"].sum() + weights["beta"].sum()
        self.register_buffer("alpha", weights["alpha"].flatten() / total)
        self.register_buffer("beta", weights["beta"].flatten() / total)
        self.requires_grad_(False)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Two batches of images -> their distances (B,)."""
        texture, structure = [], []
        for x, y in zip(self._features(a), self._features(b), strict=True):
            mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
            texture.append((2 * mean_x * mean_y + EPSILON) / (mean_x.square() + mean_y.square() + EPSILON))
            centred_x, centred_y = x - mean_x[:, :, None, None], y - mean_y[:, :, None, None]
            variances = centred_x.square().mean((2, 3)) + centred_y.square().mean((2, 3))
            structure.append((2 * (centred_x * centred_y).mean((2, 3)) + EPSILON) / (variances + EPSILON))
        return 1 - (self.alpha * torch.cat(texture, 1)).sum(1) - (self.beta * torch.cat(structure, 1)).sum(1)

    def _features(self, image: Tensor) -> list[Tensor]:
        image = image.expand(-1, 3, -1, -1)
        found, x = [image], (image - self.mean) / self.std
        for i, block in enumerate(self.blocks):
            if i:
                channels = x.shape[1]
                x = (
                    functional.conv2d(
                        x.square(), self.window.expand(channels, -1, -1, -1), stride=2, padding=1, groups=channels
                    )
                    + 1e-12
                ).sqrt()
            for conv in block:  # type: ignore[attr-defined]
                x = functional.relu(conv(x))
            found.append(x)
        return found


def dists(vgg: Path | None, weights: Path | None) -> DISTS:
    """DISTS from VGG16's file (such as `lpips_vgg` reads) and that of `alpha` and `beta`; without a path they are
    fetched.

    Raises WeightsError, OSError.
    """
    return DISTS(read_state(vgg) if vgg else fetch.vgg16(), read_state(weights) if weights else fetch.dists())
