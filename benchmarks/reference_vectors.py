"""Writes models/vectors.npz: what float32 on this CPU makes of the reference vectors (models/vectors.py).

    python benchmarks/reference_vectors.py [PATH=models/vectors.npz]

Prints per vector how far apart the two likeliest codes are at the closest token, over the spread of all logits.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from models import vectors
from pipeline.inference.network import Network
from pipeline.selftest.networks import Formula, run_window

LEAST_GAP = 2e-4
"""A hundred times the rounding of float32; a vector whose codes are closer is no reference."""


def main(path: str = str(vectors.PATH)) -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        formula = Formula(Path(folder))
        for vector in vectors.VECTORS:
            network = Network(formula.spec(vector), torch.device("cpu"))
            logits: list[torch.Tensor] = []
            network.module.prior.indexer.register_forward_hook(  # type: ignore[union-attr]
                lambda _module, _inputs, found, logits=logits: logits.append(found)
            )
            found = run_window(network, vectors.voxels(vector.start, vector.shape))
            likeliest = torch.cat(logits).topk(2, 1).values
            gap = ((likeliest[:, 0] - likeliest[:, 1]).min() / torch.cat(logits).std()).item()
            print(
                f"{vector.name}: codes apart by {gap:.2g}, SR {found.sr.min():.2f} to {found.sr.max():.2f}", flush=True
            )
            if gap < LEAST_GAP:
                raise SystemExit(f"wanted: at least {LEAST_GAP}; take another start")
            arrays[f"{vector.name} sr"] = np.rint(found.sr.astype(np.float64) * vectors.STEPS).astype(np.int32)
            arrays[f"{vector.name} indices"] = found.indices.astype(np.int16)
    np.savez_compressed(path, **arrays)
    print(f"{path}: {Path(path).stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
