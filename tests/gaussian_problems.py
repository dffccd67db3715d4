"""Gaussians over concept logits with corrections of all sizes: drawn ones, and those of the official SCBM code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor
from torch.nn.functional import softplus

# how many concepts the official interventions correct
COUNTS = [1, 2, 3, 5]


def official_numbers(shared: Path) -> dict[str, Tensor]:
    """The arrays of the fixture, in their own precision."""
    with np.load(shared / "golden" / "dev" / "scbm_interventions.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def official(golden: dict[str, Tensor], strategy: str, count: int) -> tuple[Tensor, Tensor]:
    """Mask and logits of the official interventions."""
    logits = golden[f"intervened_logits__{strategy}__{count}"]
    return ~logits.isnan(), logits


def loss_of(logits: Tensor, concepts: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` summed concept loss of the corrected concepts."""
    logits, concepts = logits.masked_fill(~mask, 0.0), concepts.masked_fill(~mask, 0.0)
    each = (1 - concepts) * softplus(logits) + concepts * softplus(-logits)
    return each.masked_fill(~mask, 0.0).sum(-1)


def excess(logits: Tensor, mean: Tensor, covariance: Tensor, mask: Tensor, level: float = 0.99) -> list[float]:
    """How far each sample lies from the prediction, 1 at the edge of the region."""
    found = []
    for b, row in enumerate(mask):
        index = row.nonzero().flatten().numpy()
        if len(index):
            off = (logits[b] - mean[b]).numpy()[index]
            inner = covariance[b].numpy()[np.ix_(index, index)]
            found.append(off @ np.linalg.solve(inner, off) / chi2.ppf(level, len(index)))
    return found


def problem(
    n: int, k: int, seed: int = 0, spread: float = 1.0, offset: float = 1.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, covariance, mask and concepts of random problems with masks of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(n, k, k, generator=generator, dtype=torch.float64)
    covariance = spread**2 * (factor @ factor.mT / k + 0.05 * torch.eye(k))
    mean = offset * torch.randn(n, k, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, k, generator=generator) < torch.linspace(0, 1, n)[:, None]
    return mean, covariance, mask, (torch.rand(n, k, generator=generator) < 0.5).double()
