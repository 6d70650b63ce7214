"""A network on its device: a batch of tiles through all their sections."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

import models
from pipeline.base.geometry import Box
from pipeline.base.waits import heartbeat
from pipeline.inference.describe import as_network_errors, weights_path
from pipeline.inference.footprint import footprint, needed_bytes, too_large
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.plan import Plan
from pipeline.plan.price import Footprint
from pipeline.process import allocator, device

if TYPE_CHECKING:
    import torch

    from pipeline.inference.graphs import Graphs

SectionCache = dict[int, object]
"""The encoded sections of a batch of tiles, by section number."""


class Network:
    """A network on its device, ready to run. Building it is slow. Only one thread at a time may run it (DEVICE_LOCK).

    One process uses one device: GPU number EMSR_DEVICE (0) where torch sees one, else one core of the CPU. More cores
    are more workers. `on` names another one.
    """

    def __init__(self, spec: NetworkSpec, on: torch.device | None = None) -> None:
        self.spec = spec
        self.device = on or device.pick()
        self._gpu = self.device.type == "cuda"
        device.fix_rounding(self.device, spec.precision)
        self.module = models.build(spec.name, spec.scale, spec.preset)
        if spec.weights:
            path = weights_path(spec)
            with as_network_errors():
                models.load(path, self.module)
        models.lower(self.module, spec.precision)
        self.module.to(self.device).eval()
        self._landings = device.Landings(self.device)
        self._graphs: Graphs | None = None
        if self._gpu and spec.preset is not None:
            from pipeline.inference.graphs import Graphs

            self._graphs = Graphs(functions=2)
        self.weight_bytes = sum(value.nbytes for value in self.module.state_dict().values())

    @property
    def notes(self) -> tuple[str, ...]:
        """What this process does otherwise than others do, in a line each."""
        return tuple(self._graphs.notes) if self._graphs is not None else ()

    @property
    def resident(self) -> Footprint:
        """What of the footprint is this process's own memory: where a GPU holds it, what its grey levels pass
        through.
        """
        held = footprint(self.spec, self._gpu)
        return held.of_host if self._gpu else held

    def refuse_too_large(self, plan: Plan) -> None:
        """Raises TooLargeError where the slab in the region's middle needs more than the device has with nobody else
        there.
        """
        slab = plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2)).lr
        available = device.free_memory(self.device).alone
        if needed_bytes(self.spec, slab, self._gpu) > available:
            raise too_large(self.spec, slab, available, self._gpu)

    @contextmanager
    def memory_errors(self, slab: Box) -> Iterator[None]:
        """What says that memory could not be had becomes a TooLargeError; `slab` is the slab's box of LR voxels."""
        try:
            yield
        except Exception as error:
            if not device.out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # the failed tile's feature maps are memory that is there
            raise too_large(self.spec, slab, device.free_memory(self.device).now, self._gpu) from None

    def tiles(self, voxels: NDArray[np.uint8], sections: Sequence[int], cache: SectionCache) -> device.Landing:
        """A batch of tiles through all their sections: uint8 (D + window - 1, B, T, T) in, uint8 (D, B, rC, rC) out,
        where C is the lattice's cell.

        `sections` are the numbers of the sections. Each is encoded once: `cache` holds those that the last windows
        used, also from an earlier call for the sections before in z. On a GPU this returns when everything is queued.
        """
        import torch

        lattice = self.spec.lattice
        depth, side = len(voxels) - lattice.window + 1, lattice.cell * self.spec.scale
        with torch.inference_mode(), device.current(self.device):
            lr = device.send(self.device, voxels)
            landing = self._landings.take((depth, voxels.shape[1], side, side))
            total = torch.zeros((), device=self.device)
            for z in range(depth):
                heartbeat()
                numbers = sections[z : z + lattice.window]
                for at, number in enumerate(numbers, start=z):
                    if number not in cache:
                        cache[number] = self._call(self.encode, lr[at])
                        self._trim()
                for old in [number for number in cache if number not in numbers]:
                    del cache[old]
                grey, sums = self._call(self.fuse, [cache[number] for number in numbers])
                landing.put(z, grey)
                total += sums
                del grey, sums
                self._trim()
            landing.close(total)
        return landing

    def _call(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs) if self._graphs is None else self._graphs.call(function, *inputs)

    def encode(self, section: torch.Tensor) -> object:
        """A section of every tile, uint8 (B, T, T) -> its state."""
        return self.module.encode_section(section.float().div_(255)[:, None])  # type: ignore[operator]

    def fuse(self, states: list[object]) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of a window -> grey levels of the cells, uint8 (B, rC, rC), rounded on the device; and the sum of
        the values that they were made from.
        """
        import torch

        sr = self.module.fuse_window(states, self.spec.lattice.halo).float()  # type: ignore[operator]
        total = sr.sum()
        grey = sr[:, 0].mul_(255).round_().clamp_(0, 255)  # in place: the memory of one more map costs more than this
        if not self._gpu:
            grey = grey.to(torch.int16)  # PyTorch's CPU operator makes 8 bits of float32 one voxel at a time
        return grey.to(torch.uint8), total

    def _trim(self) -> None:
        """Return what encoding or fusing left free in the heap: else each finds what the other left beside its own."""
        if self.resident.cache_bytes:
            allocator.trim()
