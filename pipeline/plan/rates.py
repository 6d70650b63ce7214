"""What networks took on devices where they were measured, and which of it holds for a plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.price import Calls


@dataclass(frozen=True)
class Rate:
    """Milliseconds that a device took for one tile: to encode a section, and to fuse a window.

    `cell` and `halo` are in LR voxels. `batch` tiles were computed at once, and each counts its share of the time.
    """

    name: str
    preset: str | None
    scale: int
    cell: int
    halo: int
    precision: str
    batch: int
    encode_ms: float
    fuse_ms: float

    @property
    def tile(self) -> int:
        """Rows, and columns, of the tile that was measured."""
        return self.cell + 2 * self.halo

    def __str__(self) -> str:
        return f"tile {self.tile}, batch {self.batch}"


@dataclass(frozen=True)
class MeasuredDevice:
    """A device with its rates. `kind` and `memory_bytes` are as in process/device; `how` says how it was measured."""

    kind: str
    memory_bytes: int
    date: str
    how: str
    rates: tuple[Rate, ...]

    @property
    def is_gpu(self) -> bool:
        """Whether it is no CPU."""
        return self.kind.startswith("cuda")

    def fits(self, network: NetworkSpec) -> dict[str, Fit]:
        """For each precision in which this network was measured, the rate whose tile, then batch, is nearest."""
        found: dict[str, list[Rate]] = {}
        for rate in self.rates:
            if (rate.name, rate.preset, rate.scale) == (network.name, network.preset, network.scale):
                found.setdefault(rate.precision, []).append(rate)
        return {precision: _nearest(rates, network) for precision, rates in found.items()}


@dataclass(frozen=True)
class Fit:
    """A rate for a network that may have another tile or batch than was measured.

    A tile takes `scaled` times as long as the measured one: the ratio of their voxels, 1 where it was measured itself.
    """

    rate: Rate
    scaled: float
    same_batch: bool

    @property
    def tile_ms(self) -> float:
        """Milliseconds of one tile: a section encoded and a window fused."""
        return self.scaled * (self.rate.encode_ms + self.rate.fuse_ms)

    def seconds(self, calls: Calls) -> float:
        """Seconds of the device for so many calls."""
        return self.scaled * (calls.encoded * self.rate.encode_ms + calls.fused * self.rate.fuse_ms) / 1000


def _nearest(rates: Iterable[Rate], network: NetworkSpec) -> Fit:
    """The rate whose tile is nearest in size, then whose batch is; of two as near the one with the smaller batch."""
    tile, batch = network.lattice.tile, network.batch
    rate = min(rates, key=lambda r: (abs(math.log(r.tile / tile)), abs(math.log(r.batch / batch)), r.batch))
    return Fit(rate, (tile / rate.tile) ** 2, rate.batch == batch)
