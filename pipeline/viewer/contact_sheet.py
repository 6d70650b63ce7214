"""A small picture of a run's result: LR, SR beside it, and where the two disagree. Takes arrays, returns PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Plane = NDArray[np.uint8]

ROWS = 3
SIDE = 512
"""The most pixels across a panel: three panels with their gaps stay below 1600."""
GAP = 8
CAPTION = 20
PAPER, INK = 255, 0
MAX_HEAT = 32
"""Grey levels of fidelity from which on the colour is the brightest: disagreements are small numbers."""

_HEAT = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], np.float32)
"""Five stops from low (dark violet) to high (yellow), evenly spaced; lightness rises throughout."""


def contact_sheet(
    pairs: Sequence[tuple[Plane, Plane]], scale: int, labels: Sequence[str] = (), fidelity: Sequence[Plane | None] = ()
) -> bytes:
    """A PNG with a row for each of up to three sections (first, middle, last of `pairs`).

        z 5: LR as measured | SR x8 | fidelity

    `pairs` are (LR, SR) planes (y, x), SR `scale` times as large as LR; `fidelity` planes are as large as LR or SR.
    `labels` and `fidelity` have an entry for each pair, or none at all. The centre of each plane is shown with its grey
    values unchanged: one pixel for an SR voxel, a square of scale x scale pixels for an LR voxel. Raises ValueError for
    shapes that do not fit one another.
    """
    for name, given in (("labels", labels), ("fidelity planes", fidelity)):
        if given and len(given) != len(pairs):
            raise ValueError(f"{len(given)} {name} for {len(pairs)} pairs")
    if not pairs:
        raise ValueError("a contact sheet needs at least one pair of sections")
    chosen = range(len(pairs)) if len(pairs) <= ROWS else (0, len(pairs) // 2, len(pairs) - 1)
    return compose(
        [_row(*pairs[i], scale, f"{labels[i]}: " if labels else "", fidelity[i] if fidelity else None) for i in chosen]
    )


def compose(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> bytes:
    """A PNG of rows of panels, each with its caption above it."""
    columns = max(len(row) for row in rows)
    width = max(panel.width for row in rows for _, panel in row)
    heights = [max(panel.height for _, panel in row) for row in rows]

    sheet = Image.new(
        "RGB", (GAP + columns * (width + GAP), GAP + sum(CAPTION + height + GAP for height in heights)), (PAPER,) * 3
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, panel) in enumerate(row):
            left = GAP + column * (width + GAP)
            draw.text((left, top), _fitting(caption, font, width), fill=(INK,) * 3, font=font)
            sheet.paste(panel, (left, top + CAPTION))
        top += CAPTION + height + GAP
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _row(lr: Plane, sr: Plane, scale: int, label: str, fidelity: Plane | None) -> list[tuple[str, Image.Image]]:
    """Captions and panels of one section."""
    if lr.ndim != 2 or lr.size == 0 or sr.shape != (lr.shape[0] * scale, lr.shape[1] * scale):
        raise ValueError(f"LR {lr.shape} and SR {sr.shape} do not go together at scale {scale}")
    shown = [min(n, max(1, SIDE // scale)) for n in lr.shape]
    starts = [(n - k) // 2 for n, k in zip(lr.shape, shown, strict=True)]
    coarse = tuple(slice(a, a + k) for a, k in zip(starts, shown, strict=True))
    fine = tuple(slice(a * scale, (a + k) * scale) for a, k in zip(starts, shown, strict=True))
    row = [
        (f"{label}LR as measured", Image.fromarray(_enlarged(lr[coarse], scale))),
        (f"{label}SR x{scale}", Image.fromarray(sr[fine])),
    ]
    if fidelity is not None:
        if fidelity.shape not in (lr.shape, sr.shape):
            raise ValueError(f"fidelity {fidelity.shape} is neither LR {lr.shape} nor SR {sr.shape}")
        part = fidelity[fine] if fidelity.shape == sr.shape else _enlarged(fidelity[coarse], scale)
        row.append((f"{label}SR against LR, 0 to {MAX_HEAT} grey levels", heat(part)))
    return row


def _enlarged(plane: Plane, scale: int) -> Plane:
    return plane.repeat(scale, axis=0).repeat(scale, axis=1)


def heat(plane: Plane, top: int = MAX_HEAT) -> Image.Image:
    """The plane as colours, from dark violet for 0 to yellow for `top` and more."""
    levels = np.linspace(0, top, len(_HEAT))
    table = np.stack([np.interp(np.arange(256), levels, _HEAT[:, c]) for c in range(3)], axis=1)
    return Image.fromarray(np.rint(table).astype(np.uint8)[plane])


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text
