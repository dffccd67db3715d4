"""The supervised losses: annotated concepts, and labels of three kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.configurable import Part
from cbm_lightning.labels import Task

Weights = Sequence[float] | Literal["balanced"] | None


class ConceptLoss(Part):
    """Cross-entropy of binary and categorical concepts and squared error of real ones, where annotated.

    Entries of ``concepts`` that are NaN count for nothing. Soft annotations in [0, 1] are allowed.

    Args:
        reduction: ``"mean"`` over all annotated entries (CEM), or ``"sum"`` over the concepts of each concept's mean
            (Koh et al. 2020). A loss weight of 0.01 with the sum equals 0.01 K with the mean.
        weight: A factor a concept on its whole term. ``"balanced"`` takes negatives / positives of the training
            annotations (Koh et al. 2020): rare concepts get a larger loss, but positives are not favoured.
        pos_weight: A factor a concept on the term of positives only. ``"balanced"`` takes negatives / positives.
            A concept that never varies in training gets 1.

    Raises:
        ValueError: The reduction is unknown, or (from `build`) a list does not have one non-negative number a concept.

    Example:
        >>> loss = ConceptLoss(reduction="mean")
        >>> loss.build(ConceptSet(["red", "round"]))
        >>> loss(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]]))
        tensor(0.6931)
    """

    weight: Tensor
    pos_weight: Tensor

    def __init__(
        self, reduction: Literal["mean", "sum"] = "mean", weight: Weights = None, pos_weight: Weights = None
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction
        self.given = {"weight": weight, "pos_weight": pos_weight}

    @property
    def needs_annotations(self) -> bool:
        """Whether `fit` must see the training annotations first."""
        return "balanced" in [given for given in self.given.values() if isinstance(given, str)]

    def build(self, concepts: ConceptSet) -> None:
        """Make the buffers; called once by the module."""
        self.activation = ConceptActivation(concepts)
        for name, given in self.given.items():
            if isinstance(given, str) and given != "balanced":
                raise ValueError(f"{name}: expected numbers, 'balanced' or nothing, got {given!r}")
            numbers = (
                torch.ones(len(concepts)) if given is None or isinstance(given, str) else torch.tensor(list(given))
            )
            if numbers.shape != (len(concepts),) or not (numbers.isfinite() & (numbers >= 0)).all():
                raise ValueError(f"{name}: expected {len(concepts)} numbers of at least 0, one a concept, got {given}")
            self.register_buffer(name, numbers.float())

    def fit(self, concepts: Tensor) -> None:
        """Set the balanced weights from ``[N, K]`` training annotations."""
        known = ~concepts.isnan()
        positive = concepts.nan_to_num(nan=0.0).clamp(0.0, 1.0).sum(0)
        negative = known.sum(0) - positive
        ratio = torch.where((positive > 0) & (negative > 0), negative / positive.clamp(min=1e-12), 1.0)
        ratio = torch.where(self.activation.real.to(ratio.device), 1.0, ratio).to(self.weight)
        for name, given in self.given.items():
            if isinstance(given, str):
                getattr(self, name).copy_(ratio)

    def forward(self, logits: Tensor, concepts: Tensor) -> Tensor:
        """Scalar loss of ``[B, K]`` scores against ``[B, K]`` annotations in [0, 1] (any number for real concepts)."""
        known = ~concepts.isnan()
        target = torch.where(known, concepts, 0.0).to(logits.dtype)
        losses = binary_cross_entropy_with_logits(
            logits, target, self.weight, pos_weight=self.pos_weight, reduction="none"
        )
        if self.activation.has_groups:
            member = -target * self.activation.log_softmax(logits) * self.weight * self.pos_weight
            losses = torch.where(self.activation.categorical, member, losses)
        if self.activation.has_real:
            losses = torch.where(self.activation.real, (logits - target).square() * self.weight, losses)
        losses = losses * known
        if self.reduction == "sum":
            return (losses.sum(0) / known.sum(0).clamp(min=1)).sum()
        return losses.sum() / known.sum().clamp(min=1)


def label_loss(logits: Tensor, label: Tensor, task: Task, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the label.

    Args:
        logits: ``[B, L]``, or ``[B, 1]`` for a binary label.
        label: ``[B]`` class indices, ``[B]`` in {0, 1} for a binary label, ``[B, L]`` in {0, 1} for several labels.
        task: Which of the three it is.
        smoothing: Label smoothing in [0, 1).
    """
    if task == "multiclass":
        return cross_entropy(logits, label.long(), label_smoothing=smoothing)
    target = label.to(logits.dtype).view(logits.shape)
    return binary_cross_entropy_with_logits(logits, target * (1.0 - smoothing) + 0.5 * smoothing)
