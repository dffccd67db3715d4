"""The error of real-valued concepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.base import ConceptMetric


class RealConceptError(ConceptMetric):
    """Mean absolute error of the annotated real-valued concepts, in the units of the annotations.

    Example:
        >>> metric = RealConceptError(ConceptSet(["size"], kinds="real"))
        >>> metric(torch.tensor([[2.0], [5.0]]), torch.tensor([[3.0], [float("nan")]]))
        tensor(1.)
    """

    higher_is_better = False
    error: Tensor
    total: Tensor

    def __init__(self, concepts: ConceptSet | int, **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        self.add_state("error", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def known(self, probs: Tensor, concepts: Tensor) -> Tensor:
        """``[B, K]`` bool, the annotated entries of real-valued concepts."""
        super().known(probs, concepts)
        return ~self.discrete & ~concepts.isnan()

    def update(self, probs: Tensor, concepts: Tensor) -> None:
        """Count ``[B, K]`` predicted values against annotations."""
        known = self.known(probs, concepts)
        self.error += torch.where(known, (probs - concepts).abs(), 0.0).sum()
        self.total += known.sum()

    def compute(self) -> Tensor:
        """The error, NaN where nothing was annotated."""
        return self.error / self.total
