"""How far concept probabilities are from what holds, in squares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.base import ConceptMetric


class ConceptBrierScore(ConceptMetric):
    """Mean squared difference of concept probabilities and annotations (Brier 1950), over all annotated entries.

    Args:
        concepts: The concept set, or the number of binary concepts.
        average: ``"micro"`` over all annotated entries, or ``None`` for ``[K]`` scores (NaN without annotation).
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``average`` is something else.

    Example:
        >>> metric = ConceptBrierScore(2)
        >>> metric(torch.tensor([[0.9, 0.2], [0.5, 0.7]]), torch.tensor([[1.0, 0.0], [1.0, float("nan")]]))
        tensor(0.1000)
    """

    higher_is_better = False
    squares: Tensor
    total: Tensor

    def __init__(self, concepts: ConceptSet | int, average: str | None = "micro", **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        if average not in ("micro", None):
            raise ValueError(f"average: expected 'micro' or None, got {average!r}")
        self.average = average
        self.add_state("squares", torch.zeros(self.num_concepts), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(self.num_concepts), dist_reduce_fx="sum")

    def update(self, probs: Tensor, concepts: Tensor) -> None:
        """Add ``[B, K]`` probabilities against annotations in [0, 1] (NaN where unknown)."""
        known = self.known(probs, concepts)
        self.squares += torch.where(known, probs.detach().float() - concepts, 0.0).square().sum(0)
        self.total += known.sum(0)

    def compute(self) -> Tensor:
        """The score in [0, 1], NaN where nothing was annotated."""
        return self.squares.sum() / self.total.sum() if self.average else self.squares / self.total
