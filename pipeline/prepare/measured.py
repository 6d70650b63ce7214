"""The file of `cluster.measured`: rates of the device that the workers will compute on, as `emsr doctor --json` wrote
them there.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.base.errors import UserError
from pipeline.base.limits import MAX_MEASURED_BYTES
from pipeline.base.waits import waiting
from pipeline.config.cluster import ClusterConfig
from pipeline.plan.network_spec import NetworkSpec
from pipeline.plan.rates import MeasuredDevice, Rate
from pipeline.process.device import Facts

MAKE_ONE = "Run `emsr doctor volume.yaml --json > doctor.json` on a machine like the workers'"
_Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
_Word = Annotated[str, Field(min_length=1, max_length=200)]
_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Rate(BaseModel):
    model_config = ConfigDict(frozen=True)
    name: _Word
    preset: _Word | None
    scale: _Count
    cell: _Count
    halo: Annotated[int, Field(strict=True, ge=0, le=1 << 20)]
    precision: _Word
    batch: _Count
    encode_ms: _Milliseconds
    fuse_ms: _Milliseconds


class _Device(BaseModel):
    kind: _Word
    memory_bytes: Annotated[int, Field(strict=True, ge=1)]
    rates: tuple[_Rate, ...]


class _Report(BaseModel):
    """What a price needs of doctor's report; the other keys are for people."""

    emsr: _Word
    date: _Word
    devices: tuple[_Device, ...]


def measured_device(cluster: ClusterConfig, network: NetworkSpec) -> MeasuredDevice | None:
    """The device in the file of `cluster.measured` on which workers would compute; None where the key is not given.

    That is the first GPU on which this network was measured, in whichever precision; the CPU where there is no GPU or
    `gpus_per_worker` is 0. Raises UserError where the file is missing, is none of doctor's, or has no such device.
    """
    if cluster.measured is None:
        return None
    path, report = cluster.measured, _read(cluster.measured)
    devices = [
        MeasuredDevice(
            device.kind,
            device.memory_bytes,
            report.date,
            path,
            tuple(Rate(**rate.model_dump()) for rate in device.rates),
        )
        for device in report.devices
    ]
    gpus, cpus = ([d for d in devices if d.is_gpu == gpu] for gpu in (True, False))
    usable = cpus if cluster.gpus_per_worker == 0 else gpus if cluster.gpus_per_worker else gpus or cpus
    if not usable:
        raise UserError(
            f"cluster.measured {path} has no {'CPU' if gpus else 'GPU'}, cluster.gpus_per_worker is "
            f"{cluster.gpus_per_worker}",
            "a file of the kind of machine that the workers are",
            MAKE_ONE,
        )
    known = [device for device in usable if device.fits(network)]
    if not known:
        raise UserError(
            f"cluster.measured {path} has no rate of {_called(network)} on {usable[0].kind}", "one", MAKE_ONE
        )
    return known[0]


def check_precision(device: MeasuredDevice, network: NetworkSpec) -> None:
    """Raises UserError where the network was not measured in its precision on the device of `cluster.measured`."""
    if network.precision not in (known := device.fits(network)):
        raise UserError(
            f"cluster.measured {device.how} has no rate of {_called(network)} in {network.precision} on {device.kind}; "
            f"in {', '.join(known)} it has",
            "a rate of the network in the precision of the run",
            f"{MAKE_ONE}, or set network.precision to {' or '.join(known)}",
        )


def facts(device: MeasuredDevice, network: NetworkSpec) -> Facts:
    """What decides precision and batch where workers have this device: it has the precisions that were measured."""
    return Facts(device.kind, device.memory_bytes, tuple(device.fits(network)))


def _called(network: NetworkSpec) -> str:
    return f"{network.name} x{network.scale}" + (f", preset {network.preset}" if network.preset else "")


def _read(path: str) -> _Report:
    wanted = "what `emsr doctor --json` wrote"
    try:
        with waiting(path), open(path, "rb") as file:
            data = file.read(MAX_MEASURED_BYTES + 1)
    except OSError as error:
        raise UserError(f"cluster.measured {path} cannot be read ({error.strerror})", wanted, MAKE_ONE) from None
    if len(data) > MAX_MEASURED_BYTES:
        raise UserError(
            f"cluster.measured {path} holds more than {MAX_MEASURED_BYTES >> 20} MiB", wanted, "Give another file"
        )
    try:
        return _Report.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        what = "is not JSON" if first["type"] == "json_invalid" else f"does not have doctor's keys: {where or 'all'}"
        raise UserError(f"cluster.measured {path} {what} ({first['msg']})", wanted, MAKE_ONE) from None
