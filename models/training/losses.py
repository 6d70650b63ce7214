"""The losses of the three stages: eqs. 5 to 8 of the paper, in the form that the published code computes.

Where the two differ, the code is followed (network.md, section 4): sums are means, the adversarial loss is the
difference of mean scores, and the multi-reference fidelity is averaged in another way (see `reference_loss`).

A loss is added up in `stages`; its weight is a key of config/stage.py, which pipeline/training/stage.py passes on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.layers import channels_last, weights_channels_last
from models.weights_file import convolution

BANDWIDTH = 0.5
"""The contextual loss' h (Mechrez et al., 2018): how fast the similarity of two features falls with their distance."""
EPSILON = 1e-5
"""Added to divisors and to the logarithm's argument."""


def codebook_loss(latent: Tensor, quantised: Tensor, beta: float = 1.0) -> Tensor:
    """L_c of eq. 5, of Z_e `latent` and Z_d `quantised`, both (B, d, h, w): the mean squared distance whose gradient
    moves the rows of the codebook towards Z_e, plus beta times the one whose gradient moves Z_e towards its rows.
    """
    return functional.mse_loss(quantised, latent.detach()) + beta * functional.mse_loss(latent, quantised.detach())


def generator_loss(fake_scores: Tensor) -> Tensor:
    """L_adv of eq. 5 as the generator minimises it: minus the mean of the discriminator's scores of its images."""
    return -fake_scores.mean()


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """L_adv of eq. 5 as the discriminator minimises it: half of the mean score of generated images minus that of real
    ones. There is no hinge and no logarithm, as in a Wasserstein GAN's critic.
    """
    return 0.5 * (fake_scores.mean() - real_scores.mean())


def r1_penalty(critic: nn.Module, real: Tensor, weight: float, every: int) -> Tensor:
    """R1 regularisation (Mescheder et al., 2018) at real images (B, 1, H, W): weight / 2 times the mean over the batch
    of the squared norm of the gradient of the scores; times `every`, because only every such step has this term.
    """
    real = real.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(critic(real).sum(), real, create_graph=True)
    return weight / 2 * every * gradient.square().flatten(1).sum(1).mean()


def index_loss(logits: Tensor, indices: Tensor) -> Tensor:
    """Eq. 7: the cross entropy of logits (B, v, h, w) against the codebook indices (B, h, w) of the HR section, as a
    mean over tokens.
    """
    return functional.cross_entropy(logits, indices)


class Features(nn.Module):
    """The first layers of VGG19 (to relu3_4) or of VGG16 (to relu3_3), whose features the reference loss compares.

    `state` has torchvision's names, `features.<n>.weight` and `.bias`; VGG19 is told by its `features.16`. Raises
    WeightsError where one is missing, or is no convolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        places = [0, 2, 5, 7, 10, 12, 14] + ([16] if "features.16.weight" in state else [])
        layers: list[nn.Module] = []
        for place in places:
            weight, bias = convolution(state, f"features.{place}")
            if place in (5, 10):
                layers.append(nn.MaxPool2d(2))
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            conv.load_state_dict({"weight": weight, "bias": bias})
            layers += [conv, nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers).requires_grad_(False)
        weights_channels_last(self)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Grey images (B, 1, H, W) in 0..1, normalised as three equal channels -> (B, 256, H/4, W/4)."""
        return self.layers(channels_last((image - self.mean) / self.std))  # type: ignore[no-any-return]


def reference_loss(features: nn.Module, sr: Tensor, references: Tensor) -> Tensor:
    """L_Mfid of eq. 8, multi-reference fidelity: SR (B, 1, H, W) against the references of its N sections, (B, N, 1, H,
    W) -> one number.

    It is the published code's, which differs from the paper. Eq. 8 is one mean of the contextual loss, weighted by
    confidence, over all positions of all N references together. The code takes the confidence-weighted mean of the
    contextual similarity for each reference alone, then minus its logarithm, and then the plain mean over references
    and samples: a reference of low confidence everywhere counts as much as any other.
    """
    n = references.shape[1]
    sr_features = features(sr).repeat_interleave(n, 0)  # (B * N, C, H/4, W/4)
    with torch.no_grad():
        reference_features = features(references.flatten(0, 1))  # (B * N, C, H/4, W/4)
    return contextual_loss(sr_features, reference_features)


def contextual_loss(sr: Tensor, reference: Tensor) -> Tensor:
    """Minus the logarithm of the contextual similarity (Mechrez et al., 2018) of features (B, C, h, w), as a mean over
    B.

    For every position j of the reference, the most similar position i of SR is found among all h * w. The similarities
    are averaged with the weights c_j, the matching confidences of eq. 8, which fall with the cosine distance of i and
    j. Takes a matrix of (h * w)^2 numbers per sample.
    """
    mean = reference.mean((0, 2, 3), keepdim=True)
    a = functional.normalize((sr - mean).flatten(2), dim=1)  # (B, C, i)
    b = functional.normalize((reference - mean).flatten(2), dim=1)  # (B, C, j)
    distance = (1 - a.transpose(1, 2) @ b).clamp_min(0)  # (B, i, j)
    relative = distance / (distance.amin(2, keepdim=True) + EPSILON)
    weight = ((1 - relative) / BANDWIDTH).exp()
    similarity, best = (weight / (weight.sum(2, keepdim=True) + EPSILON)).max(1)  # (B, j) each
    confidence = ((1 - distance.gather(1, best[:, None])[:, 0]) / BANDWIDTH).exp()  # (B, j)
    return -((similarity * confidence).sum(1) / confidence.sum(1) + EPSILON).log().mean()
