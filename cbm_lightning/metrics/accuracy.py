"""Concept accuracy, entry by entry and sample by sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.base import ConceptMetric


class ConceptAccuracy(ConceptMetric):
    """Share of annotated concepts that are predicted right at the threshold of one half.

    Args:
        concepts: The concept set, or the number of binary concepts.
        average: ``"micro"`` over all annotated entries, or ``None`` for ``[K]`` accuracies (NaN without annotation).
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> metric = ConceptAccuracy(2)
        >>> metric(torch.tensor([[0.9, 0.2], [0.4, 0.7]]), torch.tensor([[1.0, 0.0], [1.0, float("nan")]]))
        tensor(0.6667)
    """

    correct: Tensor
    total: Tensor

    def __init__(self, concepts: ConceptSet | int, average: str | None = "micro", **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        if average not in ("micro", None):
            raise ValueError(f"average: expected 'micro' or None, got {average!r}")
        self.average = average
        self.add_state("correct", torch.zeros(self.num_concepts), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(self.num_concepts), dist_reduce_fx="sum")

    def update(self, probs: Tensor, concepts: Tensor) -> None:
        """Count ``[B, K]`` probabilities against annotations (NaN where unknown; positive from one half)."""
        known = self.known(probs, concepts)
        self.correct += (((probs >= 0.5) == (concepts >= 0.5)) & known).sum(0)
        self.total += known.sum(0)

    def compute(self) -> Tensor:
        """The accuracy, NaN where nothing was annotated."""
        return self.correct.sum() / self.total.sum() if self.average else self.correct / self.total


class ConceptJointAccuracy(ConceptMetric):
    """Share of samples of which every annotated concept is predicted right (Havasi et al. 2022).

    Example:
        >>> metric = ConceptJointAccuracy(2)
        >>> metric(torch.tensor([[0.9, 0.2], [0.4, 0.7]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        tensor(0.5000)
    """

    correct: Tensor
    total: Tensor

    def __init__(self, concepts: ConceptSet | int, **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        self.add_state("correct", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, probs: Tensor, concepts: Tensor) -> None:
        """Count ``[B, K]`` probabilities against annotations; samples without any annotation do not count."""
        known = self.known(probs, concepts)
        right = ((probs >= 0.5) == (concepts >= 0.5)) | ~known
        annotated = known.any(1)
        self.correct += (right.all(1) & annotated).sum()
        self.total += annotated.sum()

    def compute(self) -> Tensor:
        """The accuracy, NaN where nothing was annotated."""
        return self.correct / self.total
