"""Leakage as mutual information: of concepts with the label (CTL), and of concepts with each other (ICL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.metrics.leakage.evidence import Evidence, LeakageMetric, Measurement
from cbm_lightning.metrics.leakage.mutual_information import NEIGHBOURS, entropy, mutual_information


def concept_task_leakage(evidence: Evidence, neighbours: int = NEIGHBOURS, seed: int = 0) -> Measurement:
    """How much more each predicted concept says of the label than the true one does, as a share of the label's entropy.

    ``CTL_k = max(0, I(c_hat_k; y) - I(c_k; y)) / H(y)``, and the mean over concepts (Parisini et al. 2025). Several
    labels count each by themselves, and then their mean. Estimates from nearest neighbours depend on the number of
    samples, and in many dimensions they are far too low: of embeddings it proves leakage, but never its absence.

    Args:
        evidence: What to measure on.
        neighbours: Of the estimators.
        seed: Of the noise that tells equal numbers apart.

    Returns:
        ``per_concept`` before it is cut off at zero, so that errors around it make sense; NaN for a concept with one
        value only, and everywhere for a label with one class only. ``details`` has ``difference``, the mean without
        the cut.
    """
    labels = evidence.outcomes.unbind(1)
    found = [_differences(evidence, label, neighbours, seed) for label in labels if len(label.unique()) > 1]
    if not found:
        none = torch.full((evidence.num_concepts,), torch.nan)
        return Measurement(torch.nan, torch.nan, none, none)
    rows = torch.stack(found).mean(0)  # [N, K]
    counts = (~rows.isnan()).sum(0)
    per_concept = rows.nanmean(0)
    error = (rows - per_concept).square().nansum(0).div((counts - 1).clamp(min=1) * counts.clamp(min=1)).sqrt()
    error = torch.where(counts > 1, error, torch.nan)
    together = rows.nanmean(1)
    together = together[~together.isnan()]
    spread = float(together.std()) / max(len(together), 1) ** 0.5
    return Measurement(
        float(per_concept.clamp(min=0.0).nanmean()),
        spread,
        per_concept,
        error,
        {"difference": float(per_concept.nanmean()), "samples": float(len(rows)), "neighbours": float(neighbours)},
    )


def _differences(evidence: Evidence, label: Tensor, neighbours: int, seed: int) -> Tensor:
    """``[N, K]`` what each sample contributes to the difference, NaN where it has none."""
    rows = torch.full_like(evidence.concepts, torch.nan)
    for k in range(evidence.num_concepts):
        known = ~evidence.concepts[:, k].isnan()
        truth, values, y = evidence.concepts[known, k], evidence.values[known, k], label[known]
        if len(truth.unique()) < 2 or len(y.unique()) < 2:
            continue
        gain = mutual_information(values, y, neighbours, seed) - mutual_information(truth, y, neighbours, seed)
        rows[known, k] = gain / entropy(y)
    return rows


def inter_concept_leakage(evidence: Evidence, neighbours: int = NEIGHBOURS, seed: int = 0) -> Measurement:
    """How much more predicted concepts say of each other than the true ones do.

    ``ICL_ij = max(0, I(c_hat_i; c_hat_j) / sqrt(I(c_hat_i; c_hat_i) I(c_hat_j; c_hat_j)) - the same of c)``, and means
    over ``j`` and ``i`` (Parisini et al. 2025). The information of a continuous variable about itself is infinite, and
    its estimate grows with the number of samples and falls with ``neighbours``: compare at equal numbers only. The
    cost grows with the square of the concepts, times that of the samples.

    Args:
        evidence: What to measure on; samples that are not annotated completely do not count.
        neighbours: Of the estimators.
        seed: Of the noise that tells equal numbers apart.

    Returns:
        Without an error. ``per_concept`` is NaN for a concept with one value only, which counts nowhere. ``details``
        has the numbers of samples and neighbours.
    """
    evidence = evidence.rows(evidence.complete)
    count = evidence.num_concepts
    varied = torch.tensor([len(column.unique()) > 1 for column in evidence.concepts.unbind(1)])
    pairs = torch.full((count, count), torch.nan, dtype=torch.float64)
    if len(evidence) > neighbours:
        predicted = normalised_information(evidence.values, varied, neighbours, seed)
        true = normalised_information(evidence.concepts.unsqueeze(-1), varied, neighbours, seed)
        pairs = (predicted - true).clamp(min=0.0).fill_diagonal_(torch.nan)
    per_concept = pairs.nanmean(1)
    details = {"samples": float(len(evidence)), "neighbours": float(neighbours)}
    return Measurement(float(per_concept.nanmean()), torch.nan, per_concept, None, details)


def normalised_information(values: Tensor, varied: Tensor, neighbours: int = NEIGHBOURS, seed: int = 0) -> Tensor:
    """``[K, K]`` information of concepts about each other over the geometric mean of that about themselves.

    Args:
        values: ``[N, K, m]``.
        varied: ``[K]`` bool, the concepts that count; the others are NaN.
        neighbours: Of the estimators.
        seed: Of the noise that tells equal numbers apart.
    """
    count = values.shape[1]
    found = torch.full((count, count), torch.nan, dtype=torch.float64)
    chosen = varied.nonzero().flatten().tolist()
    for i in chosen:
        for j in (j for j in chosen if j <= i):
            information = mutual_information(values[:, i], values[:, j], neighbours, seed).nanmean()
            found[i, j] = found[j, i] = information.clamp(min=0.0)
    own = found.diagonal().sqrt()
    return torch.where(own[:, None] * own > 0, found / (own[:, None] * own), torch.nan)


class ConceptTaskLeakage(LeakageMetric):
    """What predicted concepts say of the label beyond the true ones, each by itself: CTL (Parisini et al. 2025).

    See `concept_task_leakage`.

    Args:
        concepts: See `LeakageMetric`.
        num_classes: See `LeakageMetric`.
        task: See `LeakageMetric`.
        neighbours: Of the estimators of mutual information.
        max_samples: See `LeakageMetric`.
        seed: See `LeakageMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> import torch
        >>> label = torch.arange(200) % 4
        >>> truth = (label[:, None] > 1).float()  # says half of it
        >>> metric = ConceptTaskLeakage(1, num_classes=4)
        >>> round(metric(truth, truth, label).item(), 3), round(metric(label[:, None], truth, label).item(), 3)
        (0.0, 0.5)
    """

    def __init__(
        self,
        concepts: ConceptSet | int,
        num_classes: int,
        task: Task = "multiclass",
        neighbours: int = NEIGHBOURS,
        max_samples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(concepts, num_classes, task, max_samples, seed, **kwargs)
        if neighbours < 1:
            raise ValueError(f"neighbours: expected at least 1, got {neighbours}")
        self.neighbours = neighbours

    @torch.inference_mode(False)
    def measure(self) -> Measurement:
        """The measure with its uncertainty, and a concept."""
        return concept_task_leakage(self.evidence(), self.neighbours, self.seed)

    def compute(self) -> Tensor:
        """The mean over concepts, a share of the label's entropy in [0, 1]."""
        return torch.tensor(self.measure().value)


class InterConceptLeakage(ConceptTaskLeakage):
    """What predicted concepts say of each other beyond the true ones: ICL (Parisini et al. 2025).

    See `inter_concept_leakage`; arguments as in `ConceptTaskLeakage`.

    Example:
        >>> import torch
        >>> truth = torch.stack([torch.arange(200) % 2, torch.arange(200) // 2 % 2], 1).float()
        >>> mixed = torch.stack([truth[:, 0], truth[:, 0]], 1)
        >>> metric = InterConceptLeakage(2, num_classes=2)
        >>> label = torch.zeros(200, dtype=torch.int64)
        >>> round(metric(truth, truth, label).item(), 3), round(metric(mixed, truth, label).item(), 3)
        (0.0, 1.0)
    """

    @torch.inference_mode(False)
    def measure(self) -> Measurement:
        """The measure a concept."""
        return inter_concept_leakage(self.evidence(), self.neighbours, self.seed)


__all__ = [
    "ConceptTaskLeakage",
    "InterConceptLeakage",
    "concept_task_leakage",
    "inter_concept_leakage",
    "normalised_information",
]
