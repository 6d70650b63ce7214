"""Which stored axis is z, y and x, and how many nm its unit has."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.base.errors import SourceError

NM_PER_UNIT = {
    "picometer": 1e-3, "pm": 1e-3, "angstrom": 0.1, "ångström": 0.1, "å": 0.1, "nanometer": 1.0, "nanometre": 1.0, "nm": 1.0,
    "micrometer": 1e3, "micrometre": 1e3, "micron": 1e3, "um": 1e3, "µm": 1e3, "μm": 1e3,
    "millimeter": 1e6, "millimetre": 1e6, "mm": 1e6, "centimeter": 1e7, "centimetre": 1e7, "cm": 1e7, "meter": 1e9, "metre": 1e9, "m": 1e9,
}  # fmt: skip
_KINDS = {"c": "a colour image", "channel": "a colour image", "t": "a time series", "time": "a time series"}


def nm_per(unit: object) -> float | None:
    """nm per `unit` (a UDUNITS-2 name, as in OME-NGFF, or its usual short form), None where it is none of length."""
    if not isinstance(unit, str):
        return None
    name = unit.strip().lower()
    return NM_PER_UNIT.get(name.removesuffix("s") if len(name) > 4 else name)


def find_zyx(
    names: Sequence[str | None] | None, shape: Sequence[int], place: str, x_first: bool = False
) -> tuple[int, int, int]:
    """The stored axes that are z, y, x. Every other axis must have length 1.

    Where no axis is called x, y or z: the last three are z, y, x; with `x_first` the first three are x, y, z.
    Raises SourceError for images of fewer than three axes, colour images and time series.
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
    spatial = [word for word in words if word in ("z", "y", "x")]
    if not spatial:
        order = (2, 1, 0) if x_first else (rank - 3, rank - 2, rank - 1)
    elif sorted(spatial) == ["x", "y", "z"]:
        order = (words.index("z"), words.index("y"), words.index("x"))
    else:
        raise SourceError(
            f"{place} has axes {words}",
            "each of z, y and x once",
            "Sections of one plane are stacked with python -m pipeline.convert",
        )
    for axis, length in enumerate(shape):
        if axis not in order and length != 1:
            kind = _KINDS.get(words[axis], "an array of more than three axes")
            seen = f"{place} is {kind} (axis {words[axis] or axis} has length {length} in shape {list(shape)})"
            raise SourceError(seen, "one grey volume", "Store one channel of one time as a volume of its own")
    return order
