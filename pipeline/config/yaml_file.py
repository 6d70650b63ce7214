"""A YAML file as frozen pydantic values.

Every mistake becomes one line of a ConfigError: file:line, key path, the value that was found, what is allowed.
"""

from __future__ import annotations

import difflib
import itertools
import re
import reprlib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pipeline.base.errors import ConfigError
from pipeline.base.limits import MAX_PROBLEMS, MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_VALUES
from pipeline.base.waits import waiting
from pipeline.config import urls

MODEL = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)
"""pydantic's settings for all configuration models: unknown keys are errors, values cannot be changed after reading."""

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the top of the file, such as ("source", "box", "start", 0)."""
M = TypeVar("M", bound=BaseModel)

_KINDS = {
    "volume.yaml": ({"source", "target"}, "emsr run"),
    "stage.yaml": ({"stage"}, "emsr train"),
    "table.yaml": ({"volumes"}, "emsr evaluate"),
}
"""By the kind of file, keys that no other kind has, and its command."""

_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "P": 10**15,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
    "Pi": 2**50,
}


def parse_bytes(value: object) -> int:
    """`10TB`, `1.5 GiB` or a plain number of bytes -> bytes. ValueError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGTP]i?)?B?\s*", value) if isinstance(value, str) else None
    if not match:
        raise ValueError("a size such as 500GB, 10TB or 2TiB")
    return int(float(match.group(1)) * _UNITS[match.group(2) or ""])


def _local(value: object) -> object:
    """A path as it is written -> with `~` replaced. ValueError where it can be none of this machine."""
    if not isinstance(value, str):
        return value
    if not value.strip() or not value.isprintable():
        raise ValueError("a path, of printable letters")
    if "://" in value:
        raise ValueError("a path on this machine, not a URL")
    if re.search(r"\$[\w{]", value):
        raise ValueError("a path written out: $NAME is not replaced, ~ is")
    return str(urls.expanded(value))  # text: JSON, by which ranks of a training get it, has no paths


Bytes = Annotated[int, BeforeValidator(parse_bytes)]
LocalPath = Annotated[Path, BeforeValidator(_local)]


def read(path: Path, model: type[M], kind: str) -> tuple[M, dict[KeyPath, int]]:
    """The file's values, and the line (from 1) of every key path. `kind` is what messages call such a file.

    Raises ConfigError with all problems.
    """
    try:
        with waiting(str(path)), path.open("rb") as file:
            data = file.read(MAX_YAML_BYTES + 1)
        if len(data) > MAX_YAML_BYTES:
            raise ConfigError([f"{path}: holds more than {MAX_YAML_BYTES >> 20} MiB. Give the path of a {kind}"])
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "not UTF-8 text: save it as UTF-8"
        raise ConfigError([f"{path}: cannot be read ({why}). Give the path of a {kind}"]) from None
    raw, lines = _parse(text, str(path), kind, model)
    _refuse_another_kind(raw, str(path), kind)
    try:
        return model.model_validate(raw), lines
    except ValidationError as error:
        raise ConfigError(_problems(error, str(path), lines, model)) from None


def _refuse_another_kind(raw: Mapping[str, Any], name: str, kind: str) -> None:
    """Raises ConfigError where the keys are those of another command's file."""
    for other, (marks, command) in _KINDS.items():
        if other != kind and marks <= raw.keys() and not (kind in _KINDS and _KINDS[kind][0] <= raw.keys()):
            saw = f"{name}: this is a {other} by its {' and '.join(sorted(marks))}"
            raise ConfigError([f"{saw}. Wanted a {kind}. Use {command} {name}"])


def _parse(text: str, name: str, kind: str, model: type[BaseModel]) -> tuple[Any, dict[KeyPath, int]]:
    """The YAML text as plain values, and the line (from 1) of every key path."""
    lines: dict[KeyPath, int] = {}
    problems: list[str] = []

    values = itertools.count(1)

    def build(node: yaml.Node, path: KeyPath) -> Any:
        at = node.start_mark.line + 1
        lines.setdefault(path, at)
        if len(path) > MAX_YAML_DEPTH:
            raise ConfigError([f"{name}:{at}: nested too deeply. A {kind} has few levels"])
        if next(values) > MAX_YAML_VALUES:
            raise ConfigError(
                [f"{name}:{at}: more than {MAX_YAML_VALUES:,} values, aliases written out. A {kind} has fewer"]
            )
        if isinstance(node, yaml.MappingNode):
            out: dict[Any, Any] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node, deep=True) if isinstance(key_node, yaml.ScalarNode) else None
                at = key_node.start_mark.line + 1
                if not isinstance(key, str):
                    problems.append(f"{name}:{at}: {_dotted(path)}: saw a key that is no word. Wanted a key of {kind}")
                    continue
                if key in out:
                    problems.append(f"{name}:{at}: {_dotted((*path, key))}: given twice. Keep one")
                lines[(*path, key)] = at
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
        at = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            [f"{name}:{at}: not YAML: {error.problem or error}. Check the indentation and quotes there"]
        ) from None
    except RecursionError:
        raise ConfigError([f"{name}: nested too deeply. A {kind} has few levels"]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([f"{name}: not YAML: {' '.join(str(error).split())}"]) from None
    if problems:
        raise ConfigError(_first(problems))
    if not isinstance(value, dict):
        found = "nothing" if value is None else type(value).__name__
        required = [key for key, field in model.model_fields.items() if field.is_required()]
        others = [key for key in model.model_fields if key not in required]
        optional = f" (and {', '.join(others)})" if others else ""
        raise ConfigError(
            [f"{name}:1: saw {found}, wanted the keys {', '.join(required)}{optional}. See the examples folder"]
        )
    return value, lines


def _dotted(path: KeyPath) -> str:
    return ".".join(str(p) for p in path) or "(top)"


def line(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """The line of a key path, or of the nearest key above it that stands in the file."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 1)


def keys(model: type[BaseModel], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], list[str]]:
    """The keys that each mapping of the file may hold, by the key path of the mapping. List indices are left out."""
    found = {path: list(model.model_fields)}
    for name, field in model.model_fields.items():
        for sub in _models_in(field.annotation):
            found |= keys(sub, (*path, name))
    return found


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The configuration models in a type, such as those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    return []


def _problems(error: ValidationError, name: str, lines: Mapping[KeyPath, int], model: type[BaseModel]) -> list[str]:
    """pydantic's errors, one line per key path: several branches of a union that failed at one key become one line."""
    known = keys(model)
    by_place: dict[KeyPath, list[tuple[str, str, Any]]] = {}
    for item in error.errors(include_url=False):
        *parents, last = item["loc"] or ("",)
        path: KeyPath = tuple(p for p in parents if isinstance(p, int) or _is_key(str(p)))
        if last != "" and (isinstance(last, int) or item["type"] == "extra_forbidden" or _is_key(str(last))):
            path = (*path, last)
        by_place.setdefault(path, []).append((item["type"], item["msg"], item["input"]))
    out = []
    for path, faults in by_place.items():
        if faults[0][0] == "too_short" and any(other[: len(path)] == path != other for other in by_place):
            continue  # its entries are there, and wrong: each has its own line
        where = f"{name}:{line(lines, path)}: {_dotted(path)}"
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
            prefix = f"saw {_shown(value)}, " if not isinstance(value, (dict, BaseModel)) else ""
            out.append(f"{where}: {prefix}wanted {wanted}")
    return _first(out)


def _first(problems: list[str]) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], f"... and {more:,} more"] if more > 0 else problems


def _is_key(part: str) -> bool:
    """Whether a part of pydantic's location is a key of the file; the names of a union's branches stand there too."""
    return (
        bool(re.fullmatch(r"[a-z][a-z0-9_]*", part))
        and not part.startswith(("literal[", "function-"))
        and part not in ("int", "str", "bool", "float")
    )


def _wanted(kind: str, message: str) -> str:
    """What was wanted, in words, from pydantic's kind of error and message."""
    message = re.sub(r"^Value error, ", "", message)
    message = re.sub(r"^Input should be (a )?(valid )?", "", message)
    message = re.sub(r"^(?:Tuple|List) should have (.*) after validation", r"\1", message)
    return {
        "int_type": "a whole number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_pattern_mismatch": "64 hexadecimal digits (sha256)",
        "tuple_type": "a list",
        "model_type": "a mapping of keys",
        "model_attributes_type": "a mapping of keys",
    }.get(kind, message)


def _shown(value: object) -> str:
    text = reprlib.repr(value) if isinstance(value, (list, tuple)) and len(value) > 20 else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
