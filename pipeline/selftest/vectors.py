"""Reference vectors on a device: what it makes of known sections against what float32 on a CPU made of them."""

from __future__ import annotations

import numpy as np

from models import vectors
from models.vectors import Vector
from pipeline.inference.network import Network
from pipeline.selftest.findings import VectorFound
from pipeline.selftest.networks import Window, run_window

TOLERANCE = 1e-4
"""The largest difference allowed in float32, in grey 0..1, of which the rounding of what is stored takes 8e-6."""
LEAST_PSNR_DB = {"tf32": 60.0, "bfloat16": 45.0, "float16": 45.0}
"""What other precisions must reach against float32."""


def check(network: Network, vector: Vector, may_overflow: bool) -> VectorFound:
    """One vector through a network with its weights. `may_overflow` is whether values that are no numbers are no
    fault.
    """
    expected = Window(*vectors.expected(vector))
    found = run_window(network, vectors.voxels(vector.start, vector.shape))
    return judge(vector.name, network.spec.precision, found, expected, may_overflow)


def judge(name: str, precision: str, found: Window, expected: Window, may_overflow: bool = False) -> VectorFound:
    """Whether `found` is as near to `expected` as this precision must be."""
    changed = found.changed(expected)
    least = LEAST_PSNR_DB.get(precision)
    tolerance = TOLERANCE if least is None else None
    if not np.isfinite(found.sr).all():
        return VectorFound(name, precision, None, None, changed, tolerance, least, may_overflow)
    difference, psnr_db = float(np.abs(found.sr - expected.sr).max()), found.psnr_db(expected)
    ok = difference <= TOLERANCE and not changed if least is None else psnr_db is None or psnr_db >= least
    return VectorFound(name, precision, difference, psnr_db, changed, tolerance, least, ok)
