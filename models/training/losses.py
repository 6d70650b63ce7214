"""The losses of the three stages, each as the paper's equation and the published code have it (network.md, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

BANDWIDTH = 0.5
EPSILON = 1e-5


def codebook_loss(latent: Tensor, quantised: Tensor, beta: float = 1.0) -> Tensor:
    """Second and third term of eq. 5: the codebook's rows go to Z_e, and with weight beta Z_e to its rows."""
    return functional.mse_loss(quantised, latent.detach()) + beta * functional.mse_loss(latent, quantised.detach())


def generator_loss(of_fake: Tensor) -> Tensor:
    """Eq. 5's adversarial term for the generator: minus the mean score of what it made."""
    return -of_fake.mean()


def critic_loss(of_real: Tensor, of_fake: Tensor) -> Tensor:
    """The discriminator's own: half the mean difference of its scores; no hinge, no logarithm."""
    return 0.5 * (of_fake.mean() - of_real.mean())


def r1_penalty(critic: nn.Module, real: Tensor, weight: float, every: int) -> Tensor:
    """weight / 2 * every * mean over the batch of the squared norm of the scores' gradient at real images (Mescheder et al., 2018)."""
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
    return weight / 2 * every * gradient.square().flatten(1).sum(1).mean()


def index_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Eq. 6: mean cross entropy of (B, v, h, w) logits against the (B, h, w) indices of the HR section."""
    return functional.cross_entropy(logits, indices)


class Features(nn.Module):
    """The first layers of VGG19 (to relu3_4) or VGG16 (to relu3_3) in torchvision's names, from a file that the user has."""

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        places = [0, 2, 5, 7, 10, 12, 14] + ([16] if "features.16.weight" in state else [])
        layers: list[nn.Module] = []
        for place in places:
            weight, bias = (state[f"features.{place}.{kind}"] for kind in ("weight", "bias"))
            if place in (5, 10):
                layers.append(nn.MaxPool2d(2))
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            conv.load_state_dict({"weight": weight, "bias": bias})
            layers += [conv, nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) in 0..1 -> (B, 256, H/4, W/4)."""
        return self.layers((image - self.mean) / self.std)  # type: ignore[no-any-return]


def reference_loss(features: nn.Module, sr: Tensor, references: Tensor) -> Tensor:
    """Eq. 8, multi-reference fidelity: SR (B, 1, H, W) against the references of its five sections, (B, N, 1, H, W)."""
    n = references.shape[1]
    seen = features(sr).repeat_interleave(n, 0)
    with torch.no_grad():
        wanted = features(references.flatten(0, 1))
    return contextual_loss(seen, wanted)


def contextual_loss(seen: Tensor, wanted: Tensor) -> Tensor:
    """Contextual similarity of (B, C, h, w) features, minus its logarithm, mean over B; `wanted` is the reference's.

    Every position j of the reference finds the position of SR that resembles it most, among all; c_j says how much.
    """
    mean = wanted.mean((0, 2, 3), keepdim=True)
    a = functional.normalize((seen - mean).flatten(2), dim=1)
    b = functional.normalize((wanted - mean).flatten(2), dim=1)
    distance = (1 - a.transpose(1, 2) @ b).clamp_min(0)  # (B, i, j)
    relative = distance / (distance.amin(2, keepdim=True) + EPSILON)
    weight = ((1 - relative) / BANDWIDTH).exp()
    similarity, best = (weight / (weight.sum(2, keepdim=True) + EPSILON)).max(1)
    confidence = ((1 - distance.gather(1, best[:, None])[:, 0]) / BANDWIDTH).exp()
    return -((similarity * confidence).sum(1) / confidence.sum(1) + EPSILON).log().mean()
