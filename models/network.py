"""The five-section network of "Learning Large-Factor EM Image Super-Resolution with Generative Priors" (CVPR 2024).

section --> LR features ------------------> MPF --> pyramid ==> state   encode_section, once per section
     \\---> indexer, codebook, decoder --/  /
      \\--------------------------> mask --/

five states --> POD --> 3DA --> Rec --> + enlarged centre --> SR        fuse_window, once per centre
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.ablation import WithoutMPF, WithoutPOD, WithoutThreeDA
from models.config import Params
from models.fusion import ThreeDA
from models.layers import Residual, bilinear, channels_last, conv3, lrelu, weights_channels_last
from models.mask import Mask
from models.mpf import MPF
from models.pod import POD
from models.reconstruct import Reconstruction
from models.reference import Prior


class SectionState(NamedTuple):
    """All that windows need of a section: 85 numbers per LR voxel (width 64)."""

    section: Tensor  # (B, 1, H, W)
    pyramid: tuple[Tensor, ...]  # (B, 64, H, W), (B, 64, H/2, W/2), (B, 64, H/4, W/4)


class LRFeatures(nn.Module):
    """(B, 1, H, W) -> F_LR at LR size, (B, C, H, W)."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.input = conv3(1, params.width)
        self.blocks = nn.Sequential(*(Residual(params.width) for _ in range(params.feature_blocks)))

    def forward(self, section: Tensor) -> Tensor:
        return self.blocks(lrelu(self.input(channels_last(section))))  # type: ignore[no-any-return]


class SuperResolver(nn.Module):
    """Stage III (paper, section 3.4) around the frozen prior of stages I and II. Weights are random until loaded."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        self.features = LRFeatures(params)
        if params.mpf:
            self.prior = Prior(params)
            self.mask = Mask(params)
            self.mpf = MPF(params)
        else:
            self.without_mpf = WithoutMPF(params)
        self.pod = POD(params) if params.pod else WithoutPOD(params)
        self.fusion = ThreeDA(params) if params.three_da else WithoutThreeDA(params)
        self.reconstruct = Reconstruction(params)
        for frozen in self.frozen():
            frozen.requires_grad_(False)
        weights_channels_last(self)

    def frozen(self) -> list[nn.Module]:
        """What stage III does not train: prior, mask features, optical flow."""
        prior = [self.prior, self.mask.features] if self.params.mpf else []
        return prior + ([self.pod.flow] if isinstance(self.pod, POD) else [])

    def encode_section(self, section: Tensor) -> SectionState:
        """(B, 1, H, W) in 0..1 -> all that later windows need of it. Raises ValueError where H or W do not fit."""
        return self._encode(section)[0]

    def fuse_window(self, states: list[SectionState]) -> Tensor:
        """The states of five consecutive sections -> the centre's SR, (B, 1, rH, rW), not clamped."""
        centre = states[len(states) // 2].section
        sections = torch.stack([state.section for state in states], 1)
        aligned = self.pod(sections, [state.pyramid for state in states])
        return bilinear(centre, self.params.scale).add_(
            self.reconstruct(self.fusion(aligned))
        )  # float32 also where autocast computes the rest

    def forward(self, window: Tensor, all_centres: bool = False, alone: bool = False) -> Any:
        """(B, 5, 1, H, W) in 0..1 -> (B, 1, rH, rW). With `all_centres` what `with_references` gives, for training."""
        sr, references = self.with_references(window, alone)
        return (sr, references) if all_centres else sr[:, 0]

    def with_references(self, sections: Tensor, alone: bool = False) -> tuple[Tensor, Tensor]:
        """(B, N, 1, H, W), N >= 5 -> SR of the N - 4 centres, (B, N - 4, 1, rH, rW), and I_Ref of all N, for the loss of eq. 8.

        `alone` fills every window with its centre: what the neighbours are worth is the difference.
        """
        b, n = sections.shape[:2]
        centres = n - self.params.window + 1
        state, references = self._encode(sections.flatten(0, 1))
        states = []
        for i in [self.params.window // 2] * self.params.window if alone else range(self.params.window):
            parts = [
                part.reshape(b, n, *part.shape[1:])[:, i : i + centres].flatten(0, 1)
                for part in (state.section, *state.pyramid)
            ]
            states.append(SectionState(parts[0], tuple(channels_last(level) for level in parts[1:])))
        sr = self.fuse_window(states)
        return sr.reshape(b, centres, *sr.shape[1:]), references.reshape(b, n, *references.shape[1:])

    def _encode(self, section: Tensor) -> tuple[SectionState, Tensor]:
        multiple = self.params.multiple
        if section.shape[-2] % multiple or section.shape[-1] % multiple:
            raise ValueError(
                f"a section of {section.shape[-2]} x {section.shape[-1]} voxels: height and width must be multiples of {multiple}"
            )
        features = self.features(section)
        if not self.params.mpf:
            return SectionState(section, self.pod.pyramid(self.without_mpf(features))), section
        reference = self.prior(section)  # eq. 3
        mask = self.mask(section, reference.image)
        fused = self.mpf(features, reference.features, mask)  # eq. 4
        return SectionState(section, self.pod.pyramid(fused)), reference.image
