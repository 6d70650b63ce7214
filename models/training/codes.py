"""Is the codebook alive? Which rows are used, how evenly, and a way to bring dead ones back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.vqgan import Codebook


class CodeUsage:
    """How often each code was nearest since rows were last revived."""

    def __init__(self, codes: int) -> None:
        self.counts = torch.zeros(codes, dtype=torch.int64)

    def count(self, indices: Tensor) -> None:
        self.counts += torch.bincount(indices.flatten().cpu(), minlength=len(self.counts))

    def revive(self, codebook: Codebook, latent: Tensor, rng: np.random.Generator) -> int:
        """Put the rows that nobody used on encoder outputs of this batch, drawn at random; returns how many."""
        dead = torch.nonzero(self.counts == 0)[:, 0]
        self.counts.zero_()
        if not len(dead):
            return 0
        rows = latent.permute(0, 2, 3, 1).flatten(0, 2)
        drawn = torch.from_numpy(rng.integers(len(rows), size=len(dead)))
        with torch.no_grad():
            codebook.weight[dead.to(codebook.weight.device)] = rows[drawn.to(rows.device)].to(codebook.weight.dtype)
        return len(dead)

    @staticmethod
    def health(indices: Tensor, codes: int) -> dict[str, float]:
        """`codes_used`, a share, and `perplexity`, e to the entropy of usage: `codes` where all are used alike, 1 for a dead book."""
        counts = torch.bincount(indices.flatten().cpu(), minlength=codes).double()
        share = counts[counts > 0] / counts.sum()
        return {"codes_used": len(share) / codes, "perplexity": float((-(share * share.log()).sum()).exp())}
