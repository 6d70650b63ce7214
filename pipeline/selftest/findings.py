"""What the doctor finds, as values, and the JSON that holds them. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VectorFound:
    """A reference vector (models/vectors) on a device.

    `difference` is the largest one to float32 of a CPU in grey 0..1, `psnr_db` that of the whole section; both are None
    where the device made values that are no numbers, and `psnr_db` where nothing differs. Of `tolerance` for the one
    and `least_psnr_db` for the other the precision has one. `indices_changed` counts tokens with another code.
    """

    name: str
    precision: str
    difference: float | None
    psnr_db: float | None
    indices_changed: int
    tolerance: float | None
    least_psnr_db: float | None
    ok: bool


@dataclass(frozen=True)
class SameFound:
    """Whether tiles have the same bytes when they are computed again, and at another place of a batch."""

    precision: str
    twice: bool
    other_place: bool


@dataclass(frozen=True)
class RateFound:
    """How fast a network is on a device.

    `encode_ms` and `fuse_ms` are milliseconds for one section, and for one window, of one tile. `tflops` are the
    operations of both in their time, `share` is that over the rate of a large matrix product in this precision there.
    `psnr_db` (None where nothing differs) and `indices_changed` are of one window against the device's own float32.
    `peak_bytes` were held beside the weights (None on a CPU), `formula_bytes` is what the price of a run takes for it.
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
    sr_voxels_per_s: float
    tflops: float
    share: float
    psnr_db: float | None
    indices_changed: int
    peak_bytes: int | None
    formula_bytes: int


@dataclass
class DeviceFound:
    """All that was found on one device, filled in as it is found. `notes` say what was left out, and why; `error` is
    why the device could not go on.
    """

    kind: str
    memory_bytes: int
    matrix_tflops: dict[str, float] = field(default_factory=dict)
    vectors: list[VectorFound] = field(default_factory=list)
    same: list[SameFound] = field(default_factory=list)
    rates: list[RateFound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    def wrong(self) -> Iterator[str]:
        """What this device computes that it should not."""
        if self.error is not None:
            yield self.error
        for vector in self.vectors:
            if not vector.ok:
                yield f"reference vector {vector.name} in {vector.precision}: {_how_far(vector)}"
        for same in self.same:
            if not same.twice:
                yield f"{same.precision}: the same tile twice gives other bytes"
            if not same.other_place:
                yield f"{same.precision}: a tile at another place of the batch gives other bytes"


def _how_far(vector: VectorFound) -> str:
    if vector.difference is None:
        return "values that are no numbers"
    if vector.tolerance is not None:
        return (
            f"off by {vector.difference:.2g} with {vector.indices_changed} indices changed; "
            f"wanted: at most {vector.tolerance:.0e} and none"
        )
    return f"{vector.psnr_db or math.inf:.1f} dB to float32; wanted: at least {vector.least_psnr_db:.0f}"


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's whole finding. `machine` is what machine.describe gives."""

    emsr: str
    date: str
    machine: dict[str, Any]
    devices: list[DeviceFound]

    @property
    def ok(self) -> bool:
        """Whether every device computes what it should."""
        return not any(True for device in self.devices for _ in device.wrong())

    def to_json(self) -> dict[str, Any]:
        """The body of `emsr doctor --json`. Keys are added, never renamed: `cluster.measured` reads it."""
        found = dataclasses.asdict(self)
        return {"emsr": found["emsr"], "date": found["date"], "ok": self.ok, **found}
