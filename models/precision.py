"""A network whose kernels are stored in a narrower type than float32.

What is rounded costs differently much (docs/performance.md, "Precision"). The flow's products cost nothing that can be
seen; another index of the codebook is another piece of tissue. So these stay float32: the whole indexer, moments of
normalisations, positions of flow and taps, what is computed at LR size after the sections are aligned, the last
convolution and the sum that is the output. A GPU multiplies them in TF32.
"""

from __future__ import annotations

import torch
from torch import nn

from models.catalog import NARROW
from models.deformable import DeformableConv
from models.layers import Conv2d, Up

KEPT = ("features.input", "prior.indexer", "fusion", "reconstruct.trunk", "reconstruct.last")
"""The parts of SuperResolver whose kernels stay float32."""


def lower(network: nn.Module, precision: str) -> None:
    """Store kernels of `network` in the type of `precision`, in place. float32 and tf32 change nothing: tf32 is how a
    GPU multiplies float32.
    """
    if precision not in NARROW:
        return
    kind: torch.dtype = getattr(torch, precision)
    for name, module in network.named_modules():
        if isinstance(module, (Conv2d, Up, DeformableConv)) and not name.startswith(KEPT):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(kind)
