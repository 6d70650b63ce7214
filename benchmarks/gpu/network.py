"""Measures the network as a run computes it: milliseconds and memory a centre, determinism, operators, kernels.

    python benchmarks/gpu/network.py golden FOLDER
    python benchmarks/gpu/network.py speed [seconds=130] [sizes=full]
    python benchmarks/gpu/network.py same
    python benchmarks/gpu/network.py operators
    python benchmarks/gpu/network.py compiled [seconds=100]
    python benchmarks/gpu/network.py authors [seconds=20]
    python benchmarks/gpu/network.py kernels [preset=paper] [scale=8] [precisions=tf32,bfloat16]

Every line of output is one JSON object. A centre is one section encoded and one window fused, in milliseconds of a
tile's share of a batch, with the copies that a run makes of sections and states. Weights of preset paper are random, of
live_network (benchmarks/network_speed.py); preset small takes the built-in ones. "share" is of what a large matrix
product of that precision reaches on the same card in the same call; PSNR and indices changed are against float32. It
runs on a CPU too, where it only shows that the script works.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from network_speed import live_network, tissue
from parts.authors_way import AuthorsWay

import models
from models import weights
from models.config import X8, X16
from models.deformable import DeformableConv
from models.flow import MEAN, STD
from models.layers import GroupNorm, channels_last
from models.network import SuperResolver
from pipeline.inference.network import Network
from pipeline.plan.lattice import Lattice
from pipeline.plan.network_spec import NetworkSpec
from pipeline.process import device
from pipeline.selftest.rates import matrix_tflops, spec_operations

DEVICE = device.pick()
GPU = DEVICE.type == "cuda"
GIB = 1 << 30
WINDOW = 5
HALO = {8: 16, 16: 24}
FLOAT32 = "float32"


def say(**found: Any) -> None:
    """Print one line of JSON, numbers with four digits."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps(rounded), flush=True)


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], seconds: float = 0.4) -> float:
    """The median time of one call, after two that do not count; each is waited for. A CPU calls once."""
    for _ in range(2 if GPU else 0):
        function()
    wait()
    found, end = [], time.perf_counter() + (seconds if GPU else 0)
    while len(found) < (3 if GPU else 1) or (time.perf_counter() < end and len(found) < 200):
        began = time.perf_counter()
        function()
        wait()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


def spec_of(preset: str, scale: int, cell: int, precision: str, batch: int) -> NetworkSpec:
    """A network with the default halo; of a smoke run, whose cells are tiny, with half a cell."""
    lattice = Lattice(cell, HALO[scale] if cell >= 64 else cell // 2, WINDOW, "mirror")
    return NetworkSpec("gpemsr", scale, preset, "", precision, lattice, batch=batch)


@functools.cache
def built(preset: str, scale: int) -> SuperResolver:
    if preset == "paper":
        return live_network(scale)
    network = models.build("gpemsr", scale, "small")
    models.load(models.builtin("builtin", scale), network)
    assert isinstance(network, SuperResolver)
    return network.eval()


def ready(spec: NetworkSpec) -> Network:
    """The network of a run on the device, with the weights of `built`."""
    network = Network(spec)
    assert spec.preset is not None
    network.module = copy.deepcopy(built(spec.preset, spec.scale))
    models.lower(network.module, spec.precision)
    network.module.to(DEVICE)
    return network


made = functools.cache(functools.partial(tissue, WINDOW))


def sections_of(spec: NetworkSpec) -> list[Tensor]:
    """A window of uint8 (B, T, T) on the device; every tile of the batch is another piece."""
    tile = spec.lattice.tile
    small = made(min(tile, 96), spec.scale)
    grown = small.repeat(1, 1, 2, 2)[:, 0, :tile, :tile] if tile > 96 else small[:, 0]
    window = torch.stack([grown.roll(3 * i, -1) for i in range(spec.batch)], 1)
    return [section.contiguous().to(DEVICE) for section in window.mul(255).round_().to(torch.uint8)]


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return float(-10 * np.log10(error)) if error else float("inf")


def sr_of(network: Network, sections: list[Tensor]) -> tuple[Tensor, Tensor]:
    """SR of the first tile before it is rounded to grey levels, and the indices of its centre section."""
    first = [section[:1].float().div_(255)[:, None] for section in sections]
    with torch.inference_mode():
        states = [network.module.encode_section(section) for section in first]  # type: ignore[operator]
        sr = network.module.fuse_window(states, network.spec.lattice.halo)  # type: ignore[operator]
        return sr, network.module.prior.indices(first[WINDOW // 2])  # type: ignore[union-attr, operator]


def by_graphs(network: Network) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """To encode and to fuse as a run does."""
    return functools.partial(network._call, network.encode), functools.partial(network._call, network.fuse)


def centre(network: Network, graphs: bool) -> dict[str, Any]:
    """Milliseconds and peak memory of a centre; with `graphs`, by the CUDA graphs of a run, else by plain calls."""
    spec, sections = network.spec, sections_of(network.spec)
    if GPU:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if GPU else 0
    encode, fuse = by_graphs(network) if graphs else (network.encode, network.fuse)
    with torch.inference_mode():
        states = [encode(section) for section in sections]
        fuse(states)
        found = {
            "encode_ms": milliseconds(lambda: encode(sections[0])) / spec.batch,
            "fuse_ms": milliseconds(lambda: fuse(states)) / spec.batch,
        }
    if GPU:
        found["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return found | ({"notes": list(network.notes)} if network.notes else {})


ALL = ("float32", "tf32", "bfloat16", "float16")
FULL: list[tuple[str, int, int, dict[str, tuple[int, ...]]]] = [
    # preset, scale, cell; batches by precision
    ("paper", 8, 64, {"float32": (1,), "tf32": (1, 8), "bfloat16": (1, 8)}),
    ("small", 8, 128, {"float32": (1,), "tf32": (4,), "bfloat16": (4,)}),
    ("paper", 8, 128, {"tf32": (4,), "bfloat16": (4,)}),
    ("small", 8, 64, {"float32": (1,), "tf32": (8,), "bfloat16": (8, 16)}),
    ("paper", 8, 64, {"tf32": (4, 16), "bfloat16": (4, 16), "float16": (8,), "float32": (8,)}),
    ("paper", 16, 64, {"float32": (1,), "tf32": (8,), "bfloat16": (8,)}),
    ("small", 8, 128, {"tf32": (1, 8), "bfloat16": (8, 16), "float32": (4,)}),
    ("small", 16, 64, {"float32": (1,), "tf32": (8,), "bfloat16": (8,)}),
    ("paper", 16, 128, {"tf32": (4,), "bfloat16": (4,)}),
    ("small", 16, 128, {"tf32": (4,), "bfloat16": (4,)}),
]
SMOKE = [("small", 8, 8, {"float32": (1,), "bfloat16": (2,)})]


def speed(seconds: str = "130", sizes: str = "full") -> None:
    """All of FULL within so many seconds, by graphs; plain calls beside them for the first batch of a precision."""
    end = time.perf_counter() + float(seconds)
    ceiling = {name: matrix_tflops(DEVICE, name) for name in ALL if GPU or name in ("float32", "bfloat16")}
    say(matrix_tflops={name: float(f"{value:.4g}") for name, value in ceiling.items()})
    for preset, scale, cell, batches in FULL if sizes == "full" else SMOKE:
        wanted: tuple[Tensor, Tensor] | None = None
        for precision, sizes_of_batch in batches.items():
            for batch in sizes_of_batch:
                if time.perf_counter() > end:
                    say(stopped="out of time", at=[preset, scale, cell, precision, batch])
                    return
                spec = spec_of(preset, scale, cell, precision, batch)
                label = {"preset": preset, "scale": scale, "cell": cell, "precision": precision, "batch": batch}
                try:
                    wanted = wanted or sr_of(ready(replace(spec, precision=FLOAT32)), sections_of(spec))
                    network = ready(spec)
                    sr, indices = sr_of(network, sections_of(spec))
                    ways = [True, False] if GPU and batch == sizes_of_batch[0] else [GPU]
                    for graphs in ways:
                        found = centre(network, graphs)
                        total = found["encode_ms"] + found["fuse_ms"]
                        rate = spec_operations(spec) / total / 1e9
                        say(
                            **label,
                            graphs=graphs,
                            ms=total,
                            **found,
                            tflops=rate,
                            share=rate / ceiling[precision],
                            msr_voxels_s=(cell * scale) ** 2 / total / 1e3,
                            psnr=psnr(sr, wanted[0]),
                            indices_changed=(indices != wanted[1]).float().mean().item(),
                        )
                except Exception as error:  # a way that fails is a result
                    say(**label, failed=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")


def golden(folder: str) -> None:
    """The reference vectors (EMSR_SHARED/golden) in float32 and tf32 on this device: largest differences."""
    spec = importlib.util.spec_from_file_location("golden_fill", Path(folder) / "fill.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    for name, params in (("gpemsr_x8_16x24_seed1", X8), ("gpemsr_x16_16x16_seed1", X16)):
        arrays = np.load(Path(folder) / f"{name}.npz")
        state = {}
        for key, shape in json.loads(bytes(arrays["parameters_json"]).decode()).items():
            fixed = {"mean": MEAN, "std": STD}.get(key.rsplit(".", 1)[-1]) if "spynet" in key else None
            state[key] = torch.tensor(fixed).view(shape) if fixed else torch.from_numpy(rule.fill(key, tuple(shape), 1))
        network = SuperResolver(params).eval()
        weights.load_published(network, state)
        network.to(DEVICE)
        for precision in ("float32", "tf32") if GPU else ("float32",):
            device.fix_rounding(DEVICE, precision)
            with torch.inference_mode():
                sections = torch.from_numpy(arrays["input"])[0].to(DEVICE)
                states = [network.encode_section(section[None]) for section in sections]
                indices = torch.cat([network.prior.indices(section[None]) for section in sections]).cpu().numpy()
                sr = network.fuse_window(states).cpu().numpy()
            say(
                golden=name,
                precision=precision,
                sr_difference=float(np.abs(sr - arrays["sr"]).max()),
                indices_equal=bool((indices.reshape(arrays["indices"].shape) == arrays["indices"]).all()),
                limit=1e-4,
            )


def same() -> None:
    """Whether a tile gives the same bytes twice, beside other tiles, at another place of the batch, and by graphs."""
    cell, batch = (64, 8) if GPU else (8, 2)
    for preset in ("paper", "small") if GPU else ("small",):
        for precision in ALL if GPU else ("float32",):
            network = ready(spec_of(preset, 8, cell, precision, batch))
            window = sections_of(network.spec)

            def run(sections: list[Tensor], graphs: bool, network: Network = network) -> Tensor:
                encode, fuse = by_graphs(network) if graphs else (network.encode, network.fuse)
                with torch.inference_mode():
                    grey: Tensor = fuse([encode(section) for section in sections])[0]
                    return grey

            plain = run(window, False)
            mixed = [torch.cat([section[:1], section.flip(0)[:-1]]) for section in window]
            recorded = [run(window, True) for _ in range(2)][-1]
            say(
                same=preset,
                precision=precision,
                batch=batch,
                twice=torch.equal(plain, run(window, False)),
                other_place=torch.equal(plain, run([section.roll(1, 0) for section in window], False).roll(-1, 0)),
                other_neighbours=torch.equal(plain[:1], run(mixed, False)[:1]),
                graphs=torch.equal(plain, recorded),
                notes=list(network.notes),
            )


def operators() -> None:
    """Ways of computing one operator, in milliseconds of a batch of 8 tiles of preset paper at x8: each choice of the
    product beside what else there is.
    """
    b, tile = (8, 96) if GPU else (1, 16)
    for precision in ("tf32", "bfloat16") if GPU else (FLOAT32,):
        kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
        device.fix_rounding(DEVICE, precision)
        with torch.inference_mode():
            for side, width in ((tile // 2, 512), (2 * tile, 128)):
                x = channels_last(torch.randn(b, width, side, side, device=DEVICE).to(kind))
                say(operator="group norm", precision=precision, shape=list(x.shape), **_group_norms(x))
            for tokens in ((tile // 2) ** 2, tile**2):
                q = torch.randn(b, 1, tokens, 512, device=DEVICE).to(kind)
                say(operator="attention", precision=precision, tokens=tokens, **_attentions(q))
            x = channels_last(torch.randn(5 * b, 64, tile, tile, device=DEVICE).to(kind))
            say(operator="deformable", precision=precision, **_deformables(x))


def _group_norms(x: Tensor) -> dict[str, Any]:
    norm = GroupNorm(x.shape[1], 32).to(DEVICE)
    theirs = copy.deepcopy(norm).to(x.dtype)
    return {
        "by_channels": milliseconds(lambda: norm.by_channels(x)),
        "torch": milliseconds(lambda: channels_last(nn.GroupNorm.forward(theirs, x))),
        "compiled": _compiled_ms(norm.by_channels, x),
    }


def _attentions(q: Tensor) -> dict[str, Any]:
    return {
        "torch": milliseconds(lambda: functional.scaled_dot_product_attention(q, q, q), 0.2),
        "products": milliseconds(lambda: (q @ q.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ q, 0.2),
    }


def _deformables(x: Tensor) -> dict[str, Any]:
    conv = DeformableConv(x.shape[1], 8).to(DEVICE)
    nn.init.normal_(conv.offsets.weight, std=0.05)
    conv = conv.to(x.dtype)
    return {"sampled": milliseconds(lambda: conv(x, x)), "compiled": _compiled_ms(lambda x: conv(x, x), x)}


def _compiled_ms(function: Callable[[Tensor], Tensor], x: Tensor) -> float | str:
    """Milliseconds of a function by torch.compile; why not, where it cannot be compiled here."""
    if not GPU:
        return "not on a CPU"
    try:
        compiled = torch.compile(function, dynamic=False)
        return milliseconds(lambda: compiled(x))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def compiled(seconds: str = "100") -> None:
    """torch.compile before the graphs: what it takes, and what it gives."""
    end = time.perf_counter() + float(seconds)
    for precision in ("bfloat16", "tf32") if GPU else ():
        if time.perf_counter() > end:
            say(stopped="out of time", at=precision)
            return
        spec = spec_of("paper", 8, 64, precision, 8)
        network, began = ready(spec), time.perf_counter()
        plain = sr_of(network, sections_of(spec))[0]
        module = network.module
        try:
            for name in ("encode_section", "fuse_window"):
                setattr(module, name, torch.compile(getattr(module, name), dynamic=False))
            found = centre(network, True)
            found |= {"ms": found["encode_ms"] + found["fuse_ms"], "first_s": time.perf_counter() - began}
            found["psnr_to_plain"] = psnr(sr_of(network, sections_of(spec))[0], plain)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
        say(compiled=precision, batch=8, **found)


def authors(seconds: str = "20") -> None:
    """The stand-in for the authors' way on this device: milliseconds a centre of 64 x 64 LR voxels in a tile of 96."""
    device.fix_rounding(DEVICE, FLOAT32)
    way = AuthorsWay(built("paper", 8))
    way.net, way.vgg = way.net.to(DEVICE), way.vgg.to(DEVICE)
    window = made(96 if GPU else 16, 8)[None].to(DEVICE)
    say(authors_way=FLOAT32, ms=milliseconds(lambda: way(window), float(seconds) / 2))


def kernels(preset: str = "paper", scale: str = "8", precisions: str = "tf32,bfloat16") -> None:
    """Which kernels take the time of a centre."""
    cell, batch = (64, 8) if GPU else (8, 1)
    for precision in precisions.split(",") if GPU else (FLOAT32,):
        network = ready(spec_of(preset, int(scale), cell, precision, batch))
        sections = sections_of(network.spec)
        with torch.inference_mode():
            states = [network.encode(section) for section in sections]
            for what, function in (
                ("encode", lambda network=network, section=sections[0]: network.encode(section)),
                ("fuse", lambda network=network, states=states: network.fuse(states)),
            ):
                function()
                wait()
                with torch.profiler.profile() as profile:
                    function()
                    wait()
                on_device = [row for row in profile.key_averages() if row.device_type != torch.autograd.DeviceType.CPU]
                rows = sorted(
                    (row for row in on_device if not row.key.startswith(("aten::", "torchvision::"))),
                    key=lambda row: -row.self_device_time_total,
                )
                total = sum(row.self_device_time_total for row in rows)
                say(
                    kernels=what,
                    preset=preset,
                    scale=int(scale),
                    precision=precision,
                    batch=batch,
                    device_ms=total / 1e3 / batch,
                    launched=sum(row.count for row in rows),
                )
                for row in rows[:20]:
                    say(share=row.self_device_time_total / total, count=row.count, kernel=row.key[:110])


def main(what: str, *arguments: str) -> None:
    {
        "golden": golden,
        "speed": speed,
        "same": same,
        "operators": operators,
        "compiled": compiled,
        "authors": authors,
        "kernels": kernels,
    }[what](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
