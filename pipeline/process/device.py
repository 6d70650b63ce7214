"""The device that a process computes on: which one, what memory is there, and how sections get to it and grey levels
back.
"""

from __future__ import annotations

import math
import os
import platform
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import DataError

if TYPE_CHECKING:
    import torch

_OUT_OF_MEMORY = ("DefaultCPUAllocator: ", "_STATUS_ALLOC_FAILED")
"""Parts of the texts of RuntimeErrors that mean it: of torch's allocator on a CPU, of cuBLAS and cuDNN."""


def pick() -> torch.device:
    """GPU number EMSR_DEVICE (0) where torch sees one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("EMSR_DEVICE", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def describe(device: torch.device) -> str:
    """The kind of device, such as `cuda NVIDIA H100 80GB HBM3` or `cpu x86_64`."""
    import torch

    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else f"cpu {platform.machine()}"


@dataclass(frozen=True)
class Facts:
    """What decides how a network may be computed on a device: its kind as `describe` says it, all of its memory, and
    the precisions that it computes in, in their order.
    """

    kind: str
    memory_bytes: int
    precisions: tuple[str, ...]


def facts(device: torch.device) -> Facts:
    """The facts of a device. A CPU has no float16: it takes five times as long as in float32. A GPU has it from compute
    capability 7.0 on, tf32 and bfloat16 from 8.0 on.
    """
    import psutil
    import torch

    if device.type == "cpu":
        return Facts(describe(device), psutil.virtual_memory().total, ("float32", "bfloat16"))
    found = torch.cuda.get_device_properties(device)
    least = {"float32": (0, 0), "tf32": (8, 0), "bfloat16": (8, 0), "float16": (7, 0)}
    able = tuple(precision for precision, capability in least.items() if (found.major, found.minor) >= capability)
    return Facts(describe(device), found.total_memory, able)


def torch_version() -> str:
    """The version of torch with the CUDA that it was built for, if any."""
    import torch

    version = str(torch.__version__)
    return f"{version} (CUDA {torch.version.cuda})" if torch.version.cuda else version


def fix_rounding(device: torch.device, precision: str) -> None:
    """Set torch so that workers with the same kind of device make the same bytes (law 1), and float32 is float32.

    On a CPU one thread: their number changes the last bits of transposed convolutions. On a GPU PyTorch would compute
    float32 convolutions in TF32, ten bits of mantissa, and let cuDNN take operators whose sums depend on the order of
    threads. What other precisions leave in float32 is multiplied in TF32.
    """
    import torch

    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def current(device: torch.device) -> AbstractContextManager[object]:
    """Within it, streams and events of this thread are those of `device`."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class FreeMemory(NamedTuple):
    """Bytes that this process can still take on its device: `now`, and `alone`, where no other process held any."""

    now: int
    alone: int


def free_memory(device: torch.device) -> FreeMemory:
    """On a CPU, what machine, container and `ulimit -v` leave."""
    import psutil
    import torch
    from distributed.system import memory_limit

    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return FreeMemory(free + held - used, total - used)
    size = psutil.Process().memory_info()
    alone = int(memory_limit()) - size.rss
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        alone = min(alone, limit - size.vms)
    return FreeMemory(min(psutil.virtual_memory().available, alone), alone)


def load_libraries(device: torch.device) -> None:
    """On a GPU: make the process's context, and load the libraries that convolve and multiply.

    They take some 0.7 GB of the process's own memory with the first kernel. On a CPU all is there.
    """
    import torch

    if device.type == "cuda":
        square = torch.ones(1, 1, 8, 8, device=device)
        torch.nn.functional.conv2d(square, square)
        torch.mm(square[0, 0], square[0, 0])
        torch.cuda.synchronize(device)


def out_of_memory(error: Exception) -> bool:
    """Whether `error` says that memory could not be had."""
    import torch

    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in _OUT_OF_MEMORY)
    )


def send(device: torch.device, sections: NDArray[np.uint8]) -> torch.Tensor:
    """Sections of a batch of tiles on the device, uint8 (S, B, T, T), one byte per voxel. To a GPU they go through
    pinned memory, and nothing waits; a CPU has them already.
    """
    import torch

    here = torch.from_numpy(sections)
    return here if device.type == "cpu" else here.pin_memory().to(device, non_blocking=True)


class Landing:
    """Where the grey levels of a batch of tiles arrive: uint8 (D, B, h, w). On a GPU nothing waits before `finish`."""

    def __init__(self, memory: torch.Tensor, shape: tuple[int, ...], release: Callable[[torch.Tensor], None]) -> None:
        import torch

        pinned = memory.is_pinned()
        self._memory, self._release = memory, release
        self._grey = memory[: math.prod(shape)].view(shape)
        self._total = torch.zeros((), pin_memory=pinned)
        self._arrived = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    @property
    def waits(self) -> bool:
        """Whether `finish` may have to wait."""
        return self._arrived is not None

    def put(self, z: int, grey: torch.Tensor) -> None:
        """Section `z` of every tile, uint8 (B, h, w) on the device."""
        self._grey[z].copy_(grey, non_blocking=True)

    def close(self, total: torch.Tensor) -> None:
        """All sections were put; `total` is the sum of all values that they were made from: one look at it shows
        whether every value is a number.
        """
        self._total.copy_(total, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()

    @contextmanager
    def finish(self) -> Iterator[NDArray[np.uint8]]:
        """Wait until every section has arrived. The memory is another's after the block.

        Raises DataError where a section holds what is no number, which grey levels would hide.
        """
        try:
            if self._arrived is not None:
                self._arrived.synchronize()
            if not math.isfinite(float(self._total)):
                raise DataError(
                    "the network made values that are no numbers; "
                    "take network.precision float32 (or bfloat16), or other weights"
                )
            yield self._grey.numpy()
        finally:
            self._release(self._memory)


class Landings:
    """The memory of all landings of a device, pinned where it is a GPU: kept, since pinning takes long."""

    def __init__(self, device: torch.device) -> None:
        self._pinned, self._free = device.type == "cuda", list["torch.Tensor"]()

    def take(self, shape: tuple[int, ...]) -> Landing:
        """A landing in memory that is free, or new."""
        import torch

        size = math.prod(shape)
        at = next((at for at, memory in enumerate(self._free) if memory.numel() >= size), None)
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned) if at is None else self._free.pop(at)
        return Landing(memory, shape, self._free.append)
