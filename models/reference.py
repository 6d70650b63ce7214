"""An LR section's reference: what codebook and decoder make of the codes that the indexer reads in it (eq. 3)."""

from __future__ import annotations

from torch import Tensor, nn

from models.config import Params
from models.indexer import Indexer
from models.vqgan import Codebook, Decoded, Decoder


class Prior(nn.Module):
    """Indexer, codebook and decoder, frozen in stage III."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.indexer = Indexer(params.prior, params.scale)
        self.codebook = Codebook(params.prior)
        self.decoder = Decoder(params.prior)

    def indices(self, section: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, rH/p, rW/p) most likely codes."""
        return self.indexer(section).argmax(1)  # type: ignore[no-any-return]

    def forward(self, section: Tensor) -> Decoded:
        """(B, 1, H, W) -> I_Ref (B, 1, rH, rW) and F_Ref."""
        return self.decoder(self.codebook.lookup(self.indices(section)))  # type: ignore[no-any-return]
