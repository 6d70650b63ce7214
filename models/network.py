"""The five-section network of "Learning Large-Factor EM Image Super-Resolution with Generative Priors" (CVPR 2024).

Shapes: B sections or windows, N sections of a window, C = `width` channels, LR size H x W, scale r.

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
from models.layers import Residual, bilinear, channels_last, conv3, lrelu, weights_channels_last, within
from models.mask import Mask
from models.mpf import MPF
from models.pod import POD
from models.reconstruct import Reconstruction
from models.reference import Prior


class SectionState(NamedTuple):
    """What windows need of a section: 85 numbers per LR voxel where C is 64."""

    section: Tensor  # (B, 1, H, W)
    pyramid: tuple[Tensor, ...]  # (B, C, H, W), (B, C, H/2, W/2), (B, C, H/4, W/4)


class LRFeatures(nn.Module):
    """The convolutions that give F_LR at LR size."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.input = conv3(1, params.width)
        self.blocks = nn.Sequential(*(Residual(params.width) for _ in range(params.feature_blocks)))

    def forward(self, section: Tensor) -> Tensor:
        """LR section (B, 1, H, W) in 0..1 -> F_LR (B, C, H, W)."""
        return self.blocks(lrelu(self.input(channels_last(section))))  # type: ignore[no-any-return]


class SuperResolver(nn.Module):
    """The network of stage III (paper, section 3.4), with the frozen prior of stages I and II. Its weights are random
    until others are loaded.
    """

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
        """The modules that stage III does not train: prior, mask features, optical flow."""
        prior = [self.prior, self.mask.features] if self.params.mpf else []
        return prior + ([self.pod.flow] if isinstance(self.pod, POD) else [])

    def encode_section(self, section: Tensor) -> SectionState:
        """LR section (B, 1, H, W) in 0..1 -> what later windows need of it.

        Raises ValueError where H or W is no multiple of `params.multiple`.
        """
        return self._encode(section)[0]

    def fuse_window(self, states: list[SectionState], cut: int = 0) -> Tensor:
        """The states of N consecutive sections -> SR of the centre section, not clamped and always float32, without
        what `cut` LR voxels on each side become: (B, 1, r(H - 2 cut), r(W - 2 cut)).
        """
        centre = states[len(states) // 2].section
        sections = torch.stack([state.section for state in states], 1)  # (B, N, 1, H, W)
        aligned = self.pod(sections, [state.pyramid for state in states])  # (B, N, C, H, W)
        scale = self.params.scale
        return within(bilinear(centre, scale), cut * scale).add_(self.reconstruct(self.fusion(aligned), cut))

    def forward(self, window: Tensor, all_centres: bool = False, alone: bool = False) -> Any:
        """Window (B, N, 1, H, W) in 0..1 -> SR of its centre, (B, 1, rH, rW). With `all_centres`, for training, any
        number of consecutive sections -> what `with_references` gives.
        """
        sr, references = self.with_references(window, alone)
        return (sr, references) if all_centres else sr[:, 0]

    def with_references(self, sections: Tensor, alone: bool = False) -> tuple[Tensor, Tensor]:
        """S >= N consecutive sections (B, S, 1, H, W) -> SR of the S - N + 1 that are centres of windows,
        (B, S - N + 1, 1, rH, rW), and I_Ref of all S, (B, S, 1, rH, rW), for the loss of eq. 8.

        `alone` fills every window with its centre, to measure what the neighbouring sections contribute.
        """
        b, count = sections.shape[:2]
        centres = count - self.params.window + 1
        state, references = self._encode(sections.flatten(0, 1))
        states = []
        for i in [self.params.window // 2] * self.params.window if alone else range(self.params.window):
            parts = [
                part.reshape(b, count, *part.shape[1:])[:, i : i + centres].flatten(0, 1)
                for part in (state.section, *state.pyramid)
            ]
            states.append(SectionState(parts[0], tuple(channels_last(level) for level in parts[1:])))
        sr = self.fuse_window(states)
        return sr.reshape(b, centres, *sr.shape[1:]), references.reshape(b, count, *references.shape[1:])

    def _encode(self, section: Tensor) -> tuple[SectionState, Tensor]:
        """LR section (B, 1, H, W) -> its state and I_Ref (B, 1, rH, rW); without MPF the section in place of I_Ref."""
        multiple = self.params.multiple
        if section.shape[-2] % multiple or section.shape[-1] % multiple:
            raise ValueError(
                f"a section of {section.shape[-2]} x {section.shape[-1]} voxels: "
                f"height and width must be multiples of {multiple}"
            )
        features = self.features(section)  # F_LR (B, C, H, W)
        if not self.params.mpf:
            return SectionState(section, self.pod.pyramid(self.without_mpf(features))), section
        reference = self.prior(section)  # eq. 3: I_Ref (B, 1, rH, rW) and F_Ref^l
        mask = self.mask(section, reference.image)  # M (B, 1, rH/16, rW/16)
        fused = self.mpf(features, reference.features, mask)  # eq. 4: F^Out (B, C, H, W)
        return SectionState(section, self.pod.pyramid(fused)), reference.image
