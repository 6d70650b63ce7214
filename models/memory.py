"""Bytes that the five-section network holds beyond its weights, from its parameters alone; importing this does not import torch.

Maps are counted in values per LR position, as the modules hold them at their fullest: what a caller's frame still names counts.
Modules that are switched off (the paper's table 5) need no more than those they stand for. `BAND_BYTES` bounds what `in_bands` holds.
"""

from __future__ import annotations

from itertools import pairwise

from models.config import VGG19, Params

BAND_BYTES = 16 << 20
"""Working size of one band: what stays in a last-level cache, and below glibc's 32 MiB, where every buffer is mapped anew."""
BAND_ROWS = 16
WARM_BYTES = 48 << 20
"""What a process keeps once it has run the network: compiled kernels, and the heap's gaps. Measured on a CPU with both presets."""
LEVELS = 1 + 1 / 4 + 1 / 16
"""A pyramid's three sizes."""


def band_rows(batch: int, peak: int, width: int) -> int:
    """Rows of a band in which `peak` float32 values per position and image fit BAND_BYTES, a multiple of BAND_ROWS."""
    return max(BAND_ROWS, BAND_BYTES // (4 * batch * peak * width) // BAND_ROWS * BAND_ROWS)


def state_bytes(params: Params, tile: int, value: int = 4) -> int:
    """What windows need of one encoded section, `tile` LR voxels across: the section and three levels of features."""
    return int(tile * tile * (4 + value * params.width * LEVELS))


def peak_bytes(params: Params, tile: int, value: int = 4) -> int:
    """Largest sum of maps while a section is encoded or a window fused, its states not among them. `value`: bytes per number."""
    return value * int(max(_encode(params, tile), _fuse(params, tile)))


def _encode(params: Params, tile: int) -> float:
    """LR features, then decoder, mask and MPF in turn, each beside what the ones before left."""
    n, r, width, widths = tile * tile, params.scale, params.width, params.prior.widths
    first, half, quarter = widths[0], (r / 2) ** 2, (r / 4) ** 2
    reference = [c * (r / (2 << level)) ** 2 for level, c in enumerate(widths[1:])]
    held = n * (1 + width + sum(reference))
    to_image = 2.5 * _band(4 * first, tile * r // 2, reach=2) + n * r * r
    decoder = held + max(3 * n * reference[0], to_image)  # a norm block holds four maps; or the last doubling
    held += n * r * r
    compared = 3 * n * r * r + 3 * _band(64, tile * r, reach=2) if params.mask == VGG19 else 5 * n * r * r * first
    mask = held + n * r * r + compared
    pyramid = n * width * sum(1 << 2 * level for level in range(1, r.bit_length() - 2))
    fusing = max(3 * width, 2 * width + widths[1]) / width * _band(width, tile * r // 2, reach=4)
    mpf = held + pyramid + max(fusing + n * half, 3 * n * width * quarter)
    return float(max(decoder, mask, mpf))


def _fuse(params: Params, tile: int) -> float:
    """Optical flow at four times the size, the last alignment, the reconstruction."""
    n, r, width, window, groups = tile * tile, params.scale, params.width, params.window, params.offset_groups
    pair = max(a + b for a, b in pairwise((8, *params.flow_widths, 2)))
    stacked = window * (2 * width * LEVELS + 1)
    flow = stacked + window * 16 * (
        2 + pair + 8 + 8 + 2
    )  # images twice; a convolution, its level's input, two pyramids, the flow
    evidence = stacked + window * (16 + 2 * params.flow_features * LEVELS + 3 * width)
    one = 9 * (20 * groups + width)  # corners' indices and weights, and the samples, of one section at a time
    aligned = evidence + window * 27 * groups + (window - 1) * width + one
    held = r * r + window * width + width
    doubled = width * (r / 2) ** 2 + 2 * r * r
    reconstruct = max(
        n * (held + 9 * width * (r / 4) ** 2), n * (held + doubled) + 2 * _band(4 * width, tile * r // 2, reach=3)
    )
    return max(n * flow, n * aligned, reconstruct)


def _band(peak: int, side: int, reach: int) -> int:
    """Values of a band's largest map, or of the whole where that is smaller."""
    return min(side, band_rows(1, peak, side) + 2 * reach) * side * peak
