"""What the concept metrics share: which entries count."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.concepts import ConceptSet


class ConceptMetric(Metric):
    """Base of metrics over annotated binary and categorical concepts; real-valued and NaN entries do not count.

    Args:
        concepts: The concept set, or the number of concepts if all are binary.
        kwargs: Options of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    discrete: Tensor

    def __init__(self, concepts: ConceptSet | int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        concept_set = ConceptSet.make(concepts)
        self.num_concepts = len(concept_set)
        self.register_buffer("discrete", ~concept_set.is_real(), persistent=False)

    def known(self, probs: Tensor, concepts: Tensor) -> Tensor:
        """``[B, K]`` bool, the entries that count.

        Raises:
            ValueError: The shapes differ or are not ``[B, K]``.
        """
        if probs.shape != concepts.shape or probs.ndim != 2 or probs.shape[1] != self.num_concepts:
            raise ValueError(
                f"expected probs and concepts [B, {self.num_concepts}], got {list(probs.shape)} and "
                f"{list(concepts.shape)}"
            )
        return self.discrete & ~concepts.isnan()


class StoredConceptMetric(ConceptMetric):
    """Base of metrics that need all predictions at once; keeps ``2 N K`` numbers."""

    probs: list[Tensor]
    concepts: list[Tensor]

    def __init__(self, concepts: ConceptSet | int, **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        self.add_state("probs", [], dist_reduce_fx="cat")
        self.add_state("concepts", [], dist_reduce_fx="cat")

    def update(self, probs: Tensor, concepts: Tensor) -> None:
        """Store ``[B, K]`` probabilities and annotations (NaN where unknown; positive from one half)."""
        known = self.known(probs, concepts)
        # -1 marks what does not count: NaN would not survive the integer targets of torchmetrics
        self.probs.append(probs.detach().float())
        self.concepts.append(torch.where(known, concepts >= 0.5, -1).to(torch.int8))

    def stored(self) -> tuple[Tensor, Tensor]:
        """All probabilities ``[N, K]`` and targets ``[N, K]`` in {-1, 0, 1}."""
        # after a sync the states are tensors already
        probs = self.probs if isinstance(self.probs, Tensor) else torch.cat(self.probs)
        concepts = self.concepts if isinstance(self.concepts, Tensor) else torch.cat(self.concepts)
        return probs, concepts
