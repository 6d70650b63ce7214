"""Trains each stage on this machine's device for a while: steps a second, TFLOP/s, and how busy the device is.

    python benchmarks/gpu/training.py FOLDER STAGES SECONDS PRECISIONS [smoke]
    python benchmarks/gpu/training.py /tmp/t flow,vqgan,indexer,network 60 tf32,bfloat16

Every stage runs `seconds` in each precision (`chosen` is what `emsr train` takes without the key) with the crops and
the batch of the paper, x8, preset paper, on a phantom; the adversarial and the multi-reference losses are on. A batch
that finds no memory is halved. The networks of earlier stages and VGG19 are untrained: their values change no time. The
loop and its threads are those of `emsr train`; nothing is written but the inputs, into FOLDER. FLOPs are counted by
torch in one step (forward and backward, one multiply-add is two; sampling is not counted), and steps are timed after
the first WARM ones. `smoke` takes preset small, batch 1, small crops and three steps. Every line of output is one JSON
object; one with `error` says why there is no result.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode
from volume import write

from examples.make_phantom import phantom
from models.config import preset
from models.flow import SPyNet
from models.indexer import Indexer
from models.training.loop import Progress
from models.training.parts import Part, save_part
from models.training.ranks import ALONE
from models.vqgan import VQGAN
from pipeline.base.errors import UserError
from pipeline.config import stage as stage_yaml
from pipeline.process import device
from pipeline.training.run import Prepared, make_loop, prepare_run, with_precision

CROPS = {"flow": 256, "vqgan": 512, "indexer": 1024, "network": 256}
"""HR voxels (network.md, section 4). The paper does not train the flow."""
BATCH, SCALE, SIDE, WARM = 8, 8, 1280, 3
SMOKE_CROP, SMOKE_STEPS = 96, 3
VGG = {0: (64, 3), 2: (64, 64), 5: (128, 64), 7: (128, 128), 10: (256, 128), 12: (256, 256), 14: (256, 256)}
"""Channels after and before the convolutions of VGG19 to relu3_4, by torchvision's numbers; 16 is as 14."""


def inputs(folder: Path, preset_name: str) -> dict[str, str]:
    """Make sections, untrained parts and VGG19 in `folder`. Returns the parts' names by the key of `network`."""
    folder.mkdir(parents=True, exist_ok=True)
    small = phantom((16, 256, 256))
    write(folder / "hr.zarr", np.tile(small, (1, SIDE // 256, SIDE // 256)), (40.0, 10.0, 10.0))
    params = preset(SCALE, preset_name)
    parts = {
        "vqgan": VQGAN(params.prior),
        "indexer": Indexer(params.prior, SCALE),
        "flow": SPyNet(params.flow_widths, params.flow_levels),
    }
    for kind, module in parts.items():
        path = folder / f"{kind}-{preset_name}.safetensors"
        save_part(path, Part(kind, params, "CC0", module.state_dict(), {}))
    shapes = VGG | {16: VGG[14]}
    vgg = {f"features.{n}.weight": 0.05 * torch.randn(*shape, 3, 3) for n, shape in shapes.items()}
    vgg |= {f"features.{n}.bias": torch.zeros(shape[0]) for n, shape in shapes.items()}
    save_file(vgg, folder / "vgg.safetensors")
    return {kind: f"{kind}-{preset_name}.safetensors" for kind in parts}


def prepared(folder: Path, parts: dict[str, str], stage: str, precision: str, batch: int, smoke: bool) -> Prepared:
    """What `emsr train` makes of a stage.yaml with these settings. Raises UserError."""
    preset_name = "small" if smoke else "paper"
    network: dict[str, Any] = {"scale": SCALE, "preset": preset_name}
    if stage == "indexer":
        network["vqgan"] = parts["vqgan"]
    if stage == "network":
        network |= parts | ({} if smoke else {"untrained": ["vgg19"]})
    body = {
        "stage": stage,
        "output": "nothing",
        "data": {
            "train": [{"url": "hr.zarr"}],
            "licence": "CC0",
            "crop": SMOKE_CROP if smoke else CROPS[stage],
        },
        "network": network,
        "losses": {"reference": 0.001, "vgg": "vgg.safetensors"} if stage == "network" else {"adversarial_from": 0},
        "steps": 1_000_000,
        "batch": batch,
        **({} if precision == "chosen" else {"precision": precision}),
    }
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(body))
    return with_precision(prepare_run(stage_yaml.load(path)), None)


def measure(what: Prepared, seconds: float, most_steps: int) -> dict[str, Any]:
    """Steps for `seconds`, or `most_steps`."""
    cuda = bool(what.gpus)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    loop = make_loop(what, ALONE)
    loop.step = 1  # every sixteenth step regularises the critic by a gradient that the counter cannot follow
    drawn = loop.stage.draw(what.crops.batch(0, 1, what.config.batch), 1)
    with FlopCounterMode(display=False) as counter:
        loop._one_step(drawn, 1e-4)
    tflop = counter.get_total_flops() / 1e12
    times: list[float] = []
    last: list[Progress] = []
    end = time.monotonic() + seconds

    def tell(progress: Progress) -> None:
        times.append(time.monotonic())
        last[:] = [progress]

    def enough() -> bool:
        return len(times) >= most_steps or (time.monotonic() > end and len(times) > WARM + 1)

    loop.run(what.crops, [], lambda *_: None, tell, stopped=enough)
    warm = min(WARM, len(times) - 2)
    rate = (len(times) - 1 - warm) / (times[-1] - times[warm])
    return {
        "device": device.describe(loop.fabric.device),
        "steps": len(times),
        "steps_per_s": round(rate, 3),
        "tflop_per_step": round(tflop, 4),
        "tflops": round(tflop * rate, 3),
        "device_busy": round(last[0].busy or 0.0, 3),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def tried(
    folder: Path, parts: dict[str, str], stage: str, precision: str, seconds: float, smoke: bool
) -> dict[str, Any]:
    """Measures with the largest batch that finds memory, BATCH at most."""
    batch = 1 if smoke else BATCH
    facts: dict[str, Any] = {"training": stage, "precision": precision}
    while True:
        try:
            what = prepared(folder, parts, stage, precision, batch, smoke)
            config = what.config
            facts |= {"preset": config.network.preset, "precision": config.precision, "batch": batch}
            facts["crop"] = config.data.crop
            return facts | measure(what, seconds, SMOKE_STEPS if smoke else 1_000_000)
        except (RuntimeError, MemoryError, UserError) as error:
            if not device.out_of_memory(error) or batch == 1:
                return facts | {"error": str(error).splitlines()[0]}
        batch //= 2
        torch.cuda.empty_cache()


def main(where: str, stages: str, seconds: str, precisions: str, smoke: str = "") -> None:
    folder = Path(where).resolve()
    parts = inputs(folder, "small" if smoke else "paper")
    for stage in stages.split(","):
        for precision in precisions.split(","):
            found = tried(folder, parts, stage, precision, float(seconds), smoke == "smoke")
            print(json.dumps(found), flush=True)
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
