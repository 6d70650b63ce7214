"""What a local folder holds in which no volume is, so that a refusal can name what to give in its place."""

from __future__ import annotations

import os
from pathlib import Path

_DOCUMENTS = ("info", "zarr.json", ".zarray", ".zgroup", "attributes.json")
_SECTIONS = (".tif", ".tiff", ".png")
_WKW = "header.wkw"
_SHOWN = 5
_MAX_ENTRIES = 2000
"""Entries of folders among which volumes are looked for."""
_MAX_DEPTH = 4


def instead(root: Path) -> tuple[str, str] | None:
    """What lies in the folder, and what to do; None where nothing in it is known."""
    volumes, wkw = list[str](), False
    looked = 0
    for folder, below, files in os.walk(root):
        looked += len(below) + len(files)
        inside = Path(folder).relative_to(root)
        found = inside.parts and any(name in files for name in _DOCUMENTS)
        if found:
            volumes.append(inside.as_posix())
        wkw = wkw or _WKW in files
        if found or len(inside.parts) >= _MAX_DEPTH or looked > _MAX_ENTRIES:
            below.clear()
        below.sort()
    if volumes:
        volumes.sort(key=lambda path: (path.count("/"), path))
        more = " and more" if len(volumes) > _SHOWN else ""
        return f"In it are {', '.join(volumes[:_SHOWN])}{more}", f"Append one to source.url: {root / volumes[0]}"
    if wkw:
        return (
            "It holds WKW files of WEBKNOSSOS, which are not read",
            "Have them as Zarr: set dataFormat zarr3 when the dataset is written or downloaded, or copy the array with "
            "the webknossos package",
        )
    if any(path.suffix.lower() in _SECTIONS for path in root.iterdir()):
        return "It holds TIFF or PNG files", "Make a volume of them by python -m pipeline.convert, and give that"
    return None
