"""Dask's configuration of this site: where its keys are set, and a start that fails because of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import dask

from pipeline.base.errors import ClusterError

MAX_NAMED = 5
MAX_CAUSE = 300
"""Letters of an error that are shown."""


def refuse_values_for_mappings() -> None:
    """Raises ClusterError where a value stands in the place of a mapping of Dask's own.

    This process does without it, but every worker would end in a traceback.
    """
    for key, value, where in _keys():
        defaults = [dask.config.get(key, None, config=defaults) for defaults in dask.config.defaults]
        if value is not None and any(default and isinstance(default, Mapping) for default in defaults):
            raise ClusterError(
                f"Dask's configuration has {key}: {value!r} ({where})",
                "a mapping of keys to values",
                "Correct it there",
            )


def start_failed(what: str, error: BaseException) -> ClusterError:
    """The message for a cluster that Dask did not start: the first cause, and the keys of the site that may be it.

    Keys whose value stands in an error's text are named alone; without such all are, up to MAX_NAMED.
    """
    chain = list(_chain(error))
    told = " ".join(str(one) for one in chain)
    keys = list(_keys())
    guilty = [(key, where) for key, value, where in keys if any(word in told for word in _words(value))]
    named = [f"{key} ({where})" for key, where in guilty or [(key, where) for key, _, where in keys]]
    blame = "correct it there" if guilty else "perhaps one of them is why"
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    cause = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())[:MAX_CAUSE]
    return ClusterError(
        f"{what} ({cause})",
        "",
        f"Dask's configuration sets {', '.join(named[:MAX_NAMED])}{more}: {blame}"
        if named
        else "Dask's configuration here sets nothing of its own; see whether memory, disk and processes are at a limit",
    )


def first_cause(error: BaseException) -> BaseException:
    """What an error of Dask's came from; the error itself where it came from nothing."""
    return list(_chain(error))[-1]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came from, the first cause last."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _keys() -> Iterator[tuple[str, Any, str]]:
    """(key, value, where) of what environment and files set of Dask; the environment, which decides, first."""
    for name, value in sorted(os.environ.items()):
        if name.startswith("DASK_") and name not in ("DASK_CONFIG", "DASK_ROOT_CONFIG", "DASK_INTERNAL_INHERIT_CONFIG"):
            key = name[5:].lower().replace("__", ".").replace("_", "-")
            yield key, dask.config.interpret_value(value), f"environment variable {name}"
    for path, found in dask.config.collect_yaml(dask.config.paths, return_paths=True):
        yield from ((key, value, str(path)) for key, value in _leaves(found))


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _words(value: Any) -> Iterator[str]:
    """The texts of a value that an error may quote. Short ones say nothing."""
    for one in value if isinstance(value, list | tuple) else [value]:
        if len(str(one)) > 3 and not isinstance(one, bool):
            yield str(one)
