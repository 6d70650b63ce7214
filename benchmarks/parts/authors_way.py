"""A stand-in for the published inference (network.md, sections 2, 3 and 6), one window at a time.

emsr is compared with it; it is not the authors' module. For every centre all five sections are encoded again, the flow
of each pair is computed twice, VGG19 is run through relu5_4 although only relu1_2 is read, and patches are laid out as
vectors. The layout is contiguous and the operators are PyTorch's own. It was written from that description over the
weights of our modules; layers that nobody reads have random weights.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import deform_conv2d

from models.flow import resize, warp
from models.network import SuperResolver

PATCH = 16
VGG19 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool", 512, 512, 512, 512)
READ = 2
"""Convolutions of VGG19 whose output is read."""


class AuthorsWay:
    """The network of preset paper, x8 or x16, with the weights of `network`."""

    def __init__(self, network: SuperResolver) -> None:
        self.scale = network.params.scale
        self.net: Any = copy.deepcopy(network)
        for parameter in self.net.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        first = self.net.mask.features
        self.vgg = nn.ModuleList([first.conv1, first.conv2])
        for inputs, outputs in itertools.pairwise([width for width in VGG19 if width != "pool"][READ - 1 :]):
            self.vgg.append(nn.Conv2d(int(inputs), int(outputs), 3, 1, 1))

    @torch.no_grad()
    def __call__(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 5, 1, H, W) in 0..1 -> the centre's SR (1, 1, rH, rW), not clamped, and the indices of the five."""
        sections = window[0]
        fused, indices = self._encode(sections)
        pyramid = [fused]
        for pair in self.net.pod.halve:
            pyramid.append(lrelu(conv(pair[1], lrelu(conv(pair[0], pyramid[-1], stride=2)))))
        centre = len(sections) // 2
        aligned = [
            self._align(sections[[i]], sections[[centre]], [p[[i]] for p in pyramid], [p[[centre]] for p in pyramid])
            for i in range(len(sections))
        ]
        base = functional.interpolate(sections[[centre]], scale_factor=self.scale, mode="bilinear", align_corners=False)
        return self._reconstruct(self._attend(torch.stack(aligned, 1))) + base, indices

    def _encode(self, sections: Tensor) -> tuple[Tensor, Tensor]:
        features = lrelu(conv(self.net.features.input, sections))
        for block in self.net.features.blocks:
            features = residual(block, features)
        pyramid = [features]
        for up in self.net.mpf.up:
            pyramid.append(lrelu(enlarge(up, pyramid[-1])))
        logits = self._logits(sections)
        indices = torch.softmax(logits, 1).topk(1, 1).indices[:, 0]
        image, reference = self._decode(self.net.prior.codebook.weight[indices].permute(0, 3, 1, 2).contiguous())
        mask = self._mask(sections, image)
        return self._fuse(pyramid, reference, mask), indices

    def _logits(self, x: Tensor) -> Tensor:
        indexer = self.net.prior.indexer
        x = functional.relu(conv(indexer.input, x))
        for layer in [*indexer.body, *indexer.head]:
            x = self._layer(layer, x)
        x = conv(indexer.project, x)
        return functional.linear(x.permute(0, 2, 3, 1), indexer.logits.weight, indexer.logits.bias).permute(0, 3, 1, 2)

    def _layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Applies one of the prior's layers, whose kind is known by its parts."""
        if isinstance(layer, nn.Conv2d):
            return conv(layer, x, stride=2)
        return norm_residual(layer, x) if hasattr(layer, "conv1") else attention(layer, x)

    def _decode(self, latent: Tensor) -> tuple[Tensor, list[Tensor]]:
        """I_Ref and F_Ref, finest first."""
        decoder = self.net.prior.decoder
        x = conv(decoder.project, latent)
        for block in decoder.head:
            x = norm_residual(block, x)
        x = attention(decoder.attention, x)
        features: list[Tensor] = []
        for block, up in zip(decoder.blocks, decoder.ups, strict=True):
            features.insert(0, norm_residual(block, x))
            x = enlarge(up, features[0])
        return conv(decoder.output, x), features

    def _vgg(self, image: Tensor) -> Tensor:
        """relu1_2 of VGG19. All of VGG19 is run."""
        x, convolutions, read = image.repeat(1, 3, 1, 1), iter(self.vgg), image
        for i, width in enumerate(VGG19):
            x = functional.max_pool2d(x, 2) if width == "pool" else functional.relu(conv(next(convolutions), x))
            read = x if i + 1 == READ else read
        return read

    def _mask(self, sections: Tensor, reference: Tensor) -> Tensor:
        enlarged = functional.interpolate(sections, scale_factor=self.scale, mode="bilinear", align_corners=False)
        patches = []
        for features in (self._vgg(reference), self._vgg(enlarged)):
            padded = functional.pad(features, (0, 0, 0, 0), mode="reflect")  # nothing is missing, and yet it copies
            patches.append(functional.normalize(functional.unfold(padded, PATCH, stride=PATCH), dim=1))
        x = (patches[0] * patches[1]).sum(1).view(len(sections), 1, reference.shape[2] // PATCH, -1)
        for refine in self.net.mask.refine:
            x = lrelu(conv(refine, x))
        return torch.sigmoid(x)

    def _fuse(self, pyramid: list[Tensor], reference: list[Tensor], mask: Tensor) -> Tensor:
        """Fuses the features. `pyramid` is coarsest first; all but its LR level are removed from it."""
        mpf, features, above = self.net.mpf, pyramid[0], list[Tensor]()
        for level, fuse in enumerate(mpf.fuse):
            x = residual(fuse.block, conv(fuse.conv, torch.cat([pyramid.pop(), reference[level], *above], 1)))
            weight = 8 / 2**level
            x = x * (
                mask
                if weight == 1
                else functional.interpolate(mask, scale_factor=weight, mode="bilinear", align_corners=False)
            )
            if level < len(mpf.down):
                above = [conv(mpf.down[level], torch.cat([x, *above], 1), stride=2)]
        return conv(mpf.reduce, torch.cat([x, *above, features], 1))

    def _flow(self, first: Tensor, second: Tensor) -> Tensor:
        """SPyNet's flow from `first` to `second`, both enlarged four times."""
        spynet = self.net.pod.flow
        images = [
            functional.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False) for x in (first, second)
        ]
        h, w = images[0].shape[2:]
        size = (-(-h // 32) * 32, -(-w // 32) * 32)
        pyramids = [[(resize(x, size) - spynet.mean) / spynet.std] for x in images]
        for pyramid in pyramids:
            for _ in spynet.levels[1:]:
                pyramid.insert(0, functional.avg_pool2d(pyramid[0], 2))
        flow = torch.zeros(1, 2, *pyramids[0][0].shape[2:])
        for level, near, far in zip(spynet.levels, *pyramids, strict=True):
            if flow.shape[2:] != near.shape[2:]:
                flow = 2 * functional.interpolate(flow, size=near.shape[2:], mode="bilinear", align_corners=True)
            x = torch.cat([near, warp(far, flow), flow], 1)
            for layer in level:
                x = (
                    functional.relu(x)
                    if isinstance(layer, nn.ReLU)
                    else functional.conv2d(x, layer.weight, layer.bias, padding=3)
                )
            flow = flow + x
        return resize(flow, (h, w)) * torch.tensor([w / size[1], h / size[0]]).view(1, 2, 1, 1)

    def _align(self, image: Tensor, centre_image: Tensor, near: list[Tensor], far: list[Tensor]) -> Tensor:
        """Aligns one section of a window with the centre."""
        pod = self.net.pod
        chains = [self._flow(image, centre_image) for _ in range(2)]
        flows, images = [], [[image, centre_image]]
        for i in range(len(near)):
            chains = [conv(chain[i], x, stride=2 if i else 4) for chain, x in zip(pod.flow_down, chains, strict=True)]
            flows.append(chains)
        for _ in near[1:]:
            images.append(
                [functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False) for x in images[-1]]
            )
        guide = aligned = image
        for i in reversed(range(len(near))):
            level, coarsest = pod.levels[i], i == len(near) - 1
            offsets = lrelu(conv(level.guide1, torch.cat([near[i], far[i], *flows[i], *images[i]], 1)))
            if not coarsest:
                offsets = lrelu(conv(level.guide2, torch.cat([offsets, 2 * twice(guide)], 1)))
            guide = lrelu(conv(level.guide3, offsets))
            moved = deform(level.deform, near[i], guide)
            if not coarsest:
                moved = conv(level.merge, torch.cat([moved, twice(aligned)], 1))
            aligned = lrelu(moved) if i else moved
        cascade = pod.cascade
        guide = lrelu(conv(cascade.guide2, lrelu(conv(cascade.guide1, torch.cat([aligned, far[0]], 1)))))
        return lrelu(deform(cascade.deform, aligned, guide))

    def _attend(self, aligned: Tensor) -> Tensor:
        """3DA: (1, 5, C, H, W) -> (1, C, H, W)."""
        da, n = self.net.fusion, aligned.shape[1]
        query = conv(da.query, aligned[:, n // 2])
        weighted = torch.stack(
            [
                aligned[:, i] * torch.sigmoid((query * conv(da.key, aligned[:, i])).sum(1, keepdim=True))
                for i in range(n)
            ],
            1,
        )
        flat = weighted.flatten(1, 2)
        mixed = [
            lrelu(conv(m.reduce, lrelu(functional.conv3d(weighted, m.mix.weight, m.mix.bias)).flatten(1, 2)))
            for m in (da.mix1, da.mix2)
        ]
        fused = lrelu(conv(da.fuse, flat)) + mixed[0]
        s = da.spatial
        a = lrelu(conv(s.conv2, pools(lrelu(conv(s.conv1, flat)))))
        low = lrelu(conv(s.low3, lrelu(conv(s.low2, pools(lrelu(conv(s.low1, a)))))))
        a = lrelu(conv(s.conv3, a)) + twice(low)
        gate = conv(s.conv5, twice(lrelu(conv(s.conv4, a))))
        added = conv(s.add2, lrelu(conv(s.add1, gate)))
        return 2 * fused * torch.sigmoid(gate) + added + mixed[1] + conv(da.refine, fused)

    def _reconstruct(self, x: Tensor) -> Tensor:
        rec = self.net.reconstruct
        for block in rec.trunk:
            x = residual(block, x)
        for up in rec.up:
            x = lrelu(functional.pixel_shuffle(conv(up, x), 2))
        return conv(rec.last, lrelu(conv(rec.hr, x)))


def conv(layer: Any, x: Tensor, stride: int = 1) -> Tensor:
    return functional.conv2d(x, layer.weight, layer.bias, stride, layer.weight.shape[-1] // 2)


def enlarge(layer: Any, x: Tensor) -> Tensor:
    return functional.conv_transpose2d(x, layer.weight, layer.bias, 2, 1, 1)


def lrelu(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.1)


def twice(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def pools(x: Tensor) -> Tensor:
    return torch.cat([functional.max_pool2d(x, 3, 2, 1), functional.avg_pool2d(x, 3, 2, 1)], 1)


def norm(layer: Any, x: Tensor) -> Tensor:
    return functional.group_norm(x, layer.num_groups, layer.weight, layer.bias, 1e-6)


def residual(block: Any, x: Tensor) -> Tensor:
    return x + conv(block.conv2, functional.relu(conv(block.conv1, x)))


def norm_residual(block: Any, x: Tensor) -> Tensor:
    y = functional.relu(norm(block.norm1, conv(block.conv1, x)))
    y = functional.relu(norm(block.norm2, conv(block.conv2, y)))
    return y + (x if isinstance(block.skip, nn.Identity) else conv(block.skip, x))


def attention(block: Any, x: Tensor) -> Tensor:
    """Attention with all scores at once, as a matrix."""
    b, c, h, w = x.shape
    y = norm(block.norm, x)
    q, k, v = (conv(layer, y).view(b, c, h * w) for layer in (block.q, block.k, block.v))
    scores = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * c**-0.5, 2)
    return x + conv(block.project, torch.bmm(v, scores.permute(0, 2, 1)).view(b, c, h, w))


def deform(layer: Any, x: Tensor, guide: Tensor) -> Tensor:
    y, x_, mask = conv(layer.offsets, guide).chunk(3, 1)
    return deform_conv2d(x, torch.cat([y, x_], 1), layer.weight, layer.bias, padding=1, mask=torch.sigmoid(mask))
