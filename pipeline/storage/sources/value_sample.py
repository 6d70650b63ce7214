"""Which values a level holds, as far as a few small boxes of it tell: for a message that proposes a window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.base.errors import EmsrError
from pipeline.base.geometry import ZYX, Box
from pipeline.storage.sources.voxel_array import Level, Voxels, item_bytes

MAX_BOXES = 9
MAX_READ_S = 5.0
"""Seconds after which no further box is read."""
MAX_DECODED_BYTES = 128 << 20
"""A level with larger chunks is not looked at."""
SIDE = 128
"""Voxels across a box, y and x."""
TAIL = 0.5
"""Per cent of the voxels that lie below `inner_low`, and above `inner_high`."""
_PARTS = (0.5, 0.25, 0.75)


@dataclass(frozen=True)
class Values:
    """Of so many voxels, NaN and infinite ones left out: the least and greatest, and those between which 99 % lie.

    They are int for integer types, else float.
    """

    voxels: int
    low: int | float
    high: int | float
    inner_low: int | float
    inner_high: int | float


def looked_at(level: Level) -> Values | None:
    """The values of a few boxes; None where none can be read. Boxes that cannot are left out: this is no check."""
    if int(np.prod(level.stored_chunk)) * item_bytes(level.dtype) > MAX_DECODED_BYTES:
        return None
    parts: list[Voxels] = []
    end = time.monotonic() + MAX_READ_S
    try:
        array = level.opener(level)
        for box in _boxes(level):
            if time.monotonic() > end:
                break
            try:
                parts.append(array.start(box)().ravel())
            except EmsrError:
                continue
    except EmsrError:
        pass  # the volume cannot be opened: the message that wants a window does without a proposal
    values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if not values.size:
        return None
    kind = int if values.dtype.kind in "iu" else float
    inner = np.percentile(values, [TAIL, 100 - TAIL], method="nearest")
    return Values(values.size, kind(values.min()), kind(values.max()), kind(inner[0]), kind(inner[1]))


def _boxes(level: Level) -> Iterator[Box]:
    """Boxes of one section, each inside one chunk, the volume's middle first."""
    shape, chunk = level.bounds.shape, level.chunk
    for n in range(MAX_BOXES):
        y, x = _PARTS[n % 3], _PARTS[n // 3]
        z = (n + 0.5) / MAX_BOXES if n else 0.5
        middle = ZYX(int(shape.z * z), int(shape.y * y), int(shape.x * x))
        corner = middle // chunk * chunk
        start = ZYX(middle.z, corner.y, corner.x)
        stop = ZYX(middle.z + 1, corner.y + min(SIDE, chunk.y), corner.x + min(SIDE, chunk.x)).minimum(shape)
        yield Box(start, stop).shift(level.bounds.start)
