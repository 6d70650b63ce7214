"""Which emsr this process runs: a digest of its installed sources, since two commits can have one version."""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path

_PACKAGES = ("emsr", "models", "pipeline")
_SUFFIXES = (".py", ".safetensors")


@functools.cache
def sources_digest() -> str:
    """The SHA-256 over names and bytes of all Python files and built-in weights of emsr's packages, as 64 hex digits.

    They are read once in a process: what is installed over them later is not what the process runs.
    """
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
            for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in _SUFFIXES):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{package}/{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()
