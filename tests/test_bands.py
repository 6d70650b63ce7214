"""Maps that are computed band by band are those computed whole: a band's edge never shows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import memory
from models.config import X8_SMALL, X16_SMALL, Params
from models.layers import conv3, in_bands
from models.network import SuperResolver


@pytest.mark.parametrize("params", [X8_SMALL, X16_SMALL])
def test_a_section_encoded_in_bands(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoder, mask and fusion with the smallest bands against one band. The bytes of a store are 1/255 apart."""
    torch.manual_seed(0)
    network = SuperResolver(params).eval()
    section = torch.rand(1, 1, 16, 24)
    with torch.inference_mode():
        reference, state = network.prior(section), network.encode_section(section)
        monkeypatch.setattr(memory, "BAND_BYTES", 1)
        in_parts, state_in_parts = network.prior(section), network.encode_section(section)
    assert torch.allclose(reference.image, in_parts.image, atol=1e-5)
    for whole, part in zip(state.pyramid, state_in_parts.pyramid, strict=True):
        assert torch.allclose(whole, part, atol=1e-5)


def test_bands_of_a_chain_that_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands are cut at multiples of the stride, the last one is shorter, and the reach is needed in full."""
    torch.manual_seed(0)
    chain = nn.Sequential(conv3(1, 4), conv3(4, 4), conv3(4, 4), conv3(4, 1, stride=2))
    x = torch.rand(2, 1, 40, 8)
    with torch.inference_mode():
        whole = chain(x)
        monkeypatch.setattr(memory, "BAND_BYTES", 1)
        assert torch.allclose(in_bands(chain, x, halo=4, peak=4), whole, atol=1e-6)
        assert not torch.allclose(in_bands(chain, x, halo=2, peak=4), whole, atol=1e-6)
