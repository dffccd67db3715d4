"""Corrections where concepts hang together: a Gaussian over the concept logits (SCBM, Vandenhirtz et al. 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from cbm_lightning.interventions.region import Region
from cbm_lightning.interventions.values import InterventionValues
from cbm_lightning.types import ConceptOutput, Intervention

# the official code's first jitter, doubled until the factorisation succeeds
JITTER = 1e-6
# rows that the solver holds in memory at once: it keeps a few [rows, n, n] matrices
ROWS = 1024


def condition(mean: Tensor, covariance: Tensor, mask: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The Gaussian of the free concepts, given the logits of the corrected ones (SCBM, arXiv 2406.19272).

    Each sample may have corrections of its own. Start from the original moments every time, with all corrections.

    Args:
        mean: ``[B, K]`` of the concept logits.
        covariance: ``[B, K, K]``, positive semi-definite; where the block of the corrected concepts is singular, its
            diagonal is raised a little.
        mask: ``[B, K]`` bool, the corrected concepts; none and all are fine.
        logits: ``[B, K]``, read only where ``mask`` is True.

    Returns:
        Mean ``[B, K]`` and covariance ``[B, K, K]`` in double precision. Corrected concepts have their logit as
        mean and no (co)variance.

    Raises:
        ValueError: The covariance of the corrected concepts is not finite, or far from positive semi-definite.
    """
    mean, covariance = mean.double(), symmetric(covariance.double())
    order, valid = corrected_first(mask)
    factor = stable_cholesky(block(covariance, order, valid))
    told = torch.where(mask, logits.double(), mean)
    # [B, n, K]: how the corrected concepts vary with the free ones
    shared = rows_of(covariance, order).masked_fill(~valid.unsqueeze(-1) | mask.unsqueeze(-2), 0.0)
    whitened = torch.linalg.solve_triangular(factor, shared, upper=False)
    surprise = torch.linalg.solve_triangular(factor, (told - mean).gather(-1, order).unsqueeze(-1), upper=False)
    free = ~mask.unsqueeze(-1) & ~mask.unsqueeze(-2)
    left = torch.where(free, symmetric(covariance - whitened.mT @ whitened), 0.0)
    # rounding can push what is almost explained below zero
    variance = left.diagonal(dim1=-2, dim2=-1)
    left = left - torch.diag_embed(variance.clamp(max=0.0))
    return torch.where(mask, told, mean + (whitened.mT @ surprise).squeeze(-1)), left


def confidence_region_logits(
    mean: Tensor, covariance: Tensor, mask: Tensor, concepts: Tensor, level: float = 0.99
) -> Tensor:
    """What a person says, on the logit scale, as firmly as the predicted distribution allows (SCBM, arXiv 2406.19272).

    Minimises ``sum_I BCE(sigmoid(eta), c)`` over the corrected concepts ``I``, within the confidence region
    ``(eta - mu_I)' Sigma_II^-1 (eta - mu_I) <= chi2(level, |I|)`` and on the side of ``mu`` on which ``c`` lies. The
    official code stops its general solver early; this one finds the optimum, for all samples at once.

    Args:
        mean: ``[B, K]`` of the concept logits.
        covariance: ``[B, K, K]``, positive semi-definite.
        mask: ``[B, K]`` bool, the corrected concepts.
        concepts: ``[B, K]`` in [0, 1], what the person says; read only where ``mask`` is True.
        level: How much of the probability the region holds, in (0, 1).

    Returns:
        ``[B, K]`` in double precision; the mean where nobody corrects.

    Raises:
        ValueError: ``level`` lies outside (0, 1), or the covariance of the corrected concepts is not finite or far from
            positive semi-definite.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a probability inside (0, 1), got {level}")
    # block by block, so that memory does not grow with the split
    blocks = [slice(first, first + ROWS) for first in range(0, max(len(mean), 1), ROWS)]
    with torch.no_grad():
        return torch.cat([_region_logits(mean[b], covariance[b], mask[b], concepts[b], level) for b in blocks])


def _region_logits(mean: Tensor, covariance: Tensor, mask: Tensor, concepts: Tensor, level: float) -> Tensor:
    mean = mean.double()
    order, valid = corrected_first(mask)
    if order.shape[-1] == 0:
        return mean
    corrected = block(symmetric(covariance.double()), order, valid)
    target = torch.where(mask, concepts.double(), 0.5).gather(-1, order)
    start = mean.gather(-1, order)
    # the logits of 0 and 1 are infinite, so there is a side even where the prediction is saturated
    side = torch.where(target.logit() >= start, 1.0, -1.0)
    step = side * corrected.diagonal(dim1=-2, dim2=-1).clamp(min=JITTER).sqrt()
    radius = chi2_quantile(level, valid.sum(-1)).sqrt()
    scaled = torch.diag_embed(step * valid / radius.unsqueeze(-1))
    whiten = torch.linalg.solve_triangular(stable_cholesky(corrected), scaled, upper=False)
    region = Region(start, step, whiten, target, valid)
    logits = torch.where(valid, start + step * region.solve(), start)
    return torch.scatter(mean, -1, order, logits)


class ConfidenceRegionValues(InterventionValues):
    """The firmest logits that the model's own distribution allows (SCBM, Vandenhirtz et al., NeurIPS 2024).

    Corrected concepts move together, towards 0 or 1 as far as the confidence region of all of them reaches, see
    `confidence_region_logits`; how the free ones follow is up to the bottleneck, see `condition`. For bottlenecks whose
    ``ConceptOutput.distribution`` is a `torch.distributions.MultivariateNormal` over the concept logits. Real-valued
    concepts are told as they are, and the region is that of the others given them.

    Args:
        level: How much of the probability the region holds.

    Raises:
        ValueError: ``level`` lies outside (0, 1).
    """

    name = "confidence_region"
    # what a concept is told depends on which others are corrected
    couples_groups = True

    def __init__(self, level: float = 0.99) -> None:
        if not 0.0 < level < 1.0:
            raise ValueError(f"level: expected a probability inside (0, 1), got {level}")
        self.level = level

    def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
        """Logits at the edge of the confidence region; the predicted ones where nobody corrects.

        Raises:
            TypeError: The bottleneck predicts no `torch.distributions.MultivariateNormal`.
            ValueError: It is one over something else than the concept logits.
        """
        distribution = output.distribution
        if not isinstance(distribution, MultivariateNormal):
            raise TypeError(
                f"values: {self.name!r} needs a bottleneck whose output.distribution is a MultivariateNormal over the "
                f"concept logits, got {type(distribution).__name__}; choose 'percentile' or 'own' for this one"
            )
        if distribution.loc.shape != told.shape:
            raise ValueError(
                f"values: {self.name!r} needs a distribution over concept logits {list(told.shape)}, got one over "
                f"{list(distribution.loc.shape)}; choose 'percentile' or 'own' for this bottleneck"
            )
        mean, covariance = distribution.loc.detach(), distribution.covariance_matrix.detach()
        # NaN takes a concept out, which says nothing of the others
        known = mask & ~told.isnan()
        real = self.concepts.is_real().to(mask.device) & known
        if real.any():
            mean, covariance = condition(mean, covariance, real, told)
        logits = confidence_region_logits(mean, covariance, known & ~real, told, self.level)
        return Intervention(mask, told, torch.where(known, logits.to(output.logits), output.logits))


def chi2_quantile(level: float, degrees: Tensor) -> Tensor:
    """Quantile of the chi-squared distribution.

    Args:
        level: Probability in (0, 1).
        degrees: Degrees of freedom, any shape; read as 1 where they are 0.

    Returns:
        The quantiles in double precision, shaped like ``degrees``.
    """
    half = degrees.double().clamp(min=1.0) / 2.0
    tail = -math.log1p(-level)
    # an upper bound of the quantile (Laurent and Massart 2000, lemma 1)
    low, high = torch.zeros_like(half), 2.0 * (half + (2.0 * half * tail).sqrt() + tail)
    for _ in range(100):
        middle = (low + high) / 2.0
        below = torch.special.gammainc(half, middle / 2.0) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def stable_cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factors of ``[B, n, n]``; where there is none, the diagonal is raised until there is.

    Raises:
        ValueError: A matrix is not finite, or far from positive semi-definite.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    finite = matrix.isfinite().flatten(1).all(1)
    jitter, raised, eye = matrix.new_zeros(len(matrix)), JITTER, torch.eye(matrix.shape[-1]).to(matrix)
    # more than the largest variance would replace the matrix, not mend it
    limit = matrix.diagonal(dim1=-2, dim2=-1).amax().clamp(min=1.0) if matrix.numel() else 1.0
    while finite.all() and failed.any() and raised <= limit:
        jitter = torch.where(failed > 0, raised, jitter)
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter[:, None, None] * eye)
        raised = 2.0 * raised
    if rows := ((failed > 0) | ~finite).nonzero().flatten().tolist():
        raise ValueError(
            f"covariance: expected finite, positive semi-definite matrices, those of samples {rows[:5]} are not"
        )
    return factor


def symmetric(matrix: Tensor) -> Tensor:
    """The symmetric part of ``[..., n, n]``."""
    return (matrix + matrix.transpose(-1, -2)) / 2.0


def corrected_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the corrected concepts of each sample, padded to the longest list.

    Args:
        mask: ``[B, K]`` bool.

    Returns:
        Positions ``[B, n]`` in ascending order, followed by padding (positions that occur nowhere else in the row), and
        ``[B, n]`` bool, False for padding.
    """
    longest = int(mask.sum(-1).max()) if len(mask) else 0
    order = mask.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
    return order, mask.gather(-1, order)


def rows_of(matrix: Tensor, order: Tensor) -> Tensor:
    """``[B, n, K]`` some rows of ``[B, K, K]``, chosen by ``order [B, n]``."""
    return matrix.gather(-2, order.unsqueeze(-1).expand(-1, -1, matrix.shape[-1]))


def block(matrix: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """``[B, n, n]`` some rows and columns of ``[B, K, K]``; those of the identity where not ``valid [B, n]``."""
    rows = rows_of(matrix, order)
    chosen = rows.gather(-1, order.unsqueeze(-2).expand(-1, order.shape[-1], -1))
    both = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    return torch.where(both, chosen, torch.eye(order.shape[-1]).to(chosen))
