"""Codebook usage: how many rows are used and how evenly, and a way to set unused rows to outputs of the encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.training.ranks import ALONE, Ranks
from models.vqgan import Codebook


class CodeUsage:
    """Counts how often each code was the nearest one, in all ranks, since unused rows were last revived."""

    def __init__(self, codes: int) -> None:
        self.counts = torch.zeros(codes, dtype=torch.int64)

    def count(self, indices: Tensor, ranks: Ranks = ALONE) -> None:
        """Add codes of any shape to the counts, which move to their device. A GPU is not waited for, as it would be by
        bincount.
        """
        flat = indices.flatten()
        found = torch.zeros(len(self.counts), dtype=torch.int64, device=flat.device)
        self.counts = self.counts.to(flat.device) + ranks.sum(found.index_add_(0, flat, torch.ones_like(flat)))

    def revive(self, codebook: Codebook, latent: Tensor, rng: np.random.Generator, ranks: Ranks = ALONE) -> Tensor:
        """Set every row with a count of 0 to one of the encoder's outputs `latent` (B, d, h, w), drawn at random from
        those of all ranks, and all counts to 0. Every rank draws the same. Returns the rows' indices.
        """
        unused = torch.nonzero(self.counts == 0)[:, 0]
        self.counts.zero_()
        if len(unused):
            rows = ranks.gather(latent.permute(0, 2, 3, 1).flatten(0, 2))
            drawn = torch.from_numpy(rng.integers(len(rows), size=len(unused)))
            with torch.no_grad():
                codebook.weight[unused.to(codebook.weight.device)] = rows[drawn.to(rows.device)].to(
                    codebook.weight.dtype
                )
        return unused

    @staticmethod
    def health(indices: Tensor, codes: int) -> dict[str, float]:
        """Of the codes `indices` of any shape: `codes_used`, the share of all `codes` that occur, and `perplexity`, e
        to the power of the entropy of their frequencies. It is `codes` where all occur equally often, and 1 where one
        alone does.
        """
        counts = torch.bincount(indices.flatten().cpu(), minlength=codes).double()
        share = counts[counts > 0] / counts.sum()
        return {"codes_used": len(share) / codes, "perplexity": float((-(share * share.log()).sum()).exp())}
