"""Arrays in, arrays out: the padded LR voxels of a slab become its SR voxels. The only door to models/."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import models
from pipeline.base.errors import NetworkError, TooLargeError
from pipeline.base.geometry import ZYX, Box
from pipeline.config.volume import NetworkConfig
from pipeline.inference.weights import locate
from pipeline.plan.plan import Lattice, Plan, Slab
from pipeline.plan.price import NOTHING, Footprint
from pipeline.process import allocator, device, watchdog

DEVICE_LOCK = threading.Lock()
"""Held by one slab at a time around `super_resolve`: two slabs in flight overlap their I/O, never the device."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network by everything that changes its output. `weights_sha256` is empty for networks without weights; `weights` is
    only where they lie, and changes nothing. `weights_licence` is that of the data they were trained on, for the provenance.
    """

    name: str
    scale: int
    preset: str | None
    weights_sha256: str
    precision: str
    lattice: Lattice
    weights: str = ""
    weights_licence: str = ""


def describe(config: NetworkConfig) -> NetworkSpec:
    """What volume.yaml asks for, with defaults filled in. Imports no torch. Raises NetworkError."""
    traits = models.NETWORKS.get(config.name)
    if traits is None:
        known = ", ".join(models.NETWORKS)
        raise NetworkError(
            f"network.name {config.name} is not in this version", f"one of {known}", "Set network.name to one of them"
        )
    cell = traits.cell if config.cell is None else config.cell
    halo = traits.halo[config.scale] if config.halo is None else config.halo
    if halo < traits.min_halo:
        raise NetworkError(
            f"network.halo {halo} would show the cell borders of {config.name}",
            f"at least {traits.min_halo} LR voxels",
            "Raise or remove network.halo",
        )
    lattice = Lattice(cell, halo, traits.window, traits.padding)
    if traits.weights:
        return _with_weights(config, lattice)
    given = [key for key in ("preset", "weights", "sha256") if getattr(config, key) is not None]
    if given:
        raise NetworkError(
            f"network.{given[0]} is set, but {config.name} has no weights", "", f"Remove network.{given[0]}"
        )
    if config.precision != "float32":
        raise NetworkError(
            f"network.precision {config.precision} for {config.name}", "float32", "Remove network.precision"
        )
    return NetworkSpec(config.name, config.scale, None, "", config.precision, lattice)


def _with_weights(config: NetworkConfig, lattice: Lattice) -> NetworkSpec:
    """The hash of the weights file, after a look at what its head says. Raises NetworkError."""
    weights = config.weights
    if weights is None:
        raise NetworkError(
            f"network.weights is not given, and {config.name} needs weights",
            "builtin, or a weights file",
            "Give one of them",
        )
    builtin = weights.partition(":")[0] == "builtin"
    preset = config.preset or (models.BUILTIN_PRESET if builtin else "paper")
    file = weights
    if builtin:
        try:
            file = models.builtin(weights, config.scale).as_uri()
        except ValueError as error:
            raise NetworkError(
                f"network.weights: {error}", "one of them", "Set network.weights and network.scale to one of them"
            ) from None
    path, sha256 = locate(file, config.sha256)
    licence = ""
    if path.suffix == ".safetensors":
        with _as_network_errors():
            metadata = models.read_metadata(path)
        if (metadata.scale, metadata.preset) != (config.scale, preset):
            raise NetworkError(
                f"network.weights {path} is for scale {metadata.scale}, preset {metadata.preset or 'custom'}",
                f"scale {config.scale}, preset {preset}",
                "Set network.scale and network.preset to the file's, or take another file",
            )
        licence = metadata.licence
    return NetworkSpec(config.name, config.scale, preset, sha256, config.precision, lattice, weights, licence)


def footprint(spec: NetworkSpec) -> Footprint:
    """What the network holds beside its weights, by formula. Imports no torch."""
    tile, state = models.held_bytes(
        spec.name, spec.scale, spec.preset, spec.lattice.tile, 4 if spec.precision == "float32" else 2
    )
    return Footprint(tile, spec.lattice.window * state)


def _weights_file(spec: NetworkSpec) -> Path:
    """Where this machine has the weights: those that come with emsr lie wherever it is installed."""
    if spec.weights.partition(":")[0] == "builtin":
        return models.builtin(spec.weights, spec.scale)
    return locate(spec.weights, spec.weights_sha256)[0]


@contextmanager
def _as_network_errors() -> Iterator[None]:
    try:
        yield
    except models.WeightsError as error:
        raise NetworkError(str(error)) from None
    except OSError as error:
        raise NetworkError(f"network.weights cannot be read: {error}", "a readable file", "Check the path") from None


class Network:
    """A network on its device, ready to run. Building it is slow; run it under DEVICE_LOCK.

    One process uses one device: GPU number EMSR_DEVICE (0) where torch sees one, else one core: more cores are more workers.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        self.spec = spec
        self.device = device.pick()
        device.fix_rounding(self.device)
        self.module = models.build(spec.name, spec.scale, spec.preset)
        if spec.weights:
            path = _weights_file(spec)
            with _as_network_errors():
                models.load(path, self.module)
        self.module.to(self.device).eval()
        self.weight_bytes = sum(value.nbytes for value in self.module.state_dict().values())

    @property
    def resident(self) -> Footprint:
        """What of the footprint is this process's own memory: nothing where a GPU holds it."""
        return footprint(self.spec) if self.device.type == "cpu" else NOTHING

    def refuse_too_large(self, plan: Plan) -> None:
        """Raises TooLargeError where no slab of `plan` can be computed even with the device to itself."""
        most = device.room(self.device).most
        if _needed(self.spec, plan) > most:
            raise _too_large(self.spec, plan, most)

    def tile(
        self,
        sections: NDArray[np.uint8],
        ids: Sequence[int],
        out: NDArray[np.uint8],
        keep: tuple[slice, slice],
        ring: Ring,
    ) -> None:
        """One tile through all its sections: (D + window - 1, T, T) uint8 in, (D, rh, rw) uint8 into `out`.

        `ids` name the sections; `keep` cuts the cell out of the (rT, rT) output. Each section is encoded once: `ring` holds the
        states that the last windows used, from an earlier call for the sections that follow each other in z too.
        """
        import torch

        window = self.spec.lattice.window
        transfer = device.Transfer(self.device, sections, out)
        with torch.inference_mode(), self._precision():
            for z in range(len(out)):
                watchdog.beat()
                names = ids[z : z + window]
                for at, name in enumerate(names, start=z):
                    if name not in ring:
                        ring[name] = self.module.encode_section(transfer.take(at))  # type: ignore[operator]
                        self._settle()
                for old in [name for name in ring if name not in names]:
                    del ring[old]
                if z + 1 < len(out) and ids[z + window] not in ring:
                    transfer.fetch(z + window)
                sr = self.module.fuse_window([ring[name] for name in names])  # type: ignore[operator]
                transfer.put(z, sr[0, 0][keep])
                del sr
                self._settle()
        transfer.finish()

    def _settle(self) -> None:
        """Return what encoding or fusing left free in the heap: else each finds what the other left beside its own."""
        if self.resident.ring:
            allocator.give_back()

    def _precision(self) -> AbstractContextManager[object]:
        import torch

        if self.spec.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.spec.precision))


Ring = dict[int, object]
"""Encoded sections of one tile by section number."""

Rings = dict[tuple[int, int], Ring]
"""A ring for every tile, by the (y, x) of its cell: carried from slab to slab of a lease, so that a z-halo costs no network time."""


def pad_laterally(voxels: NDArray[np.uint8], have: Box, want: Box, mode: str) -> NDArray[np.uint8]:
    """`voxels` hold the real voxels of `have`; the result covers `want` in y and x, invented by `mode` outside.

    `mirror` reflects about the volume's face (the end voxel twice), as often as it takes; `edge` repeats the end voxel.
    """
    rows = _sources(want.start.y, want.stop.y, have.start.y, have.stop.y, mode)
    cols = _sources(want.start.x, want.stop.x, have.start.x, have.stop.x, mode)
    padded: NDArray[np.uint8] = voxels[:, rows][:, :, cols]
    return padded


def _sources(start: int, stop: int, low: int, high: int, mode: str) -> NDArray[np.intp]:
    i, n = np.arange(start, stop) - low, high - low
    if mode == "edge":
        return np.clip(i, 0, n - 1)
    i = np.mod(i, 2 * n)
    return np.where(i < n, i, 2 * n - 1 - i)


def super_resolve(
    network: Network, lr: NDArray[np.uint8], ids: Sequence[int], plan: Plan, slab: Slab, rings: Rings | None = None
) -> NDArray[np.uint8]:
    """SR voxels of `slab`. `lr` holds its sections with z-halo (ends and bad sections already replaced: `ids` are the numbers
    of the sections that stand there), laterally slab.read.

    Works tile by tile on the lattice, so the result is the same for every slab that contains a voxel (law 1). `rings` of the
    slab before in z save encoding the shared sections again; the bytes are the same with and without.

    Raises TooLargeError where the device has no memory for a tile.
    """
    lattice, scale = plan.lattice, plan.scale
    have = Box(ZYX(0, slab.read.start.y, slab.read.start.x), ZYX(len(lr), slab.read.stop.y, slab.read.stop.x))
    out = np.empty(tuple(slab.lr.shape.lateral(scale)), np.uint8)
    for cell in lattice.cells(slab.lr):
        want = lattice.padded(cell)
        tile = pad_laterally(lr[_crop(want, have)], have.intersect(_laterally(want, have)), want, lattice.padding)
        keep = cell.lateral(scale).slices(want.start.lateral(scale))
        place = cell.lateral(scale).slices(slab.lr.start.lateral(scale))
        ring: Ring = {} if rings is None else rings.setdefault((cell.start.y, cell.start.x), {})
        with _as_too_large(network, plan):
            network.tile(np.ascontiguousarray(tile), ids, out[place], keep[1:], ring)
    return out


def _needed(spec: NetworkSpec, plan: Plan) -> int:
    """Bytes beside the weights for one slab at a time."""
    held = footprint(spec)
    return held.tile + held.rings(dataclasses.replace(plan, lattice=spec.lattice))


@contextmanager
def _as_too_large(network: Network, plan: Plan) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not device.out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the failed tile's maps are memory that is there
        raise _too_large(network.spec, plan, device.room(network.device).now) from None


def _too_large(spec: NetworkSpec, plan: Plan, there: int) -> TooLargeError:
    """`there`: bytes beside the weights."""
    lattice = spec.lattice
    smaller = (
        dataclasses.replace(spec, lattice=dataclasses.replace(lattice, cell=cell))
        for cell in range(lattice.cell - 8, 0, -8)
    )
    fits = next((s.lattice.cell for s in smaller if _needed(s, plan) <= there), None)
    return TooLargeError(
        f"network.cell {lattice.cell} with halo {lattice.halo}: a tile of {lattice.tile} x {lattice.tile} LR voxels, with the encoded sections of its slab, "
        f"needs {_needed(spec, plan) / 1e9:.2f} GB beside the weights, and {there / 1e9:.2f} GB are there",
        "a tile that fits" if fits is None else f"network.cell {fits} or less, with the same halo",
        "Take another device, or a smaller work.slab_shape"
        if fits is None
        else "Set it, with another target.url; or free memory there",
    )


def _laterally(want: Box, have: Box) -> Box:
    return Box(ZYX(have.start.z, want.start.y, want.start.x), ZYX(have.stop.z, want.stop.y, want.stop.x))


def _crop(want: Box, have: Box) -> tuple[slice, slice, slice]:
    return have.intersect(_laterally(want, have)).slices(have.start)


def back_projection_error(lr: NDArray[np.uint8], sr: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """|mean of each r x r block of SR - measured LR voxel|, grey levels rounded half up: (D, h, w) from (D, h, w), (D, rh, rw).

    What the upsampled image claims, measured again with the coarse pixel: 0 where it agrees with the microscope.
    """
    d, h, w = lr.shape
    sums = sr.reshape(d, h, scale, w, scale).sum(axis=(2, 4), dtype=np.int32)
    area = scale * scale
    error: NDArray[np.uint8] = ((2 * np.abs(sums - lr.astype(np.int32) * area) + area) // (2 * area)).astype(np.uint8)
    return error
