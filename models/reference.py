"""The prior: the HR image and features that indexer, codebook and decoder predict from an LR section (eq. 3)."""

from __future__ import annotations

from torch import Tensor, nn

from models.config import Params
from models.indexer import Indexer
from models.vqgan import Codebook, Decoded, Decoder


class Prior(nn.Module):
    """Indexer, codebook and decoder, which stages I and II train and stage III leaves as they are."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.indexer = Indexer(params.prior, params.scale)
        self.codebook = Codebook(params.prior)
        self.decoder = Decoder(params.prior)

    def indices(self, section: Tensor) -> Tensor:
        """LR section (B, 1, H, W) -> the most likely code of every token, (B, rH/p, rW/p)."""
        return self.indexer(section).argmax(1)  # type: ignore[no-any-return]

    def forward(self, section: Tensor) -> Decoded:
        """LR section (B, 1, H, W) -> I_Ref (B, 1, rH, rW) and the features F_Ref^l."""
        return self.decoder(self.codebook.lookup(self.indices(section)))  # type: ignore[no-any-return]
