"""Which of an array's axes are z, y and x, and how many nm a unit of length has."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.errors import SourceError

_NM_PER_UNIT = (
    (1e-3, ("picometer", "pm")),
    (0.1, ("angstrom", "ångström", "å")),
    (1.0, ("nanometer", "nanometre", "nm")),
    (1e3, ("micrometer", "micrometre", "micron", "um", "µm", "μm")),
    (1e6, ("millimeter", "millimetre", "mm")),
    (1e7, ("centimeter", "centimetre", "cm")),
    (1e9, ("meter", "metre", "m")),
)
NM_PER_UNIT = {name: nm for nm, names in _NM_PER_UNIT for name in names}
_KINDS = {"c": "a colour image", "channel": "a colour image", "t": "a time series", "time": "a time series"}
_ONE_OF_THEM = "Store one channel of one time as a volume of its own"
_NAME_THEM = (
    "If z, y and x are other axes, name all axes: dimension_names in zarr.json, _ARRAY_DIMENSIONS in .zattrs, axes in "
    "an N5 attributes.json. Else store one channel of one time as a volume of its own"
)


def nm_per(unit: object) -> float | None:
    """nm per `unit` (a UDUNITS-2 name, as in OME-NGFF, or its usual short form); None where it is no unit of length."""
    if not isinstance(unit, str):
        return None
    name = unit.strip().lower()
    if unit.strip() in ("Mm", "Pm"):  # megametre, petametre
        return None
    return NM_PER_UNIT.get(name.removesuffix("s") if len(name) > 4 else name)


def find_zyx(
    names: Sequence[str | None] | None, shape: Sequence[int], place: str, x_first: bool = False
) -> tuple[int, int, int]:
    """The indices of the axes z, y, x in stored order. `place` is what messages call the array.

    Where no axis is called x, y or z, the last three are z, y, x, or with `x_first` the first three x, y, z; so are
    those without a name beside others that have one. Every other axis must have length 1. Raises SourceError for arrays
    of fewer than three axes, colour images and time series.
    """
    rank = len(shape)
    words = [(name or "").lower() for name in names] if names is not None else [""] * rank
    if len(words) != rank:
        raise SourceError(
            f"{place} names {len(words)} axes {list(names or ())}, its array has {rank} axes of {list(shape)}",
            "a name for every axis",
        )
    if rank < 3:
        raise SourceError(
            f"{place} is a {rank}-D array of shape {list(shape)}",
            "a volume of z, y, x",
            "Stack sections with python -m pipeline.convert",
        )
    order = (2, 1, 0) if x_first else (rank - 3, rank - 2, rank - 1)
    if {"z", "y", "x"} & set(words):
        usual = dict(zip(order, "zyx", strict=True))
        words = [word or usual.get(axis, "") for axis, word in enumerate(words)]
        if not all(words.count(name) == 1 for name in "zyx"):
            raise SourceError(
                f"{place} has axes {words}",
                "each of z, y and x once",
                "Sections of one plane are stacked with python -m pipeline.convert",
            )
        order = (words.index("z"), words.index("y"), words.index("x"))
    for axis, length in enumerate(shape):
        if axis not in order and length != 1:
            kind = _KINDS.get(words[axis], "an array of more than three axes")
            saw = f"{place} is {kind} (axis {words[axis] or axis} has length {length} in shape {list(shape)})"
            raise SourceError(saw, "one grey volume", _NAME_THEM if names is None and 1 in shape else _ONE_OF_THEM)
    return order
