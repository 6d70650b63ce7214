"""Fills of absent chunks: when one may be wanted, and one that was stated after its target was begun.

Where absent chunks are an error, a slab that meets one is quarantined and never written. So what is written has met
none, and has the same bytes whatever fill is stated afterwards. Therefore the plan and its digest stay those of the
first run, and the fill is recorded beside them, in plan.json and in the target's provenance.
"""

from __future__ import annotations

import copy
from typing import Any

KEY = "stated_later"
"""Under it plan.json and the provenance hold the fills: key of volume.yaml -> its value."""
_PLACES: dict[str, tuple[str, ...]] = {
    "source.missing_chunks": ("source",),
    "source.mask.missing_chunks": ("source", "mask"),
}


def advice(key: str, unstored: int | None) -> str:
    """What absent chunks may mean, and what to do. `unstored` is what the volume's own fill value would be read as."""
    value, fill = ("", "N") if unstored is None else (f", here {unstored}", str(unstored))
    return (
        "Slabs that meet one are quarantined. zarr-python 3, WEBKNOSSOS, bioformats2raw and others do not store chunks "
        f"of nothing but the fill value{value}: if that is so, state {key}: {{fill: {fill}}}, now or later"
    )


def stated_later(begun: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The fills of the specification `now` where the one that a target was begun with has an error."""
    if begun is None:
        return {}
    found = {}
    for key, place in _PLACES.items():
        theirs, ours = _holder(begun, place), _holder(now, place)
        if theirs and ours and theirs["missing_chunks"] == "error" != ours["missing_chunks"]:
            found[key] = ours["missing_chunks"]
    return found


def as_begun(spec: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The specification with an error in the place of the fills that were stated later."""
    return _with(spec, dict.fromkeys(later, "error"))


def as_it_is(spec: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """The reverse: the specification with the fills that were stated later."""
    return _with(spec, later)


def _with(spec: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(spec)
    for key, value in values.items():
        holder = _holder(changed, _PLACES[key])
        assert holder is not None
        holder["missing_chunks"] = value
    return changed


def _holder(spec: dict[str, Any], place: tuple[str, ...]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = spec
    for name in place:
        found = found.get(name) if found else None
    return found
