"""What a training computes on and in: its GPUs, their memory, and the precision that was asked for or is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.plugins.precision import MixedPrecision, Precision

from pipeline.base.errors import UserError
from pipeline.config.stage import StageConfig
from pipeline.process import device

MIXED = {"bfloat16": "bf16-mixed", "float16": "16-mixed"}
"""Lightning Fabric's words. Weights and their updates stay float32, as in the other precisions."""
TF32_CAPABILITY = (8, 0)
"""The first CUDA compute capability whose tensor cores take TF32, and bfloat16."""


def gpus(config: StageConfig) -> int:
    """How many GPUs the run takes; 0 on a CPU. Raises UserError where there are too few."""
    found = torch.cuda.device_count() if config.accelerator != "cpu" else 0
    if config.accelerator == "cpu" or (config.accelerator == "auto" and not found):
        return 0
    if found < config.devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        of = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise UserError(
            f"this machine has {found} GPUs that can be used{of}",
            f"devices: {config.devices}, each of which takes a GPU of its own",
            "Use fewer devices, or accelerator: cpu",
        )
    return config.devices


def check(precision: str, count: int, do: str) -> None:
    """Raise UserError, which ends with what to `do`, where `count` GPUs, or a CPU where that is 0, cannot compute in
    `precision`.
    """
    if precision not in _possible(count):
        where = "this GPU" if count == 1 else f"one of these {count} GPUs" if count else "a CPU"
        raise UserError(f"precision {precision}: {where} does not compute in it", " or ".join(_possible(count)), do)


def choose(count: int) -> str:
    """The precision where none was stated: tf32 where every GPU has it, else float32."""
    return "tf32" if "tf32" in _possible(count) else "float32"


class Mixed(MixedPrecision):  # type: ignore[misc]
    """Autocast alone. Fabric would also round a network's inputs: the image that SR is added to, and with the images
    the positions at which the flow samples them, to a quarter of a voxel and worse.
    """

    def convert_input(self, data: Any) -> Any:
        return data


def of_fabric(precision: str, count: int) -> Precision:
    """How Lightning Fabric runs forward and backward passes on `count` GPUs, or a CPU where that is 0."""
    if precision not in MIXED:
        return Precision()
    return Mixed(MIXED[precision], "cuda" if count else "cpu")


def set_rounding(precision: str, count: int) -> None:
    """Let `count` GPUs compute products of float32 numbers in TF32 unless `precision` is float32; by default torch does
    so in convolutions. In mixed precision this concerns what autocast leaves in float32. A CPU is left as it is.
    """
    allowed = bool(count) and precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def check_memory(config: StageConfig, sections: int) -> None:
    """Raise UserError where the samples of one step, of `sections` each, are more than this machine's memory."""
    needed = 4 * config.batch * config.devices * sections * config.data.crop**2  # float32
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise UserError(
            f"batch {config.batch} of crop {config.data.crop}: the samples of one step take {needed / 1e9:,.0f} GB",
            f"at most this machine's {total / 1e9:,.0f} GB",
            "Use a smaller batch or a smaller crop",
        )


@contextmanager
def memory(config: StageConfig) -> Iterator[None]:
    """Within the block, memory that could not be had becomes a UserError that names what takes it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not device.out_of_memory(error):
            raise
        raise UserError(
            f"no memory is left for batch {config.batch} of crop {config.data.crop} ({str(error).splitlines()[0]})",
            "a device that holds the maps of all samples of a step",
            "Use a smaller batch (with as many more devices a run goes on) or a smaller crop, or bfloat16 as precision",
        ) from None


def _possible(count: int) -> list[str]:
    if not count:
        return ["float32", "bfloat16"]  # Fabric would take bfloat16 for float16, with a warning
    tf32 = all(torch.cuda.get_device_capability(number) >= TF32_CAPABILITY for number in range(count))
    return ["float32", "tf32", "bfloat16", "float16"] if tf32 else ["float32", "bfloat16", "float16"]
