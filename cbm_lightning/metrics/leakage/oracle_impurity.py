"""What predicted concepts say of other concepts, beside what the true ones say of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.metrics.leakage.evidence import Evidence, LeakageMetric, Measurement, Splits, cross_splits
from cbm_lightning.metrics.leakage.probes import Probes, auroc, concept_loss, fit_probes, standardised

HIDDEN, STEPS = 32, 60


def oracle_impurity(purity: Tensor, oracle: Tensor, include_diagonal: bool = True) -> Tensor:
    """The oracle impurity score of two matrices (Espinosa Zarlenga et al. 2023).

    Args:
        purity: ``[..., K, K]`` how well (AUROC) each predicted concept (row) predicts each true one (column).
        oracle: ``[..., K, K]`` how well each true concept does.
        include_diagonal: Count how well concepts are predicted themselves.

    Returns:
        ``[...]`` in [0, 1]: ``2 / K`` times the Frobenius norm of the difference. Concepts whose areas are not defined
        (NaN) are left out of the norm and of ``K``.
    """
    count = purity.shape[-1]
    difference = oracle - purity
    if not include_diagonal:
        difference = difference.masked_fill(torch.eye(count, dtype=torch.bool), 0.0)
    counted = (~difference.isnan()).any(-2).sum(-1)
    return 2 * difference.nan_to_num(0.0).square().sum((-2, -1)).sqrt() / counted


def predictability(evidence: Evidence, splits: Splits, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``[R * F, K, K]`` AUROC of each true concept from each predicted one, and from each true one.

    A probe with a hidden layer reads one concept and predicts all; both matrices of a fold are from the same rows.
    Real-valued concepts and those with one class among the rows that are judged are NaN.
    """
    count, width = evidence.num_concepts, evidence.values.shape[-1]
    targets = evidence.targets
    truth = evidence.concepts.unsqueeze(-1).nan_to_num(0.5).expand(-1, -1, width)
    matrices = []
    for i, (fit, hold, judge) in enumerate(zip(*splits.flat(), strict=True)):
        sources = torch.cat([evidence.values, truth], 1)
        x = standardised(sources.flatten(1), fit.unsqueeze(0))[0].unflatten(1, (2 * count, width)).transpose(0, 1)
        probes = Probes(2 * count, width, count, HIDDEN, torch.Generator().manual_seed(seed + i))
        # both begin alike, so that equal concepts give equal areas
        with torch.no_grad():
            for parameter in probes.parameters():
                parameter[count:] = parameter[:count]
        groups = (len(x), -1)
        outputs = fit_probes(
            probes, x, lambda out: concept_loss(out, targets), fit.expand(groups), hold.expand(groups), STEPS
        )
        areas = auroc(outputs[:, judge].transpose(1, 2), targets[judge].T)
        matrices.append(areas.unflatten(0, (2, count)))
    purity, oracle = torch.stack(matrices).unbind(1)
    return purity, oracle


def oracle_impurity_score(
    evidence: Evidence, splits: Splits, seed: int = 0, include_diagonal: bool = True
) -> Measurement:
    """Difference between what predicted and true concepts say of all concepts: OIS (Espinosa Zarlenga et al. 2023).

    Both matrices come from the same rows, in each fold anew. The score has no sign: concepts that are predicted
    badly raise it as well as concepts that know of others.

    Args:
        evidence: What to measure on.
        splits: Its rows.
        seed: Of the weights.
        include_diagonal: Count how well concepts are predicted themselves.

    Returns:
        Mean over the folds of all repeats, and their deviation. ``per_concept`` has a sign: how much better (AUROC)
        the predicted concept tells the other concepts than the true one does, on average, with its deviation;
        ``details`` has the mean ``excess`` of all, ``excess_error`` and the number of ``repeats``.
    """
    purity, oracle = predictability(evidence, splits, seed)
    scores = oracle_impurity(purity, oracle, include_diagonal)
    own = torch.eye(evidence.num_concepts, dtype=torch.bool)
    excess = (purity - oracle).masked_fill(own, torch.nan).nanmean(-1)  # [R * F, K]
    total = excess.nanmean(1)
    details = {"excess": float(total.mean()), "excess_error": float(total.std()), "repeats": float(len(total))}
    return Measurement(float(scores.mean()), float(scores.std()), excess.mean(0), excess.std(0), details)


class OracleImpurity(LeakageMetric):
    """Oracle impurity score: do predicted concepts know of each other what the true ones do (OIS)?

    See `oracle_impurity_score`. The published score came from a single split and spread by half its size.

    Args:
        concepts: See `LeakageMetric`.
        num_classes: See `LeakageMetric`.
        task: See `LeakageMetric`.
        folds: Of the samples; each is judged by probes that were fitted on the others. At least 3.
        include_diagonal: Count how well concepts are predicted themselves.
        max_samples: See `LeakageMetric`.
        seed: See `LeakageMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: There are fewer than 3 folds, or ``max_samples`` is too low.

    Example:
        >>> import torch
        >>> truth = torch.stack([torch.arange(200) % 2, torch.arange(200) // 2 % 2], 1).float()
        >>> metric = OracleImpurity(2, num_classes=2)
        >>> label = torch.zeros(200, dtype=torch.int64)
        >>> round(metric(truth, truth, label).item(), 1), round(metric(truth.flip(1), truth, label).item(), 1)
        (0.0, 1.0)
    """

    def __init__(
        self,
        concepts: ConceptSet | int,
        num_classes: int,
        task: Task = "multiclass",
        folds: int = 5,
        include_diagonal: bool = True,
        max_samples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(concepts, num_classes, task, max_samples, seed, **kwargs)
        if folds < 3:
            raise ValueError(f"folds: expected at least 3, for the score varies much, got {folds}")
        self.folds, self.include_diagonal = folds, include_diagonal

    @torch.inference_mode(False)
    def measure(self) -> Measurement:
        """The score with its deviation over folds, and a concept."""
        evidence = self.evidence()
        splits = cross_splits(len(evidence), self.folds, 1, self.seed)
        return oracle_impurity_score(evidence, splits, self.seed, self.include_diagonal)

    def compute(self) -> Tensor:
        """The mean over folds, in [0, 1]."""
        return torch.tensor(self.measure().value)
