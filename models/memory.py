"""Bytes of feature maps that the five-section network holds at once beyond its weights, computed from its parameters.

Importing this does not import torch. The unit is values per LR voxel. Each formula counts the moment when its module
holds most maps; a map that a calling function still refers to is counted too. Residual blocks in place of a module that
is switched off (the paper's table 5) need no more than that module. `BAND_BYTES` bounds what `layers.in_bands` holds.
"""

from __future__ import annotations

from itertools import pairwise

from models.config import VGG19, Params

BAND_BYTES = 16 << 20
"""Size of the largest map of a band. It fits a last-level cache, and is below the 32 MiB from which on glibc maps every
buffer anew."""
BAND_ROWS = 16
"""The rows of a band are a multiple of this."""
WARM_BYTES = 48 << 20
"""Bytes that a process keeps once it has run the network: compiled kernels and unused memory of the heap. Measured on a
CPU with both presets."""
LEVELS = 1 + 1 / 4 + 1 / 16
"""Positions of POD's three levels together, relative to those of the finest."""


def band_rows(batch: int, peak: int, width: int) -> int:
    """Rows of a band of `batch` images of `width` columns in which `peak` float32 values per position fit into
    BAND_BYTES; a multiple of BAND_ROWS, and at least that.
    """
    return max(BAND_ROWS, BAND_BYTES // (4 * batch * peak * width) // BAND_ROWS * BAND_ROWS)


def state_bytes(params: Params, tile: int, value: int = 4) -> int:
    """Bytes of the state of one encoded section of `tile` x `tile` LR voxels: the section in float32, and three levels
    of features of `value` bytes per number.
    """
    return int(tile * tile * (4 + value * params.width * LEVELS))


def peak_bytes(params: Params, tile: int, value: int = 4, gpu: bool = False) -> int:
    """Bytes of the largest sum of maps while a section of `tile` x `tile` LR voxels is encoded or a window is fused,
    without the window's states. `value` is the number of bytes per number. A `gpu` computes no bands, and aligns the
    sections of a window together.
    """
    encode, fuse = value * _encode(params, tile, gpu), value * _fuse(params, tile, gpu)
    return int(max(encode, fuse, _sampled(params, tile, value) if gpu else 0))


def _encode(params: Params, tile: int, gpu: bool) -> float:
    """Values while a section is encoded: decoder, mask and MPF in turn, each with the maps that earlier modules
    left.
    """
    n, r, width, widths = tile * tile, params.scale, params.width, params.prior.widths
    first, half, quarter = widths[0], (r / 2) ** 2, (r / 4) ** 2
    reference = [c * (r / (2 << level)) ** 2 for level, c in enumerate(widths[1:])]
    held = n * (1 + width + sum(reference))
    to_image = 2.5 * _band(4 * first, tile * r // 2, 2, gpu) + n * r * r
    decoder = held + max(3 * n * reference[0], to_image)  # a norm block holds four maps; or the last doubling
    held += n * r * r
    compared = 3 * n * r * r + 3 * _band(64, tile * r, 2, gpu) if params.mask == VGG19 else 5 * n * r * r * first
    mask = held + n * r * r + compared
    pyramid = n * width * sum(1 << 2 * level for level in range(1, r.bit_length() - 2))
    fusing = max(3 * width, 2 * width + widths[1]) / width * _band(width, tile * r // 2, 4, gpu)
    mpf = held + pyramid + max(fusing + n * half, 3 * n * width * quarter)
    return float(max(decoder, mask, mpf))


def _fuse(params: Params, tile: int, gpu: bool) -> float:
    """Values while a window is fused: the most of the optical flow at four times the size, the last alignment and the
    reconstruction.
    """
    n, r, width, window, groups = tile * tile, params.scale, params.width, params.window, params.offset_groups
    pair = max(a + b for a, b in pairwise((8, *params.flow_widths, 2)))
    stacked = window * (2 * width * LEVELS + 1)
    # two images; input and output of a convolution, the input of its level, two pyramids, the flow
    flow = stacked + window * 16 * (2 + pair + 8 + 8 + 2)
    inputs = stacked + window * (16 + 2 * params.flow_features * LEVELS + 3 * width)
    # one section with its border at a time; what is sampled at once is no map
    aligned = inputs + window * 27 * groups + (window + 1) * width
    held = r * r + window * width + width
    doubled = width * (r / 2) ** 2 + 2 * r * r
    reconstruct = max(
        n * (held + 9 * width * (r / 4) ** 2), n * (held + doubled) + 2 * _band(4 * width, tile * r // 2, 3, gpu)
    )
    return max(n * flow, n * aligned, reconstruct)


def _sampled(params: Params, tile: int, value: int) -> float:
    """Bytes while a GPU moves the taps of all sections of a window: positions, weights and samples are float32."""
    n, width, window, groups = tile * tile, params.width, params.window, params.offset_groups
    inputs = window * (2 * width * LEVELS + 1 + 16 + 2 * params.flow_features * LEVELS + 3 * width + 27 * groups)
    float32 = window * (27 * groups + 2 * 18 * groups + 9 * groups + width + 2 * 9 * width)
    return n * (value * (inputs + window * 9 * width) + 4 * float32)


def _band(peak: int, side: int, halo: int, gpu: bool) -> int:
    """Values of the largest map of a band with its halo, or of the whole of `side` x `side` where that is smaller."""
    return (side if gpu else min(side, band_rows(1, peak, side) + 2 * halo)) * side * peak
