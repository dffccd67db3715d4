"""Do concepts predicted with 70 % come true in 70 %?"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.base import StoredConceptMetric


class ConceptCalibrationError(StoredConceptMetric):
    """Expected calibration error of concept probabilities, all annotated entries in one pool.

    Args:
        concepts: The concept set, or the number of binary concepts.
        n_bins: Number of equal bins of the probability.
        norm: How the gaps of the bins are averaged: ``"l1"`` (ECE), ``"l2"`` (the root of their mean square), or
            ``"max"``, the largest.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The norm is unknown.

    Example:
        >>> import torch
        >>> metric = ConceptCalibrationError(1)
        >>> metric(torch.tensor([[0.75], [0.75]]), torch.tensor([[1.0], [0.0]]))
        tensor(0.2500)
    """

    higher_is_better = False

    def __init__(
        self, concepts: ConceptSet | int, n_bins: int = 10, norm: Literal["l1", "l2", "max"] = "l1", **kwargs: Any
    ) -> None:
        super().__init__(concepts, **kwargs)
        if norm not in ("l1", "l2", "max"):
            raise ValueError(f"norm: expected 'l1', 'l2' or 'max', got {norm!r}")
        self.n_bins = n_bins
        self.norm = norm

    def compute(self) -> Tensor:
        """The error in [0, 1], NaN where nothing was annotated."""
        probs, targets = self.stored()
        counted = targets >= 0
        if not counted.any():
            return probs.new_tensor(float("nan"))
        return binary_calibration_error(probs[counted], targets[counted].long(), n_bins=self.n_bins, norm=self.norm)
