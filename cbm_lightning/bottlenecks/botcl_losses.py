"""What makes discovered concepts useful: losses over a batch of their codes, attention and features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus


def same_label(label: Tensor) -> Tensor:
    """``[B, B]`` bool, which samples are of one class; of several labels, which share one.

    Args:
        label: ``[B]`` class indices, ``[B]`` or ``[B, 1]`` binary labels, or ``[B, L]`` zeros and ones.
    """
    if label.is_floating_point():
        label = label >= 0.5
    if label.ndim == 2 and label.shape[1] > 1:
        held = label.float()
        return held @ held.T > 0
    row = label.reshape(-1)
    return row[:, None] == row[None]


def retrieval_loss(codes: Tensor, label: Tensor, scale: float = 10.0 / 32.0) -> Tensor:
    """Pairwise logistic loss that makes the codes of a class alike and those of two classes differ.

    The mean over pairs of one class plus the mean over pairs of two, so that neither kind outweighs the other. Pairs
    of a sample with itself do not count, and a kind without a pair adds nothing.

    Args:
        codes: ``[B, K]`` in [-1, 1].
        label: See `same_label`.
        scale: Factor on the product of two codes.
    """
    alike = same_label(label)
    others = ~torch.eye(len(codes), dtype=torch.bool, device=codes.device)
    products = scale * codes @ codes.T
    return masked_mean_of(softplus(-products), alike & others) + masked_mean_of(softplus(products), ~alike)


def quantization_loss(codes: Tensor) -> Tensor:
    """Mean square of how far codes in [-1, 1] are from either end."""
    return (codes.abs() - 1.0).square().mean()


def active(strength: Tensor) -> Tensor:
    """``[B, K]`` bool, the images that activate a concept more than the mean image of the batch.

    Args:
        strength: ``[B, K]``.
    """
    return strength > strength.mean(0)


def consistency_loss(features: Tensor, chosen: Tensor) -> Tensor:
    """One minus the mean cosine between the features of a concept in two images, mean over concepts; in [0, 2].

    Concepts with fewer than two chosen images do not count; zero where none is left.

    Args:
        features: ``[B, K, d]``.
        chosen: ``[B, K]`` bool, the images that count.
    """
    weight = chosen.to(features)
    number = weight.sum(0)
    pairs = number * (number - 1.0)
    # the square of a sum holds every ordered pair, and each unit vector with itself
    units = normalize(features, dim=-1) * weight.unsqueeze(-1)
    products = units.sum(0).square().sum(-1) - units.square().sum((0, 2))
    return masked_mean_of(1.0 - products / pairs.clamp(min=1.0), number >= 2)


def distinctiveness_loss(features: Tensor, chosen: Tensor) -> Tensor:
    """Mean cosine between the mean features of two different concepts, in [-1, 1]; zero for a single concept.

    Args:
        features: ``[B, K, d]``.
        chosen: ``[B, K]`` bool, the images over which a concept's mean is taken; without one it does not count.
    """
    weight = chosen.to(features).unsqueeze(-1)
    means = normalize((features * weight).sum(0) / weight.sum(0).clamp(min=1.0), dim=-1)
    seen = chosen.any(0)
    pairs = seen[:, None] & seen & ~torch.eye(len(means), dtype=torch.bool, device=means.device)
    return masked_mean_of(means @ means.T, pairs)


def masked_mean_of(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of what ``mask`` chooses, zero where it chooses nothing."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
