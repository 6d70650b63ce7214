"""volume.yaml as frozen values. Their meaning and defaults are in docs/volume-yaml.md."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from pipeline.base.errors import ConfigError, UserError
from pipeline.base.geometry import ZYX, Box
from pipeline.config import urls, yaml_file
from pipeline.config.access import AccessConfig, use
from pipeline.config.cluster import ClusterConfig
from pipeline.config.yaml_file import Bytes


def _zyx(value: object) -> object:
    if isinstance(value, ZYX):
        return value
    if not (isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) is int for v in value)):
        raise ValueError("three whole numbers [z, y, x]")
    return ZYX.of(value)


def _positive(value: ZYX) -> ZYX:
    if min(value) < 1:
        raise ValueError("three whole numbers [z, y, x], each at least 1")
    return value


def _sizes(value: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(math.isfinite(v) and v > 0 for v in value):
        raise ValueError("three positive numbers [z, y, x] in nm")
    return value


def _list_of_numbers(value: object) -> object:
    if not (isinstance(value, (list, tuple)) and len(value) == 3 and all(type(v) in (int, float) for v in value)):
        raise ValueError("three positive numbers [z, y, x] in nm")
    return tuple(float(v) for v in value)


def _window(value: object) -> object:
    """Whole numbers come back as int, so that 1200 and 1200.0 are one plan."""
    if not (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(type(v) in (int, float) and abs(v) <= MAX_WINDOW for v in value)
        and value[0] < value[1]
    ):
        raise ValueError("intensity_window [low, high], two numbers of the source's data type with low < high")
    return tuple(int(v) if v == int(v) else v for v in value)


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a path or URL that is not empty")
    return value


MAX_WINDOW = 3.4028234663852886e38
"""The largest float32."""
ZYXField = Annotated[ZYX, BeforeValidator(_zyx)]
ShapeField = Annotated[ZYX, BeforeValidator(_zyx), AfterValidator(_positive)]
VoxelSize = Annotated[tuple[float, float, float], BeforeValidator(_list_of_numbers), AfterValidator(_sizes)]
Window = Annotated[tuple[int | float, int | float], BeforeValidator(_window)]
"""Stored values that become 0 and 255. Which of them a source's data type allows is known once it is open."""
Url = Annotated[StrictStr, AfterValidator(_not_blank)]


class _Model(BaseModel):
    model_config = yaml_file.MODEL


class BoxConfig(_Model):
    """The region to super-resolve: a half-open box in LR voxels, in volume coordinates."""

    start: ZYXField
    stop: ZYXField

    @model_validator(mode="after")
    def _ordered(self) -> BoxConfig:
        if min(self.stop - self.start) < 1:
            raise ValueError("box.stop greater than box.start on every axis")
        return self

    @property
    def box(self) -> Box:
        return Box(self.start, self.stop)


class FillConfig(_Model):
    """The grey value that absent chunks are read as."""

    fill: Annotated[StrictInt, Field(ge=0, le=255)]


class BadSectionsConfig(_Model):
    """Which sections are bad, and what is done about them: they must not enter any window.

    `list` gives their z; with `detect` a run looks for more before it begins. `rule` says what stands in for them,
    `output` what their own output sections are made from.
    """

    list: tuple[StrictInt, ...] = ()
    detect: StrictBool = False
    rule: Literal["nearest", "refuse"] = "nearest"
    output: Literal["neighbours", "empty"] = "neighbours"


class MaskConfig(_Model):
    """A volume over the same space; slabs where it is 0 everywhere are skipped."""

    url: Url
    mip: Annotated[StrictInt, Field(ge=0)] = 0
    missing_chunks: Literal["error"] | FillConfig = "error"
    access: AccessConfig = AccessConfig()


class SourceConfig(_Model):
    """The volume that is read. `mip` or `array` chooses its level.

    `intensity_window` maps stored values to 0..255, linearly; `invert` then makes 255 - v of each. Fills are grey
    values after both.
    """

    url: Url
    mip: Annotated[StrictInt, Field(ge=0)] = 0
    array: StrictStr | None = None
    box: BoxConfig | None = None
    voxel_size_nm: VoxelSize | None = None
    intensity_window: Window | None = None
    invert: StrictBool = False
    missing_chunks: Literal["error"] | FillConfig = "error"
    bad_sections: BadSectionsConfig = BadSectionsConfig()
    mask: MaskConfig | None = None
    skip_empty: StrictBool = False
    access: AccessConfig = AccessConfig()


class TargetConfig(_Model):
    """The volume that is written. Shapes are in voxels of mip 0."""

    url: Url
    format: Literal["ome-zarr", "precomputed"] = "ome-zarr"
    chunk_shape: ShapeField | None = None
    shard_shape: ShapeField | None = None
    encoding: Literal["raw", "zstd", "blosc-zstd", "jpeg", "png", "jxl"] | None = None
    mips: Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=16)] = "auto"
    fidelity: StrictBool = True
    access: AccessConfig = AccessConfig()

    @model_validator(mode="after")
    def _encoding(self) -> TargetConfig:
        allowed = ENCODINGS[self.format]
        if self.encoding is not None and self.encoding not in allowed:
            raise ValueError(f"target.encoding for format {self.format}: one of {', '.join(allowed)}")
        return self


ENCODINGS: dict[str, tuple[str, ...]] = {
    "ome-zarr": ("blosc-zstd", "zstd", "raw"),
    "precomputed": ("raw", "jpeg", "png", "jxl"),
}
"""The encodings of each format, its default first. storage/targets/ has a module for each format, which writes them."""

NetworkName = Literal["gpemsr", "nearest", "bicubic", "rcan", "swinir", "bsrn", "real-esrgan", "edvr", "basicvsr"]


Sha256 = Annotated[
    StrictStr,
    BeforeValidator(lambda text: text.lower() if isinstance(text, str) else text),
    Field(pattern=r"^[0-9a-f]{64}$"),
]


class NetworkConfig(_Model):
    """The network and its weights. `cell` and `halo` are in LR voxels, `batch` is how many tiles are computed at once.

    `precision`, `batch`, `cell` and `halo` that are not given are chosen by the first run and kept by those that resume
    it.
    """

    name: NetworkName
    scale: Literal[8, 16]
    preset: Literal["paper", "small"] | None = None
    weights: StrictStr | None = None
    sha256: Sha256 | None = None
    cell: Annotated[StrictInt, Field(ge=8, le=4096, multiple_of=8)] | None = None
    halo: Annotated[StrictInt, Field(ge=0, le=512, multiple_of=8)] | None = None
    precision: Literal["float32", "tf32", "bfloat16", "float16"] | None = None
    batch: Annotated[StrictInt, Field(ge=1, le=64)] | None = None


class BudgetConfig(_Model):
    """A run whose output would be larger is refused."""

    output_bytes: Bytes


class RequestsConfig(_Model):
    """The most requests a second that all workers together make to the object stores."""

    read: Annotated[StrictInt, Field(ge=1)] | None = None
    write: Annotated[StrictInt, Field(ge=1)] | None = None


class WorkConfig(_Model):
    """How the work is cut and carried out. None of it changes the voxels."""

    slab_shape: ShapeField | None = None
    retries: Annotated[StrictInt, Field(ge=0, le=100)] = 3
    stall_s: Annotated[StrictInt, Field(ge=1, le=86_400)] = 600
    in_flight: Annotated[StrictInt, Field(ge=1, le=16)] | None = None
    requests_per_second: RequestsConfig | None = None
    budget: BudgetConfig | None = None


class Config(_Model):
    """One volume.yaml."""

    source: SourceConfig
    target: TargetConfig
    network: NetworkConfig
    work: WorkConfig = WorkConfig()
    cluster: ClusterConfig = ClusterConfig()


def load(path: str | Path) -> Config:
    """Read and check volume.yaml. Relative paths and URLs start from its folder and come back absolute.

    From then on this process asks its stores by what it says of their access. Raises ConfigError with all problems.
    """
    path = Path(path)
    config, lines = yaml_file.read(path, Config, "volume.yaml")
    base = path.resolve().parent
    problems, changed = [], {}
    weights = config.network.weights
    named = {
        "source": config.source.url,
        "target": config.target.url,
        "source.mask": config.source.mask.url if config.source.mask else None,
        "network": None if weights is None or weights.split(":")[0] == "builtin" else weights,
    }
    for where, url in named.items():
        if url is None:
            continue
        key = "weights" if where == "network" else "url"
        try:
            changed[where] = urls.normalise(url, base)
        except UserError as error:
            problems.append(f"{path}:{yaml_file.line(lines, (*where.split('.'), key))}: {where}.{key}: {error}")
    stated = {"source": config.source, "target": config.target, "source.mask": config.source.mask}
    for where, volume in stated.items():
        if volume is None or where not in changed:
            continue
        try:
            volume.access.refuse_other_store(changed[where])
        except ValueError as error:
            problems.append(f"{path}:{yaml_file.line(lines, (*where.split('.'), 'access'))}: {where}.{error}")
        use(changed[where], volume.access)
    if problems:
        raise ConfigError(problems)
    source = config.source.model_copy(update={"url": changed["source"]})
    if source.mask is not None:
        source = source.model_copy(update={"mask": source.mask.model_copy(update={"url": changed["source.mask"]})})
    target = config.target.model_copy(update={"url": changed["target"]})
    network = config.network.model_copy(update={"weights": changed.get("network", config.network.weights)})
    return config.model_copy(
        update={"source": source, "target": target, "network": network, "cluster": config.cluster.beside(base)}
    )


def keys() -> dict[tuple[str, ...], list[str]]:
    """The keys that each mapping of volume.yaml may hold, by the key path of the mapping."""
    return yaml_file.keys(Config)
