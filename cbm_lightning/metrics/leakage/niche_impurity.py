"""Whether a concept can be told from predicted concepts that have nothing to do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.metrics.leakage.evidence import Evidence, LeakageMetric, Measurement, Splits, cross_splits
from cbm_lightning.metrics.leakage.probes import Probes, auroc, concept_loss, fit_probes, standardised

HIDDEN, STEPS = 20, 100
BETAS = tuple(round(0.05 * i, 2) for i in range(20))
"""Thresholds of the correlation, from 0 to 0.95."""


def niche_correlation(values: Tensor, concepts: Tensor) -> Tensor:
    """``[K, K]`` largest absolute correlation of the numbers of predicted concept ``i`` with true concept ``j``.

    Args:
        values: ``[N, K, m]``.
        concepts: ``[N, K]``, NaN where unknown, which do not count.

    Returns:
        Zero where one of them is constant: such a concept is in no niche.
    """
    known = (~concepts.isnan()).double()
    count = known.sum(0)
    flat, truth = values.double().flatten(1), concepts.double().nan_to_num(0.0)

    def covariance(a: Tensor, b: Tensor, both: Tensor) -> Tensor:
        return both - a * b

    mean_x, mean_xx = flat.T @ known / count, flat.square().T @ known / count
    mean_c, mean_cc = truth.sum(0) / count, truth.square().sum(0) / count
    cross = covariance(mean_x, mean_c, flat.T @ truth / count)
    own_x, own_c = covariance(mean_x, mean_x, mean_xx), covariance(mean_c, mean_c, mean_cc)
    scale = (own_x.clamp(min=0) * own_c.clamp(min=0)).sqrt()
    defined = (own_x > 1e-12 * (1 + mean_xx)) & (own_c > 1e-12)
    found = torch.where(defined, cross / torch.where(defined, scale, 1.0), 0.0).abs()
    of_concepts: Tensor = found.unflatten(0, (values.shape[1], -1)).amax(1)
    return of_concepts


def niche_curve(
    predict: Callable[[Tensor], Tensor],
    values: Tensor,
    concepts: Tensor,
    correlation: Tensor,
    betas: tuple[float, ...] = BETAS,
) -> Tensor:
    """``[len(betas), K]`` AUROC of each concept where all numbers of its niche are zero.

    Args:
        predict: Scores ``[n, K]`` of all concepts from ``[n, K, m]``.
        values: ``[n, K, m]``, zero where they are neutral.
        concepts: ``[n, K]``, NaN where unknown.
        correlation: ``[K, K]`` from `niche_correlation`; concept ``i`` is in the niche of ``j`` where it is above
            beta.
        betas: Thresholds.
    """
    rows = []
    for beta in betas:
        outside = correlation <= beta  # [i, j]
        scores = [predict(values * outside[:, j, None])[:, j] for j in range(concepts.shape[1])]
        rows.append(auroc(torch.stack(scores), concepts.T))
    return torch.stack(rows)


def niche_impurity(curve: Tensor, betas: tuple[float, ...] = BETAS) -> Tensor:
    """The area under the mean curve over beta, which is at most .95 and about .475 by chance (NIS).

    Args:
        curve: ``[len(betas), K]``, NaN for concepts that are not defined.
        betas: Thresholds.
    """
    return torch.trapezoid(curve.nanmean(1), torch.tensor(betas, dtype=curve.dtype))


def niche_impurity_score(
    evidence: Evidence, splits: Splits, seed: int = 0, standardise: bool = True, against_truth: bool = True
) -> Measurement:
    """How well concepts are told from what lies outside their niche: NIS (Espinosa Zarlenga et al. 2023).

    A network is fitted to predict all true concepts from all predicted ones. Then it must do without those that
    correlate with a concept, whose numbers are put to zero. True concepts that hang together make the score rise
    without any leakage, so that it is measured for them too.

    Args:
        evidence: What to measure on; real-valued concepts are not predicted.
        splits: Its rows.
        seed: Of the weights.
        standardise: Make every number zero on average and of deviation 1 first, so that zero says nothing; the
            published code does not.
        against_truth: Measure it for the true concepts too.

    Returns:
        Mean over the folds of all repeats, and their deviation; ``per_concept`` is the area of each concept.
        ``details`` has ``truth`` (the score of the true concepts), the ``excess`` over it, ``excess_error`` and the
        number of ``repeats``, if wanted.
    """
    curves = _curves(evidence, splits, seed, standardise)
    scores = torch.stack([niche_impurity(curve) for curve in curves])
    beta = torch.tensor(BETAS, dtype=curves.dtype)
    areas = torch.trapezoid(curves, beta, dim=1)  # [R * F, K]
    details = {}
    if against_truth:
        truth = Evidence(
            evidence.concepts.nan_to_num(0.5).unsqueeze(-1),
            evidence.concepts,
            evidence.label,
            evidence.task,
            evidence.num_classes,
            None,
            evidence.real,
        )
        of_truth = torch.stack([niche_impurity(curve) for curve in _curves(truth, splits, seed, standardise)])
        excess = scores - of_truth
        details = {
            "truth": float(of_truth.mean()),
            "excess": float(excess.mean()),
            "excess_error": float(excess.std()),
            "repeats": float(len(excess)),
        }
    return Measurement(float(scores.mean()), float(scores.std()), areas.mean(0), areas.std(0), details)


def _curves(evidence: Evidence, splits: Splits, seed: int, standardise: bool) -> Tensor:
    """``[R * F, len(BETAS), K]``, a network a fold."""
    count, width = evidence.values.shape[1:]
    curves = []
    for i, (fit, hold, judge) in enumerate(zip(*splits.flat(), strict=True)):
        flat = evidence.values.flatten(1)
        x = standardised(flat, fit.unsqueeze(0)) if standardise else flat.float().unsqueeze(0)
        probes = Probes(1, count * width, count, HIDDEN, torch.Generator().manual_seed(seed + i))
        targets = evidence.targets

        def loss(outputs: Tensor, targets: Tensor = targets) -> Tensor:
            return concept_loss(outputs, targets)

        fit_probes(probes, x, loss, fit.unsqueeze(0), hold.unsqueeze(0), STEPS)

        def predict(values: Tensor, probes: Probes = probes) -> Tensor:
            with torch.no_grad():
                scores: Tensor = probes(values.flatten(1).unsqueeze(0))[0]
            return scores

        correlation = niche_correlation(evidence.values[fit], targets[fit])
        judged = x[0, judge].unflatten(1, (count, width))
        curves.append(niche_curve(predict, judged, targets[judge], correlation))
    return torch.stack(curves)


class NicheImpurity(LeakageMetric):
    """Niche impurity score: are concepts told from predicted concepts that do not correlate with them (NIS)?

    See `niche_impurity_score`. A concept's niche is made of whole concepts also where each has several numbers, which
    the published code confuses.

    Args:
        concepts: See `LeakageMetric`.
        num_classes: See `LeakageMetric`.
        task: See `LeakageMetric`.
        folds: Of the samples; each is judged by a network that was fitted on the others.
        standardise: See `niche_impurity_score`.
        max_samples: See `LeakageMetric`.
        seed: See `LeakageMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: There are fewer than 2 folds, or ``max_samples`` is too low.

    Example:
        >>> import torch
        >>> bits = torch.stack([torch.arange(400) // 2**k % 2 for k in range(2)], 1).float()
        >>> label = torch.zeros(400, dtype=torch.int64)
        >>> metric = NicheImpurity(2, num_classes=2)
        >>> round(metric(bits, bits, label).item(), 1)  # about chance, 0.475
        0.5
    """

    def __init__(
        self,
        concepts: ConceptSet | int,
        num_classes: int,
        task: Task = "multiclass",
        folds: int = 5,
        standardise: bool = True,
        max_samples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(concepts, num_classes, task, max_samples, seed, **kwargs)
        if folds < 2:
            raise ValueError(f"folds: expected at least 2, got {folds}")
        self.folds, self.standardise = folds, standardise

    @torch.inference_mode(False)
    def measure(self) -> Measurement:
        """The score with its deviation over folds, and a concept."""
        evidence = self.evidence()
        splits = cross_splits(len(evidence), self.folds, 1, self.seed)
        return niche_impurity_score(evidence, splits, self.seed, self.standardise)

    def compute(self) -> Tensor:
        """The mean over folds, in [0, .95]."""
        return torch.tensor(self.measure().value)
