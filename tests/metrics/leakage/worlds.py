"""Small worlds in which it is known what leaks."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.metrics.leakage import Evidence


def rows(n: int = 600, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Concepts ``[n, 3]`` that are fair coins, and eight classes: two bits from concepts, the third from nothing."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (n, 4), generator=generator)
    return bits[:, :3].float(), bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 3], generator


def world(leak: float = 0.0, n: int = 600, width: int = 1, seed: int = 0) -> Evidence:
    """Predicted concepts: noisy logits; the first one leaks the third bit of the class, which no concept has."""
    concepts, label, generator = rows(n, seed)
    values = (2 * concepts - 1)[..., None].repeat(1, 1, width)
    values = values + 0.3 * torch.randn(values.shape, generator=generator)
    values[:, 0] += leak * (label >= 4).float()[:, None]
    return Evidence(values, concepts, label, "multiclass", 8)
