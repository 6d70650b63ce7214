"""Measures the network against a stand-in for the authors' loop, our own forward per centre, and the processor's peak.

    python benchmarks/network_speed.py slab [scale=8] [lr=32] [centres=16] [every=1]
    python benchmarks/network_speed.py peak [scale=8] [lr=32] [centres=4] [preset=paper]
    python benchmarks/network_speed.py memory [scale=16] [lr=64] [ours|authors]

Preset is paper where not given, and the weights are random, with offsets that move and a residual that matters. All use
one thread. "authors" is benchmarks/parts/authors_way.py, not the authors' module.

`slab` computes the same centres three ways in turn, in CPU seconds of this process, and says how far the outputs
differ. The two ways in which a centre's cost does not depend on those before it run at every `every`-th centre only.
`peak` says what share of its time a slab would take if all its multiplications were done at the rate of 3x3 64->64
convolutions (channels-last) on maps of the same widths, and how many times fewer multiplications a slab of 16 centres
takes than our own forward per centre.
`memory` is the peak resident size of one centre beyond the process with its weights, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.authors_way import AuthorsWay
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import models
from examples.make_phantom import phantom
from models.degrade import degrade
from models.network import SectionState, SuperResolver
from pipeline.process.allocator import configure_malloc

GIB = 1 << 30


def live_network(scale: int, preset: str = "paper", seed: int = 3) -> SuperResolver:
    """A network with random weights, whose offset heads are not zero and whose residual is as large as the image."""
    torch.manual_seed(seed)
    network = models.build("gpemsr", scale, preset)
    assert isinstance(network, SuperResolver)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if ".deform.offsets.weight" in name:
                parameter.uniform_(-0.1, 0.1)
            elif name.startswith("reconstruct.trunk"):
                parameter.mul_(6)
            elif name.startswith("reconstruct.last"):
                parameter.mul_(30)
    return network.eval()


def tissue(sections: int, lr: int, scale: int) -> Tensor:
    """(sections, 1, lr, lr) in 0..1."""
    hr = phantom((sections, lr * scale, lr * scale))
    return torch.from_numpy(np.stack([degrade(section, scale) for section in hr])).float().div_(255)[:, None]


class Clock:
    """Sums CPU and wall seconds of this process by label."""

    def __init__(self) -> None:
        self.cpu: Counter[str] = Counter()
        self.wall: Counter[str] = Counter()

    def __call__(self, label: str, function: Any, *arguments: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*arguments)
        self.cpu[label] += time.process_time() - cpu
        self.wall[label] += time.perf_counter() - wall
        return result


def slide(network: SuperResolver, sections: Tensor, states: list[SectionState], centre: int) -> Tensor:
    """SR of one centre. `states` holds the states of all sections encoded so far; those that are missing are added."""
    with torch.inference_mode():
        while len(states) < centre + 5:
            states.append(network.encode_section(sections[len(states)][None]))
        return network.fuse_window(states[centre : centre + 5])


def slab(scale: int = 8, lr: int = 32, centres: int = 16, every: int = 1) -> dict[str, float]:
    network, sections = live_network(scale), tissue(centres + 4, lr, scale)
    authors = AuthorsWay(network)
    clock, states, differences, residual, equal = Clock(), list[SectionState](), [], [], True
    with torch.inference_mode():
        slide(network, sections, [], 0)  # first calls cost more, and are not counted
        network(sections[None, :5])
        for centre in range(centres):
            ours = clock("ours", slide, network, sections, states, centre)
            if centre % every:
                continue
            window = sections[None, centre : centre + 5]
            theirs, indices = clock("authors", authors, window)
            forward = clock("forward", network, window)
            differences.append([(ours - theirs).abs().max().item(), (ours - forward).abs().max().item()])
            equal &= all(
                torch.equal(network.prior.indices(s[None])[0], i) for s, i in zip(window[0], indices, strict=True)
            )
            residual.append(
                (ours - torch.nn.functional.interpolate(window[:, 2], scale_factor=scale, mode="bilinear")).std().item()
            )
            print(
                f"centre {centre + 1}/{centres}",
                {key: round(value, 2) for key, value in clock.cpu.items()},
                file=sys.stderr,
                flush=True,
            )
    whole = {"authors": centres / len(differences), "forward": centres / len(differences), "ours": 1.0}
    cpu = {label: clock.cpu[label] * times for label, times in whole.items()}
    found = {f"{label}_cpu_s": seconds for label, seconds in cpu.items()}
    found |= {f"{label}_wall_s": clock.wall[label] * times for label, times in whole.items()}
    found |= {"against_authors": cpu["authors"] / cpu["ours"], "against_forward": cpu["forward"] / cpu["ours"]}
    worst = np.max(differences, 0)
    return found | {
        "from_authors": worst[0],
        "from_forward": worst[1],
        "residual_std": float(np.mean(residual)),
        "indices_equal": float(equal),
    }


class Widths(TorchDispatchMode):
    """Counts FLOPs of convolutions by the width of their output."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            maps = args[0] if args[6] else out  # a transposed convolution spreads what the others gather
            self.flops[out.shape[-1]] += 2 * maps.numel() * args[1][0].numel()
        return out


def gigaflops(width: int, seconds: float = 0.5) -> float:
    """GFLOP/s of 3x3 64->64 convolutions on a square map, channels-last: the best of several."""
    x = torch.randn(1, 64, width, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.process_time()
        for _ in range(repeats := max(1, 512**2 // width**2 // 4)):
            torch.nn.functional.conv2d(x, weight, padding=1)
        best = min(best, (time.process_time() - start) / repeats)
    return 2 * x.numel() * 64 * 9 / best / 1e9


def peak(scale: int = 8, lr: int = 32, centres: int = 4, preset: str = "paper") -> dict[str, float]:
    configure_malloc()  # as every worker does
    network, sections = live_network(scale, preset), tissue(centres + 4, lr, scale)

    def whole_slab() -> None:
        states: list[SectionState] = []
        for centre in range(centres):
            slide(network, sections, states, centre)

    # counted as the network is defined: operators of our own multiply zeros too
    network.requires_grad_(False)
    with torch.enable_grad(), Widths() as widths, FlopCounterMode(display=False) as counter:
        counted = [network.encode_section(section[None]) for section in sections]
        for centre in range(centres):
            network.fuse_window(counted[centre : centre + 5])
    with torch.enable_grad(), FlopCounterMode(display=False) as of_one:
        network.encode_section(sections[:1])
    encode = of_one.get_total_flops() / 1e9
    fuse = (counter.get_total_flops() / 1e9 - (centres + 4) * encode) / centres
    sizes = [lr * 2**level for level in range(scale.bit_length())]
    found: dict[str, float] = {}
    with torch.inference_mode():
        clock, rates = Clock(), Counter[int]()
        for _ in range(3):
            rates |= Counter({size: gigaflops(size) for size in sizes})
            clock("slab", whole_slab)
    total, seconds = counter.get_total_flops() / 1e9, clock.cpu["slab"] / 3
    rate_of = {width: rates[min(sizes, key=lambda size: abs(size - width))] for width in widths.flops}
    ideal = sum(flops / 1e9 / rate_of[width] for width, flops in widths.flops.items())
    ideal += (total - sum(widths.flops.values()) / 1e9) / rates[lr]
    found |= {
        "encode_gflop": encode,
        "fuse_gflop": fuse,
        "fewer_than_forward": 16 * (5 * encode + fuse) / (20 * encode + 16 * fuse),
    }
    found |= {f"conv_{size}_gflop_s": rate for size, rate in rates.items()}
    return found | {
        "slab_gflop": total,
        "slab_cpu_s": seconds,
        "slab_gflop_s": total / seconds,
        "share_of_convolutions": ideal / seconds,
    }


def high_water() -> int:
    """VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def measure_memory(scale: int, lr: int, way: str) -> None:
    """Prints how far one centre raised this process's peak, in bytes."""
    configure_malloc()
    network, sections = live_network(scale), tissue(5, lr, scale)
    run: Any = AuthorsWay(network) if way == "authors" else lambda window: slide(network, window[0], [], 0)
    network.features(torch.zeros(1, 1, 8, 8))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, or the peak of building the network hides the run's
    before = high_water()
    run(sections[None])
    print(high_water() - before)


def memory(scale: int = 16, lr: int = 64, way: str = "ours") -> dict[str, float]:
    code = (
        f"import network_speed, torch; torch.set_num_threads(1); network_speed.measure_memory({scale}, {lr}, {way!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"peak_beyond_weights_gib": int(done.stdout) / GIB}


def main(what: str = "slab", *arguments: str) -> None:
    torch.set_num_threads(1)
    found = {"slab": slab, "peak": peak, "memory": memory}[what](*(int(a) if a.isdigit() else a for a in arguments))  # type: ignore[operator]
    print({key: float(f"{value:.3g}") for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
