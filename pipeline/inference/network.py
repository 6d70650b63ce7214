"""A network on its device: one tile through all its sections."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

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

SectionCache = dict[int, object]
"""The encoded sections of one tile, by section number."""


class Network:
    """A network on its device, ready to run. Building it is slow. Only one thread at a time may run it (DEVICE_LOCK).

    One process uses one device: GPU number EMSR_DEVICE (0) where torch sees one, else one core of the CPU. More cores
    are more workers.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec
        self.device = device.pick()
        device.fix_rounding(self.device)
        self.module = models.build(spec.name, spec.scale, spec.preset)
        if spec.weights:
            path = weights_path(spec)
            with as_network_errors():
                models.load(path, self.module)
        self.module.to(self.device).eval()
        self.weight_bytes = sum(value.nbytes for value in self.module.state_dict().values())

    @property
    def resident(self) -> Footprint:
        """What of the footprint is this process's own memory: nothing where a GPU holds it."""
        return footprint(self.spec) if self.device.type == "cpu" else Footprint()

    def refuse_too_large(self, plan: Plan) -> None:
        """Raises TooLargeError where the slab in the region's middle needs more than the device has with nobody else
        there.
        """
        slab = plan.slab(plan.slab_at(plan.region.start + plan.region.shape // 2)).lr
        available = device.free_memory(self.device).alone
        if needed_bytes(self.spec, slab) > available:
            raise too_large(self.spec, slab, available)

    @contextmanager
    def memory_errors(self, slab: Box) -> Iterator[None]:
        """What says that memory could not be had becomes a TooLargeError; `slab` is the slab's box of LR voxels."""
        try:
            yield
        except Exception as error:
            if not device.out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # the failed tile's feature maps are memory that is there
            raise too_large(self.spec, slab, device.free_memory(self.device).now) from None

    def tile(
        self,
        voxels: NDArray[np.uint8],
        sections: Sequence[int],
        out: NDArray[np.uint8],
        keep: tuple[slice, slice],
        cache: SectionCache,
    ) -> None:
        """One tile through all its sections: uint8 (D + window - 1, T, T) in, uint8 (D, rh, rw) into `out`.

        `sections` are the numbers of the sections. `keep` cuts the cell out of the (rT, rT) output. Each section is
        encoded once: `cache` holds those that the last windows used, also from an earlier call for the sections before
        in z.
        """
        import torch

        window = self.spec.lattice.window
        transfer = device.Transfer(self.device, voxels, out)
        with torch.inference_mode(), self._precision():
            for z in range(len(out)):
                heartbeat()
                numbers = sections[z : z + window]
                for at, number in enumerate(numbers, start=z):
                    if number not in cache:
                        cache[number] = self.module.encode_section(transfer.take(at))  # type: ignore[operator]
                        self._trim()
                for old in [number for number in cache if number not in numbers]:
                    del cache[old]
                if z + 1 < len(out) and sections[z + window] not in cache:
                    transfer.fetch(z + window)
                sr = self.module.fuse_window([cache[number] for number in numbers])  # type: ignore[operator]
                transfer.put(z, sr[0, 0][keep])
                del sr
                self._trim()
        transfer.finish()

    def _trim(self) -> None:
        """Return what encoding or fusing left free in the heap: else each finds what the other left beside its own."""
        if self.resident.cache_bytes:
            allocator.trim()

    def _precision(self) -> AbstractContextManager[object]:
        import torch

        if self.spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.spec.precision))
