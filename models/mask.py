"""The mask M, which weights the reference's features by how well it agrees with the enlarged LR section (paper, figure
1 d)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.config import VGG19, Params, PriorParams
from models.layers import NormResidual, bilinear, channels_last, conv3, in_bands, in_type_of, lrelu

PATCH = 16
"""Side in HR voxels of the patches whose features are compared."""
EPSILON = 1e-12
"""Least norm of a patch's features."""


class VGGFeatures(nn.Module):
    """VGG19 (Simonyan and Zisserman, 2015) to relu1_2. A grey image stands for three equal channels, so the first
    convolution takes one, with the sum of its weights over channels.
    """

    width = 64
    local = True

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv3(3, self.width)
        self.conv2 = conv3(self.width, self.width)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1 -> (B, 64, H, W)."""
        weight = channels_last(self.conv1.weight.sum(1, keepdim=True))
        image = in_type_of(weight, channels_last(image))
        x = functional.relu_(functional.conv2d(image, weight, self.conv1.bias, padding=1))
        return functional.relu_(self.conv2(x))


class EncoderFeatures(nn.Module):
    """The layers of the VQGAN's encoder at HR size, for presets without VGG19."""

    local = False  # group norm looks at the whole image

    def __init__(self, params: PriorParams) -> None:
        super().__init__()
        self.width = params.widths[0]
        self.input = conv3(1, self.width)
        self.block = NormResidual(self.width, self.width, params.norm_groups)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1 -> (B, C, H, W)."""
        return self.block(functional.relu_(self.input(channels_last(image))))  # type: ignore[no-any-return]


class Mask(nn.Module):
    """Computes the mask M (paper, figure 1 d).

    It is the cosine similarity of the features of reference and enlarged LR section, in patches of 16 x 16 HR voxels,
    turned into weights by three convolutions.
    """

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.scale = params.scale
        self.features = VGGFeatures() if params.mask == VGG19 else EncoderFeatures(params.prior)
        self.refine = nn.Sequential(conv3(1, params.width), conv3(params.width, params.width), conv3(params.width, 1))

    def forward(self, section: Tensor, reference: Tensor) -> Tensor:
        """LR section (B, 1, H, W) and I_Ref (B, 1, rH, rW) -> M (B, 1, rH/16, rW/16) in 0..1."""
        x = self.cosine(section, reference)
        for conv in self.refine:
            x = lrelu(conv(channels_last(x)))
        return torch.sigmoid(x)

    def cosine(self, section: Tensor, reference: Tensor) -> Tensor:
        """The cosine similarity CS of the paper: LR section (B, 1, H, W) and I_Ref (B, 1, rH, rW) -> (B, 1, rH/16,
        rW/16).

        The dot product and norms of patches are computed as sums over positions, without a vector of 16,384 numbers per
        patch.
        """
        images = (bilinear(section, self.scale), reference)
        products = (
            in_bands(self._products, *images, halo=2, peak=self.features.width)
            if self.features.local
            else self._products(*images)
        )
        dot, a, b = functional.avg_pool2d(products, PATCH).mul(PATCH * PATCH).chunk(3, 1)
        return dot / (a.sqrt().clamp_min(EPSILON) * b.sqrt().clamp_min(EPSILON))

    def _products(self, image: Tensor, reference: Tensor) -> Tensor:
        """Two images (B, 1, rH, rW) with features a and b -> (B, 3, rH, rW): the sums over channels of a * b, a * a and
        b * b.
        """
        a, b = self.features(image), self.features(reference)
        return torch.stack([(a * b).sum(1), a.square_().sum(1), b.square_().sum(1)], 1)
