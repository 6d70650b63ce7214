"""volume.yaml as frozen values. Every mistake becomes one line: file:line, key path, value seen, what is allowed."""

from __future__ import annotations

import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from pipeline import urls
from pipeline.errors import ConfigError, UserError
from pipeline.geometry import ZYX, Box

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}


def parse_bytes(value: object) -> int:
    """`10TB`, `1.5 GiB` or a plain number of bytes -> bytes. ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?)?B?\s*", value) if isinstance(value, str) else None
    if not match:
        raise ValueError("a size such as 500GB, 10TB or 2TiB")
    return int(float(match.group(1)) * _UNITS[match.group(2) or ""])


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


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("a path or URL that is not empty")
    return value


ZYXField = Annotated[ZYX, BeforeValidator(_zyx)]
ShapeField = Annotated[ZYX, BeforeValidator(_zyx), AfterValidator(_positive)]
VoxelSize = Annotated[tuple[float, float, float], BeforeValidator(_list_of_numbers), AfterValidator(_sizes)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Url = Annotated[StrictStr, AfterValidator(_not_blank)]
Count = Annotated[StrictInt, Field(ge=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class BoxConfig(_Model):
    """Region of interest in LR voxels, volume coordinates, half open."""

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
    fill: Annotated[StrictInt, Field(ge=0, le=255)]


class BadSectionsConfig(_Model):
    """Sections (z in volume coordinates) that must not enter any window."""

    list: tuple[StrictInt, ...] = ()
    detect: StrictBool = False
    rule: Literal["nearest", "refuse"] = "nearest"


class MaskConfig(_Model):
    url: Url
    mip: Annotated[StrictInt, Field(ge=0)] = 0
    missing_chunks: Literal["error"] | FillConfig = "error"


class SourceConfig(_Model):
    url: Url
    mip: Annotated[StrictInt, Field(ge=0)] = 0
    array: StrictStr | None = None
    box: BoxConfig | None = None
    voxel_size_nm: VoxelSize | None = None
    intensity_window: tuple[StrictInt, StrictInt] | None = None
    missing_chunks: Literal["error"] | FillConfig = "error"
    bad_sections: BadSectionsConfig = BadSectionsConfig()
    mask: MaskConfig | None = None
    skip_empty: StrictBool = False

    @model_validator(mode="after")
    def _window(self) -> SourceConfig:
        w = self.intensity_window
        if w is not None and not 0 <= w[0] < w[1] <= 65535:
            raise ValueError("intensity_window [low, high] with 0 <= low < high <= 65535")
        return self


class TargetConfig(_Model):
    url: Url
    format: Literal["ome-zarr", "precomputed"] = "ome-zarr"
    chunk_shape: ShapeField | None = None
    shard_shape: ShapeField | None = None
    encoding: Literal["raw", "zstd", "blosc-zstd", "jpeg", "png"] | None = None
    mips: Literal["auto"] | Annotated[StrictInt, Field(ge=1, le=16)] = "auto"
    fidelity: StrictBool = True

    @model_validator(mode="after")
    def _encoding(self) -> TargetConfig:
        allowed = ENCODINGS[self.format]
        if self.encoding is not None and self.encoding not in allowed:
            raise ValueError(f"target.encoding for format {self.format}: one of {', '.join(allowed)}")
        return self


ENCODINGS: dict[str, tuple[str, ...]] = {"ome-zarr": ("blosc-zstd", "zstd", "raw"), "precomputed": ("raw", "jpeg", "png")}

NetworkName = Literal["gpemsr", "nearest", "bicubic", "rcan", "swinir", "bsrn", "real-esrgan", "edvr", "basicvsr"]


class NetworkConfig(_Model):
    name: NetworkName
    scale: Literal[8, 16]
    preset: Literal["paper", "small"] | None = None
    weights: StrictStr | None = None
    sha256: Annotated[StrictStr, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    cell: Annotated[StrictInt, Field(ge=8, le=4096, multiple_of=8)] | None = None
    halo: Annotated[StrictInt, Field(ge=0, le=512, multiple_of=8)] | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"


class BudgetConfig(_Model):
    output_bytes: Bytes


class WorkConfig(_Model):
    slab_shape: ShapeField | None = None
    retries: Annotated[StrictInt, Field(ge=0, le=100)] = 3
    in_flight: Annotated[StrictInt, Field(ge=1, le=16)] = 2
    budget: BudgetConfig | None = None


class ClusterConfig(_Model):
    kind: Literal["local", "address", "slurm", "kubernetes"] = "local"
    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    address: StrictStr | None = None
    gpus_per_worker: Annotated[StrictInt, Field(ge=0, le=16)] | None = None

    @model_validator(mode="after")
    def _address(self) -> ClusterConfig:
        if self.kind == "address":
            if not self.address or not re.fullmatch(r"(tcp|tls|ws|wss|ucx|ucxx)://[^\s/:]+:\d{1,5}|[\w.\-]+:\d{1,5}", self.address):
                raise ValueError("cluster.address such as tcp://scheduler:8786 or tls://scheduler:8786 (kind is address)")
        elif self.address is not None:
            raise ValueError(f"no cluster.address when cluster.kind is {self.kind}")
        return self


class Config(_Model):
    """One volume.yaml."""

    source: SourceConfig
    target: TargetConfig
    network: NetworkConfig
    work: WorkConfig = WorkConfig()
    cluster: ClusterConfig = ClusterConfig()


def load(path: str | Path) -> Config:
    """Read and check volume.yaml. URLs come back normalised (file:// absolute). ConfigError names every problem at once."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8 text'}). Give the path of a volume.yaml"]) from None
    raw, lines = _parse(text, str(path))
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_problems(error, str(path), lines)) from None
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
            problems.append(f"{path}:{_line(lines, (*where.split('.'), key))}: {where}.{key}: {error}")
    if problems:
        raise ConfigError(problems)
    source = config.source.model_copy(update={"url": changed["source"]})
    if source.mask is not None:
        source = source.model_copy(update={"mask": source.mask.model_copy(update={"url": changed["source.mask"]})})
    target = config.target.model_copy(update={"url": changed["target"]})
    network = config.network.model_copy(update={"weights": changed.get("network", config.network.weights)})
    return config.model_copy(update={"source": source, "target": target, "network": network})


_Path = tuple[str | int, ...]


def _parse(text: str, name: str) -> tuple[Any, dict[_Path, int]]:
    """The YAML text as plain values, and the line (from 1) of every key path."""
    lines: dict[_Path, int] = {}
    problems: list[str] = []

    def build(node: yaml.Node, path: _Path) -> Any:
        lines.setdefault(path, node.start_mark.line + 1)
        if len(path) > 12:
            raise ConfigError([f"{name}:{node.start_mark.line + 1}: nested too deeply. See docs/volume-yaml.md for the keys"])
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
                line = key_node.start_mark.line + 1
                if not isinstance(key, str):
                    problems.append(f"{name}:{line}: {_dotted(path)}: saw a key that is no word. Wanted the keys of docs/volume-yaml.md")
                    continue
                if key in out:
                    problems.append(f"{name}:{line}: {_dotted((*path, key))}: given twice. Keep one")
                lines[(*path, key)] = line
                out[key] = build(value_node, (*path, key))
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(child, (*path, i)) for i, child in enumerate(node.value)]
        return loader.construct_object(node)

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        value = build(root, ()) if root is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError([f"{name}:{line}: not YAML: {error.problem or error}. Check the indentation and quotes there"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError([f"{name}: not YAML: {' '.join(str(error).split())}"]) from None
    if problems:
        raise ConfigError(problems)
    if not isinstance(value, dict):
        seen = "nothing" if value is None else type(value).__name__
        raise ConfigError([f"{name}:1: saw {seen}, wanted the keys source, target, network (and work, cluster). See examples/quickstart.yaml"])
    return value, lines


def _dotted(path: _Path) -> str:
    return ".".join(str(p) for p in path) or "(top)"


def _line(lines: Mapping[_Path, int], path: _Path) -> int:
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def keys(model: type[BaseModel] = Config, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """Every mapping of volume.yaml with the keys it may hold."""
    found = {path: list(model.model_fields)}
    for name, field in model.model_fields.items():
        for sub in _models_in(field.annotation):
            found |= keys(sub, (*path, name))
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    return []


def _problems(error: ValidationError, name: str, lines: Mapping[_Path, int]) -> list[str]:
    """pydantic's errors, one line per place: several branches of a union that failed at one key become one line."""
    known = keys()
    by_place: dict[_Path, list[tuple[str, str, Any]]] = {}
    for item in error.errors(include_url=False):
        *parents, last = item["loc"] or ("",)
        path: _Path = tuple(p for p in parents if isinstance(p, int) or _is_key(str(p)))
        if last != "" and (isinstance(last, int) or item["type"] == "extra_forbidden" or _is_key(str(last))):
            path = (*path, last)
        by_place.setdefault(path, []).append((item["type"], item["msg"], item["input"]))
    out = []
    for path, faults in by_place.items():
        where = f"{name}:{_line(lines, path)}: {_dotted(path)}"
        kind, _, value = faults[0]
        if kind == "extra_forbidden":
            allowed = known.get(tuple(str(p) for p in path[:-1]), [])
            near = difflib.get_close_matches(str(path[-1]), allowed, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]}?" if near else ""
            out.append(f"{where}: unknown key. Allowed here: {', '.join(allowed)}. {hint}".rstrip())
        elif kind == "missing":
            out.append(f"{where}: missing. It is required")
        else:
            wanted = " or ".join(dict.fromkeys(_wanted(k, msg) for k, msg, _ in faults if k != "missing"))
            seen = f"saw {_shown(value)}, " if not isinstance(value, (dict, BaseModel)) else ""
            out.append(f"{where}: {seen}wanted {wanted}")
    return out


def _is_key(part: str) -> bool:
    """pydantic puts the names of union branches into the location; keys of ours are plain words of the models."""
    return bool(re.fullmatch(r"[a-z][a-z0-9_]*", part)) and not part.startswith(("literal[", "function-")) and part not in ("int", "str", "bool", "float")


def _wanted(kind: str, message: str) -> str:
    message = re.sub(r"^Value error, ", "", message)
    message = re.sub(r"^Input should be (a )?(valid )?", "", message)
    return {
        "int_type": "a whole number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_pattern_mismatch": "64 hexadecimal digits (sha256)",
        "model_type": "a mapping of keys",
        "model_attributes_type": "a mapping of keys",
    }.get(kind, message)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
