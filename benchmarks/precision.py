"""Measures what precision, memory layout, batches and torch.compile do to the output and its cost.

    python benchmarks/precision.py [weights=small] [volume=phantom] [scale=8] [lr=64] [turns=3]
                                   [ways=tf32,bfloat16,float16,contiguous,batch2,compile]

`weights` is a .safetensors file, or `small` or `paper` for random weights. `volume` is a zarr array of HR sections, or
`phantom`. One thread computes the same centre (five sections encoded, one window fused) in each way, in turn. Printed
against the default way: PSNR, the largest difference (grey 0..1), the share of the reference's indices that differ, and
CPU seconds over the default's. "tf32" is emulated, since no CPU has it, and its seconds say nothing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from lattice import load, psnr, read
from network_speed import Clock
from torch import Tensor, nn

from models import flow, indexer, layers, mask, network, vqgan
from models.deformable import DeformableConv
from models.degrade import degrade
from models.layers import Up
from models.network import SuperResolver
from models.precision import lower

LAID_OUT = (flow, indexer, layers, mask, network, vqgan)
"""Modules of models/ that ask for channels-last."""


def centre(net: SuperResolver, sections: Tensor) -> Tensor:
    """(5, B, 1, H, W) -> (B, 1, rH, rW)."""
    return net.fuse_window([net.encode_section(section) for section in sections])


def narrow_copy(net: SuperResolver, precision: str) -> SuperResolver:
    """The network as a run has it in that precision."""
    net = copy.deepcopy(net)
    lower(net, precision)
    return net


def tf32_copy(net: SuperResolver) -> SuperResolver:
    """The network with the rounding of TF32: inputs and kernels have ten bits of mantissa, sums stay float32."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, DeformableConv)):
            module.weight.data = ten_bits(module.weight.data)
            module.register_forward_pre_hook(lambda _module, inputs: (ten_bits(inputs[0]), *inputs[1:]))
    return net


def ten_bits(x: Tensor) -> Tensor:
    """Rounded to the nearest number with ten bits of mantissa, half away from zero."""
    return (x.contiguous().view(torch.int32) + 0x1000 & -0x2000).view(torch.float32).view_as(x)


def contiguous(net: SuperResolver, sections: Tensor) -> Tensor:
    """Computes with every map and kernel in PyTorch's default layout."""
    found = [module.channels_last for module in LAID_OUT]
    for module in LAID_OUT:
        module.channels_last = torch.Tensor.contiguous
    try:
        return centre(net, sections)
    finally:
        for module, function in zip(LAID_OUT, found, strict=True):
            module.channels_last = function


def contiguous_copy(net: SuperResolver) -> SuperResolver:
    net = copy.deepcopy(net)
    for parameter in net.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, Up):
            module.register_forward_hook(lambda _module, _inputs, out: out.contiguous())
    return net


def compiled_copy(net: SuperResolver) -> SuperResolver:
    net = copy.deepcopy(net)
    for name in ("encode_section", "fuse_window"):
        setattr(net, name, torch.compile(getattr(net, name), dynamic=False))
    return net


def batch2(net: SuperResolver, sections: Tensor) -> Tensor:
    """Computes the tile in one batch with its mirror image."""
    return centre(net, torch.cat([sections, sections.flip(-1)], 1))[:1]


def measure(weights: str, volume: str, scale: int, lr: int, turns: int, ways: list[str]) -> list[dict[str, Any]]:
    net = load(weights, scale)
    sections = (
        torch.from_numpy(np.stack([degrade(section, scale) for section in read(volume, 5, lr * scale)]))
        .float()
        .div_(255)[:, None, None]
    )
    known: dict[str, tuple[Callable[[], SuperResolver], Callable[[SuperResolver, Tensor], Tensor], int]] = {
        "default": (lambda: net, centre, 1),
        "tf32": (lambda: tf32_copy(net), centre, 1),
        "bfloat16": (lambda: narrow_copy(net, "bfloat16"), centre, 1),
        "float16": (lambda: narrow_copy(net, "float16"), centre, 1),
        "contiguous": (lambda: contiguous_copy(net), contiguous, 1),
        "batch2": (lambda: net, batch2, 2),
        "compile": (lambda: compiled_copy(net), centre, 1),
    }
    chosen = {name: (known[name][0](), *known[name][1:]) for name in ["default", *ways]}
    clock, results = Clock(), dict[str, tuple[Tensor, Tensor]]()
    with torch.inference_mode():
        for name, (module, run, _) in chosen.items():  # first calls compile and choose operators
            seen: list[Tensor] = []
            hook = module.prior.indexer.register_forward_hook(
                lambda _module, _inputs, logits, seen=seen: seen.append(logits[:1].argmax(1))
            )
            results[name] = run(module, sections).clamp(0, 1), torch.cat(seen)
            hook.remove()
            run(module, sections)
        for _ in range(turns):
            for name, (module, run, _) in chosen.items():
                clock(name, run, module, sections)
    found = []
    for name in ways:
        (sr, indices), (default, default_indices) = results[name], results["default"]
        row = {
            "way": name,
            "psnr": psnr(sr.numpy(), default.numpy()),
            "max": (sr - default).abs().max().item(),
            "changed": (indices != default_indices).float().mean().item(),
            "cpu_over_default": clock.cpu[name] / chosen[name][2] / clock.cpu["default"],
        }
        found.append(row)
        print(
            {key: float(f"{value:.3g}") if isinstance(value, float) else value for key, value in row.items()},
            flush=True,
        )
    return found


def main(
    weights: str = "small", volume: str = "phantom", scale: str = "8", lr: str = "64", turns: str = "3", ways: str = ""
) -> None:
    torch.set_num_threads(1)
    measure(
        weights,
        volume,
        int(scale),
        int(lr),
        int(turns),
        (ways or "tf32,bfloat16,float16,contiguous,batch2,compile").split(","),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
