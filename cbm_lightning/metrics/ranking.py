"""Ranking quality of concept probabilities, over the concepts for which it is defined."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from cbm_lightning.metrics.base import StoredConceptMetric


class _ConceptRanking(StoredConceptMetric):
    """Macro mean of a binary ranking score over the concepts with both classes among the annotations."""

    def per_concept(self) -> Tensor:
        """``[K]`` scores, NaN for concepts with one class only."""
        probs, targets = self.stored()
        scores = probs.new_full((self.num_concepts,), torch.nan)
        defined = (targets == 1).any(0) & (targets == 0).any(0)
        for k in defined.nonzero().flatten().tolist():
            counted = targets[:, k] >= 0
            scores[k] = self.score(probs[counted, k], targets[counted, k].long())
        return scores

    @abstractmethod
    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """The score of one concept."""

    def compute(self) -> Tensor:
        """The mean over defined concepts, NaN where none is defined."""
        return self.per_concept().nanmean()


class ConceptAUROC(_ConceptRanking):
    """Area under the ROC curve, averaged over the concepts with positives and negatives.

    Example:
        >>> metric = ConceptAUROC(2)
        >>> metric(torch.tensor([[0.9, 0.2], [0.4, 0.7], [0.6, 0.1]]), torch.tensor([[1.0, 0], [0, 0], [0, 0]]))
        tensor(1.)
    """

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Exact area under the ROC curve."""
        return binary_auroc(probs, targets)


class ConceptAveragePrecision(_ConceptRanking):
    """Average precision, averaged over the concepts with positives and negatives.

    Example:
        >>> metric = ConceptAveragePrecision(1)
        >>> metric(torch.tensor([[0.9], [0.8], [0.1]]), torch.tensor([[0.0], [1.0], [0.0]]))
        tensor(0.5000)
    """

    def score(self, probs: Tensor, targets: Tensor) -> Tensor:
        """Exact average precision."""
        return binary_average_precision(probs, targets)
