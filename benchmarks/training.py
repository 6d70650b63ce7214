"""Measures a training step: seconds, FLOPs and memory of each stage, one sample a step, random weights and images.

    python benchmarks/training.py [paper|small] [scale=8] [steps=2] [crop=] [stages=flow,vqgan,indexer,network]

`crop` is in HR voxels, at least 128; the paper's crops are the default. Each stage runs in a fresh process, so that its
peak (VmHWM) is its own. FLOPs are counted by torch (forward and backward, one multiply-add is two; sampling is not
counted). The days are an estimate: for the paper's 480,000 steps of batch 8 on one GPU that does 312 TFLOP/s (bfloat16,
dense) and is used to 30 %. The last columns are the part of a step that Adam takes, fused as it is, and not fused; and
the CPU time of drawing 8 samples from a volume in memory, which a thread does beside the steps.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from models.training.stages import Stage

STAGES = {"flow": 256, "vqgan": 512, "indexer": 1024, "network": 256}
"""Side of a crop in HR voxels (network.md, section 4). The paper does not train the flow."""
PAPER_STEPS, PAPER_BATCH = 480_000, 8
GPU_FLOPS, UTILISATION = 312e12, 0.30
UPDATES, DRAWN = 5, 5


@dataclass(frozen=True)
class Cost:
    seconds: float
    flops: float
    before: int
    peak: int
    fused_ms: float
    not_fused_ms: float
    drawing_ms: float


def measure(stage_name: str, preset_name: str, scale: int, steps: int, crop: int) -> Cost:
    """Measures one stage in this process: mean seconds of `steps` steps after one that is not counted."""
    import torch
    from lightning_fabric import Fabric
    from torch.utils.flop_counter import FlopCounterMode

    from models.config import preset
    from models.training.loop import Loop, Recipe
    from models.training.losses import Features
    from models.training.stages import FlowStage, IndexerStage, NetworkStage, VQGANStage
    from models.vqgan import VQGAN

    torch.manual_seed(0)
    params = preset(scale, preset_name)
    if stage_name == "network":
        widths = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256), (256, 256)]
        vgg = {}
        for place, shape in zip((0, 2, 5, 7, 10, 12, 14, 16), widths, strict=True):
            vgg |= {
                f"features.{place}.weight": 0.05 * torch.randn(*shape, 3, 3),
                f"features.{place}.bias": torch.zeros(shape[0]),
            }
        stage = NetworkStage(params, reference_weight=0.001, features=Features(vgg))
    elif stage_name == "indexer":
        stage = IndexerStage(params, VQGAN(params.prior))
    else:
        stage = FlowStage(params) if stage_name == "flow" else VQGANStage(params, adversarial_from=0)
    loop = Loop(Fabric(accelerator="cpu"), stage, Recipe(steps=steps + 1, batch=1))
    lr, hr = (
        torch.rand(1, stage.sections, 1, crop // scale, crop // scale),
        torch.rand(1, stage.sections, 1, crop, crop),
    )
    drawn = stage.draw((lr, hr), 1)
    before = resident("VmRSS")
    # Every sixteenth step, from 0 on, regularises the critic by a gradient that the counter cannot follow.
    loop.step = 1
    with FlopCounterMode(display=False) as counter:
        loop._one_step(drawn, 1e-4)
    began = time.perf_counter()
    for _ in range(steps):
        loop._one_step(drawn, 1e-4)
    seconds, peak = (time.perf_counter() - began) / steps, resident("VmHWM")
    plain = torch.optim.Adam(loop.adam.param_groups[0]["params"], 1e-4, fused=False)
    return Cost(
        seconds,
        counter.get_total_flops(),
        before,
        peak,
        step_ms(loop.adam),
        step_ms(plain),
        drawing_ms(stage, scale, crop),
    )


def drawing_ms(stage: Stage, scale: int, crop: int) -> float:
    """Milliseconds of this thread for PAPER_BATCH samples of random voxels, the least of DRAWN batches."""
    import numpy as np

    from models.training.crops import Crops, Volume

    voxels = np.random.default_rng(0).integers(0, 256, (stage.sections + 3, crop + 128, crop + 128), np.uint8)
    volume = Volume(voxels.shape, lambda z, y, x: voxels[z, y, x], np.ones(len(voxels), bool))
    crops, times = Crops([volume], stage.sections, crop, scale), []
    for step in range(DRAWN):
        began = time.thread_time()
        stage.draw(crops.batch(0, step, PAPER_BATCH), step)
        times.append(time.thread_time() - began)
    return 1e3 * min(times)


def step_ms(adam: torch.optim.Adam) -> float:
    """Milliseconds of one update, the shortest of UPDATES after one that is not counted."""
    adam.step()
    times = []
    for _ in range(UPDATES):
        began = time.perf_counter()
        adam.step()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def resident(which: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{which}:"))


def main(
    preset_name: str = "paper", scale: str = "8", steps: str = "2", crop: str = "", stages: str = ",".join(STAGES)
) -> None:
    print(f"preset {preset_name}, x{scale}, batch 1, float32, {multiprocessing.cpu_count()} cores")
    print(
        "| stage | crop, HR voxels | s per step | TFLOP per step | GFLOP/s | before | peak | GPU days (estimate) "
        "| Adam, ms | not fused, ms | drawing 8, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for stage in stages.split(","):
        side = int(crop or STAGES[stage])
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            cost = pool.submit(measure, stage, preset_name, int(scale), int(steps), side).result()
        days = cost.flops * PAPER_BATCH * PAPER_STEPS / (GPU_FLOPS * UTILISATION) / 86400
        print(
            f"| {stage} | {side} | {cost.seconds:.2f} | {cost.flops / 1e12:.3g} "
            f"| {cost.flops / cost.seconds / 1e9:.0f} "
            f"| {cost.before / 2**30:.2f} GiB | {cost.peak / 2**30:.2f} GiB | {days:.1f} "
            f"| {cost.fused_ms:.1f} | {cost.not_fused_ms:.1f} | {cost.drawing_ms:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
