"""How stored values become grey values 0..255: which types may, and through which window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import SourceError
from pipeline.storage.sources.value_sample import looked_at
from pipeline.storage.sources.voxel_array import Level, Voxels
from pipeline.storage.volume import Uint8Array

ToUint8 = Callable[[Voxels], Uint8Array]
"""Grey values of stored ones, of the same shape. Stored NaN is none of them: it must not be given."""
Window = tuple[int | float, int | float]

_TABLED = ("int8", "uint8", "int16", "uint16")
_COMPUTED = ("int32", "float16", "float32", "float64")
_WANTED = "an image of uint8, or of int8, int16, uint16, int32 or floats with a source.intensity_window"
_NOT_LABELS = "Give the url of the EM image, not of its labels"
_STORE_AGAIN = "an image is read once it is stored again as int32 or float64, e.g. with zarr-python"


def mapping(level: Level, window: Window | None, invert: bool) -> ToUint8:
    """How stored values of `level` become uint8. Raises SourceError for types that are no EM image, for a window that
    the type does not have, and where there is none and one is needed: then some voxels are read, to propose one.
    """
    dtype = level.dtype
    _refuse_other_types(level)
    if window is None and dtype != "uint8":
        raise _window_wanted(level)
    if window is None:
        return np.bitwise_not if invert else _as_it_is
    if np.dtype(dtype).kind in "iu":
        _check_whole(level, window)
    if dtype in _TABLED:
        table = linear_table(dtype, window)
        table = np.bitwise_not(table) if invert else table
        return lambda voxels: table[voxels]
    low, high = window
    return lambda voxels: linear_values(voxels, low, high, invert)


def linear_table(dtype: str, window: Window) -> NDArray[np.uint8]:
    """The grey value of each value of an integer type of 8 or 16 bits, in the order of their bits as an unsigned
    number, so that a negative value is found by itself as the index.

    low..high become 0..255 linearly, rounded half up, clamped outside. It is computed in integers, so that every
    machine gives the same.
    """
    low, high = (int(v) for v in window)
    bits = np.dtype(dtype)
    values = np.arange(1 << 8 * bits.itemsize, dtype=np.int64).astype(f"u{bits.itemsize}").view(bits)
    above = np.clip(values.astype(np.int64), low, high) - low
    return ((above * 510 + (high - low)) // (2 * (high - low))).astype(np.uint8)


def linear_values(voxels: Voxels, low: float, high: float, invert: bool) -> Uint8Array:
    """The same for other types, a section at a time: floor((v - low) * 255 / (high - low) + 0.5), v clamped to
    low..high. Each step is one operation of IEEE 754 in float64, which every machine rounds alike.
    """
    grey = np.empty(voxels.shape, np.uint8)
    span = float(high) - float(low)
    for section, out in zip(voxels, grey, strict=True):
        value = np.clip(section.astype(np.float64), low, high)
        value -= low
        value *= 255
        value /= span
        value += 0.5
        out[...] = np.floor(value, out=value)
    return np.bitwise_not(grey, out=grey) if invert else grey


def _as_it_is(voxels: Voxels) -> Uint8Array:
    grey: Uint8Array = voxels
    return grey


def _refuse_other_types(level: Level) -> None:
    place, dtype = level.place, level.dtype
    if level.labels:
        raise SourceError(f"{place} is a segmentation ({dtype})", "an image", _NOT_LABELS)
    if dtype in _TABLED or dtype in _COMPUTED:
        return
    if dtype == "bool":
        raise SourceError(f"{place} is bool, as masks are", _WANTED, "Give a mask as source.mask")
    if np.dtype(dtype).kind in "iu":
        raise SourceError(f"{place} is {dtype}, as segmentations are", _WANTED, f"{_NOT_LABELS}; {_STORE_AGAIN}")
    advice = "Store what is to be seen of it, e.g. its magnitude, as float32"
    raise SourceError(f"{place} is {dtype}", _WANTED, advice)


def _check_whole(level: Level, window: Window) -> None:
    """Raises SourceError unless the window is whole numbers of the level's integer type."""
    known = np.iinfo(level.dtype)
    if not all(isinstance(v, int) and known.min <= v <= known.max for v in window):
        shown = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in window)
        raise SourceError(
            f"source.intensity_window is [{shown}], and {level.place} is {level.dtype}",
            f"whole numbers from {known.min} to {known.max}",
            "Correct the window" if level.dtype != "uint8" else "Correct the window, or take intensity_window away",
        )


def _window_wanted(level: Level) -> SourceError:
    saw, do = f"{level.place} is {level.dtype}", ""
    found = looked_at(level)
    if found is not None:
        saw += f"; {found.voxels:,} voxels of it are {_number(found.low)} to {_number(found.high)}"
        if found.inner_low < found.inner_high:
            inner = f"{_number(found.inner_low)}, {_number(found.inner_high)}"
            saw += f", 99 % of them within [{inner}]"
            do = f"For those: source.intensity_window: [{inner}]"
    return SourceError(saw, "source.intensity_window: [low, high], the values that become 0 and 255", do)


def _number(value: Any) -> str:
    """As it can be pasted into YAML, which takes 1e-05 for text."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}.0e{exponent}" if e and "." not in mantissa else text
