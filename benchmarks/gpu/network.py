"""Measures the network on a GPU: rates, reference vectors, milliseconds and memory per centre, determinism, kernels.

    python benchmarks/gpu/network.py rates
    python benchmarks/gpu/network.py golden FOLDER
    python benchmarks/gpu/network.py speed [seconds=100] [sizes=full]
    python benchmarks/gpu/network.py same
    python benchmarks/gpu/network.py kernels [preset=paper] [scale=8] [ways=float32,tf32,bfloat16-stored]
    python benchmarks/gpu/network.py settings [preset=paper] [scale=8]

Every line of output is one JSON object. A centre is one section encoded and one window fused. Weights are random, of
live_network (benchmarks/network_speed.py); the small preset takes the built-in ones. "share" is of what a large matrix
product of that precision reaches on the same card in the same call. It runs on a CPU too, where it only shows that the
script works.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from network_speed import live_network, tissue

import models
from models import memory, weights
from models.config import X8, X16
from models.flow import MEAN, STD
from models.network import SectionState, SuperResolver

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 1 << 30


def say(**found: Any) -> None:
    """Print one line of JSON, numbers with four digits."""
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
    print(json.dumps(rounded), flush=True)


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(function: Callable[[], Any], seconds: float = 0.5) -> float:
    """The median time of one call, after two that do not count; each is waited for."""
    for _ in range(2):
        function()
    wait()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or (time.perf_counter() < end and len(found) < 200):
        began = time.perf_counter()
        function()
        wait()
        found.append(1e3 * (time.perf_counter() - began))
    return statistics.median(found)


@dataclass(frozen=True)
class Way:
    """How the network is run. `stored`: kernels are kept in bfloat16 instead of being cast in every call. `indexer32`:
    the indexer computes in float32 (tf32 where that is allowed). `bands`: as on a CPU.
    """

    name: str
    tf32: bool = False
    bfloat16: bool = False
    stored: bool = False
    indexer32: bool = False
    channels_last: bool = True
    bands: bool = True
    graphs: bool = False


WAYS = {
    way.name: way
    for way in (
        Way("float32"),
        Way("float32-contiguous", channels_last=False, bands=False),
        Way("tf32", tf32=True),
        Way("tf32-contiguous", tf32=True, channels_last=False, bands=False),
        Way("tf32-nobands", tf32=True, bands=False),
        Way("tf32-graphs", tf32=True, bands=False, graphs=True),
        Way("bfloat16", bfloat16=True),
        Way("bfloat16-stored", tf32=True, bfloat16=True, stored=True, indexer32=True, bands=False),
        Way("bfloat16-graphs", tf32=True, bfloat16=True, stored=True, indexer32=True, bands=False, graphs=True),
    )
}


@contextlib.contextmanager
def prepared(way: Way, network: SuperResolver) -> Iterator[SuperResolver]:
    """`network` on the device, as `way` has it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = way.tf32
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    whole = memory.BAND_BYTES
    network = network.to(DEVICE)
    if not way.channels_last:
        for parameter in network.parameters():
            parameter.data = parameter.data.contiguous()
    if way.stored:
        for name, parameter in network.named_parameters():
            if parameter.dim() == 4 and "deform.weight" not in name and not name.startswith("prior.indexer"):
                parameter.data = parameter.data.bfloat16()
    if way.indexer32 and network.params.mpf:
        plain = network.prior.indexer.forward

        def in_float32(section: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, enabled=False):
                return plain(section.float())

        network.prior.indexer.forward = in_float32  # type: ignore[method-assign]
    if not way.bands:
        memory.BAND_BYTES = 1 << 50
    try:
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=way.bfloat16):
            yield network
    finally:
        memory.BAND_BYTES = whole


def captured(function: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """`function(*inputs)` as a CUDA graph over the memory of `inputs`; its result is overwritten by every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def network_of(preset: str, scale: int) -> SuperResolver:
    """A copy on the CPU that may be changed."""
    return copy.deepcopy(built(preset, scale))


@functools.cache
def built(preset: str, scale: int) -> SuperResolver:
    if preset == "paper":
        return live_network(scale)
    network = models.build("gpemsr", scale, "small")
    models.load(Path(models.__file__).parent / "builtin" / f"flyem-medulla-x{scale}.safetensors", network)
    return network.eval()


made = functools.cache(functools.partial(tissue, 5))


def sections_of(tile: int, scale: int, batch: int) -> Tensor:
    """(5, batch, 1, tile, tile) in 0..1 on the device."""
    small = made(min(tile, 96), scale)
    grown = small.repeat(1, 1, 2, 2)[:, :, :tile, :tile] if tile > 96 else small
    return torch.stack([grown.roll(3 * i, -1) for i in range(batch)], 1).to(DEVICE)


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a.float() - b.float()).square().mean().item()
    return float(-10 * np.log10(error)) if error else float("inf")


def centre(way: Way, preset: str, scale: int, tile: int, batch: int, seconds: float) -> dict[str, Any]:
    """Measures one way of running one network. Returns what it found, with the SR sections under "sr"."""
    inputs = sections_of(tile, scale, batch)
    if DEVICE.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with prepared(way, network_of(preset, scale)) as network:
        held = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        states = [network.encode_section(section) for section in inputs]
        sr = network.fuse_window(states).float()
        indices = network.prior.indices(inputs[2])
        encode: Callable[[], Any] = lambda: network.encode_section(inputs[0])  # noqa: E731
        fuse: Callable[[], Any] = lambda: network.fuse_window(states)  # noqa: E731
        found: dict[str, Any] = {}
        if way.graphs and DEVICE.type == "cuda":
            encode, fuse = captured(network.encode_section, inputs[0]), captured(network.fuse_window, states)
            again: SectionState = encode()
            found["graph_equal"] = bool(
                torch.equal(again.pyramid[0], states[0].pyramid[0]) and torch.equal(fuse().float(), sr)
            )
        found |= {
            "encode_ms": milliseconds(encode, seconds) / batch,
            "fuse_ms": milliseconds(fuse, seconds) / batch,
        }
        if DEVICE.type == "cuda":
            found["peak_gib"] = (torch.cuda.max_memory_allocated() - held) / GIB
    return found | {"sr": sr, "indices": indices}


def operations(preset: str, scale: int, tile: int) -> float:
    """Multiply-adds of a centre, each as two operations, counted by torch on meta tensors."""
    network = models.build("gpemsr", scale, preset).to("meta").eval()
    total = 0
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        state = network.encode_section(torch.empty(1, 1, tile, tile, device="meta"))  # type: ignore[operator]
        network.fuse_window([state] * 5)  # type: ignore[operator]
        total = counter.get_total_flops()
    return float(total)


def rates() -> dict[str, float]:
    """TFLOP/s of a large matrix product in each precision."""
    n = 8192 if DEVICE.type == "cuda" else 512
    found = {}
    for name, dtype, tf32 in (
        ("float32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bfloat16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
        found[name] = 2 * n**3 / milliseconds(lambda a=a, b=b: a @ b, 0.3) / 1e9
    return found


FULL = [
    # preset, scale, tile, cell, ways and batches
    ("paper", 8, 96, 64, dict.fromkeys(WAYS, (1,))),
    ("small", 8, 96, 64, dict.fromkeys(WAYS, (1,))),
    ("paper", 8, 96, 64, {"bfloat16-graphs": (4, 8), "tf32-graphs": (4, 8)}),
    ("small", 8, 96, 64, {"bfloat16-graphs": (4, 8, 16), "tf32-graphs": (8,)}),
    ("paper", 8, 160, 128, {"float32": (1,), "tf32": (1,), "tf32-graphs": (1, 4), "bfloat16-graphs": (1, 4)}),
    ("small", 8, 160, 128, {"tf32-graphs": (1, 8), "bfloat16-graphs": (1, 8)}),
    ("paper", 16, 112, 64, {"float32": (1,), "tf32": (1,), "tf32-graphs": (1, 4), "bfloat16-graphs": (1, 4)}),
    ("small", 16, 112, 64, {"float32": (1,), "tf32-graphs": (1, 4), "bfloat16-graphs": (1, 4)}),
    ("paper", 16, 176, 128, {"tf32-graphs": (1,), "bfloat16-graphs": (1,)}),
]
SMOKE = [("small", 8, 32, 16, {"float32": (1,), "bfloat16-stored": (1, 2)})]


def speed(seconds: str = "100", sizes: str = "full") -> None:
    end, ceiling = time.perf_counter() + float(seconds), rates()
    say(matrix_tflops={key: float(f"{value:.4g}") for key, value in ceiling.items()})
    for preset, scale, tile, cell, ways in FULL if sizes == "full" else SMOKE:
        flops = operations(preset, scale, tile)
        reference: dict[str, Any] | None = None
        for name, batches in ways.items():
            for batch in batches:
                if time.perf_counter() > end:
                    say(stopped="out of time", at=[preset, scale, tile, name, batch])
                    return
                label = {"preset": preset, "scale": scale, "tile": tile, "cell": cell, "way": name, "batch": batch}
                try:
                    if reference is None:
                        reference = centre(WAYS["float32"], preset, scale, tile, 1, 0.01)
                    found = centre(WAYS[name], preset, scale, tile, batch, 0.4)
                except Exception as error:  # a way that fails is a result
                    say(**label, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    continue
                sr, indices = found.pop("sr"), found.pop("indices")
                total = found["encode_ms"] + found["fuse_ms"]
                rate = flops / total / 1e9
                of = "bfloat16" if "bfloat16" in name else "tf32" if "tf32" in name else "float32"
                say(
                    **label,
                    ms=total,
                    **found,
                    tflops=rate,
                    share=rate / ceiling[of],
                    msr_voxels_s=(cell * scale) ** 2 / total / 1e3,
                    psnr=psnr(sr[:1], reference["sr"]),
                    indices_changed=(indices[:1] != reference["indices"]).float().mean().item(),
                )


def golden(folder: str) -> None:
    """The reference vectors (EMSR_SHARED/golden) in float32 on this device: largest differences."""
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
        for way in ("float32", "tf32"):
            with prepared(WAYS[way], network) as on_device:
                sections = torch.from_numpy(arrays["input"])[0].to(DEVICE)
                states = [on_device.encode_section(section[None]) for section in sections]
                indices = torch.cat([on_device.prior.indices(section[None]) for section in sections]).cpu().numpy()
                sr = on_device.fuse_window(states).cpu().numpy()
            say(
                golden=name,
                way=way,
                sr_difference=float(np.abs(sr - arrays["sr"]).max()),
                indices_equal=bool((indices.reshape(arrays["indices"].shape) == arrays["indices"]).all()),
                limit=1e-4,
            )


def same() -> None:
    """Whether a tile gives the same bytes twice, beside other tiles of a batch, and at another place of the batch."""
    for preset, name in (("paper", "float32"), ("paper", "tf32"), ("paper", "bfloat16-stored"), ("small", "tf32")):
        batch = sections_of(96 if DEVICE.type == "cuda" else 32, 8, 4)
        with prepared(WAYS[name], network_of(preset, 8)) as network:

            def run(inputs: Tensor, network: SuperResolver = network) -> Tensor:
                return network.fuse_window([network.encode_section(section) for section in inputs]).float()

            alone, whole, turned = run(batch[:, :1]), run(batch), run(batch.roll(1, 1))
            mixed = run(torch.cat([batch[:, :1], batch[:, 2:], batch[:, 1:2]], 1))
            say(
                same=preset,
                way=name,
                twice=torch.equal(alone, run(batch[:, :1])),
                batch_twice=torch.equal(whole, run(batch)),
                other_place=torch.equal(whole, turned.roll(-1, 0)),
                other_neighbours=torch.equal(whole[:1], mixed[:1]),
                alone_or_in_batch=torch.equal(alone, whole[:1]),
                largest_difference=(alone - whole[:1]).abs().max().item(),
            )


def kernels(preset: str = "paper", scale: str = "8", ways: str = "float32,tf32,bfloat16-stored") -> None:
    """Which kernels take the time of a centre, and how far a CUDA graph is from the same call without one."""
    tile = 96 if DEVICE.type == "cuda" else 32
    inputs = sections_of(tile, int(scale), 1)
    for way in ways.split(","):
        with prepared(WAYS[way], network_of(preset, int(scale))) as network:
            states = [network.encode_section(section) for section in inputs]
            for what, function, arguments in (
                ("encode", lambda section, network=network: network.encode_section(section).pyramid[0], inputs[0]),
                ("fuse", network.fuse_window, states),
            ):
                first = function(arguments).clone()
                again = function(arguments).clone()
                found = {"twice": (first - again).abs().max().item()}
                if DEVICE.type == "cuda":
                    replay = captured(function, arguments)
                    found["graph_ms"] = milliseconds(replay, 0.2)
                    found["graph"] = (first - replay()).abs().max().item()
                wait()
                with torch.profiler.profile() as profile:
                    function(arguments)
                    wait()
                on_device = [row for row in profile.key_averages() if row.device_type != torch.autograd.DeviceType.CPU]
                rows = sorted(on_device, key=lambda row: -row.self_device_time_total)
                total = sum(row.self_device_time_total for row in rows)
                launched = sum(row.count for row in rows)
                say(
                    kernels=what,
                    preset=preset,
                    scale=int(scale),
                    way=way,
                    device_ms=total / 1e3,
                    launched=launched,
                    **found,
                )
                for row in rows[:16]:
                    say(share=row.self_device_time_total / total, count=row.count, kernel=row.key[:110])


def settings(preset: str = "paper", scale: str = "8") -> None:
    """What cuDNN's two switches cost: `deterministic`, and `benchmark`, which takes the fastest algorithm it tries."""
    tile = 96 if DEVICE.type == "cuda" else 32
    for name in ("float32", "float32-contiguous", "tf32-nobands", "tf32-contiguous", "bfloat16-stored"):
        for deterministic, benchmark in ((True, False), (False, False), (True, True), (False, True)):
            inputs = sections_of(tile, int(scale), 1)
            with prepared(WAYS[name], network_of(preset, int(scale))) as network:
                torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark
                states = [network.encode_section(section) for section in inputs]
                say(
                    settings=name,
                    deterministic=deterministic,
                    benchmark=benchmark,
                    encode_ms=milliseconds(
                        lambda network=network, section=inputs[0]: network.encode_section(section), 0.2
                    ),
                    fuse_ms=milliseconds(lambda network=network, states=states: network.fuse_window(states), 0.2),
                    twice=torch.equal(network.fuse_window(states), network.fuse_window(states)),
                )


def main(what: str, *arguments: str) -> None:
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    {
        "rates": lambda: say(**rates()),
        "golden": golden,
        "speed": speed,
        "same": same,
        "kernels": kernels,
        "settings": settings,
    }[what](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
