"""The libraries that emsr needs: what to say where one is not there, cannot be loaded, or is too old."""

from __future__ import annotations

import sys
from importlib import metadata


def not_installed(error: BaseException, library: str = "") -> str:
    """The message for an error because of which `library` cannot be used: one line; "" where it is no such error.

    Without `library` it is the one that the error names, else the one whose code has raised it.
    """
    loading = isinstance(error, OSError) and "shared object file" in str(error)  # of a library in C, by ctypes
    if loading or isinstance(error, ImportError):
        name = (library or getattr(error, "name", None) or _raised_in(error)).partition(".")[0]
        saw = f"{_unmet() or f'{name} cannot be imported'} ({' '.join(str(error).split())})"
    elif isinstance(error, AttributeError | TypeError) and (unmet := _unmet()):
        saw = unmet  # another version has other functions
    else:
        return ""
    return (
        f"{saw}. Wanted: emsr's requirements, for this Python ({sys.executable}). "
        "Install emsr anew with its pip, which brings them."
    )


def _unmet() -> str:
    """The first of emsr's requirements that is missing or older than it may be; "" where none is."""
    from packaging.requirements import Requirement  # Dask brings it

    try:
        stated = [Requirement(text) for text in metadata.requires("emsr") or ()]
    except metadata.PackageNotFoundError:
        return ""  # a checkout that is not installed
    for one in stated:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            return f"{one.name} is not installed"
        if not one.specifier.contains(found, prereleases=True):
            return f"{one.name} {found} is installed, and emsr needs {one.name}{one.specifier}"
    return ""


def _raised_in(error: BaseException) -> str:
    """The module whose code raised the error."""
    module, trace = "a library", error.__traceback__
    while trace is not None:
        name = str(trace.tb_frame.f_globals.get("__name__", ""))
        module = module if name.startswith("importlib") else name
        trace = trace.tb_next
    return module
