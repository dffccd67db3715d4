"""Do concepts weigh in the classes in which they occur?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.base import ConceptMetric
from cbm_lightning.saliency.importance import (
    GlobalImportance,
    Per,
    check_classes,
    concept_global_importance,
    global_importance_chance,
)


class ConceptGlobalImportance(ConceptMetric):
    """Cosines of weights, of scores and of contributions with how often classes show a concept, mean over concepts.

    The concept global importance metrics (CGIM 1 to 3) of Aysel et al. 2025 (arXiv 2501.19271). The formulas are from a
    secondary description: check them against the paper before citing. Classes without a sample count in none of the
    three, those without a correctly classified one not in the second and third.

    Args:
        concepts: The concept set, or the number of concepts if all are binary. Real-valued concepts do not count.
        num_classes: ``L``.
        center: Take the mean off vectors first. Raw cosines lie high whatever the model: see `chance`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_classes`` is below 2.

    Example:
        >>> metric = ConceptGlobalImportance(2, num_classes=2)
        >>> concepts, labels = torch.eye(2), torch.arange(2)
        >>> found = metric(concepts, concepts, labels, predictions=labels, weight=torch.ones(2, 2))
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'cgim1': 0.707, 'cgim2': 1.0, 'cgim3': 1.0}
    """

    present: Tensor
    annotated: Tensor
    score: Tensor
    correct: Tensor
    weight: Tensor
    samples: Tensor

    def __init__(self, concepts: ConceptSet | int, num_classes: int, center: bool = False, **kwargs: Any) -> None:
        super().__init__(concepts, **kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.center = center
        for name in ("present", "annotated", "score", "weight"):
            self.add_state(name, torch.zeros(num_classes, self.num_concepts), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(num_classes), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, scores: Tensor, concepts: Tensor, labels: Tensor, predictions: Tensor, weight: Tensor) -> None:
        """Count samples.

        Args:
            scores: ``[B, K]`` what the head reads of each concept.
            concepts: ``[B, K]`` annotations, present from one half; NaN where not known.
            labels: ``[B]`` true classes.
            predictions: ``[B]`` predicted classes.
            weight: ``[L, K]`` of the label head; the mean over samples counts, should it change.

        Raises:
            ValueError: Shapes do not fit, a class is out of range, or a score or weight is not finite.
        """
        known = self.known(scores, concepts)
        check_classes(labels, "labels", len(scores), self.num_classes)
        check_classes(predictions, "predictions", len(scores), self.num_classes)
        if weight.shape != self.weight.shape:
            raise ValueError(f"weight: expected {list(self.weight.shape)}, got {list(weight.shape)}")
        for name, numbers in (("scores", scores), ("weight", weight)):
            if not bool(numbers.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        right = labels == predictions
        # not in place: a state that was made in inference mode could not be changed outside it
        self.present = self.present.index_add(0, labels, ((concepts >= 0.5) & known).to(self.present.dtype))
        self.annotated = self.annotated.index_add(0, labels, known.to(self.annotated.dtype))
        self.score = self.score.index_add(0, labels[right], scores[right].detach().to(self.score.dtype))
        self.correct = self.correct.index_add(0, labels, right.to(self.correct.dtype))
        self.weight = self.weight + weight.detach().to(self.weight.dtype) * len(scores)
        self.samples = self.samples + len(scores)

    def compute(self) -> dict[str, Tensor]:
        """``cgim1`` to ``cgim3`` in [-1, 1], each the mean over the concepts for which it is defined, NaN if none."""
        return self._means(self._measure(concept_global_importance, "concept"))

    def chance(self) -> dict[str, Tensor]:
        """The same of a model that takes each concept for another, see `global_importance_chance`."""
        return self._means(self._over_processes(global_importance_chance, "concept"))

    def per_concept(self) -> GlobalImportance:
        """``[K]`` each."""
        return self._over_processes(concept_global_importance, "concept")

    def per_class(self) -> GlobalImportance:
        """``[L]`` each, cosines over concepts."""
        return self._over_processes(concept_global_importance, "class")

    def _over_processes(self, measure: Callable[..., GlobalImportance], per: Per) -> GlobalImportance:
        here = self.sync_on_compute and not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=here, should_unsync=here):
            return self._measure(measure, per)

    def _measure(self, measure: Callable[..., GlobalImportance], per: Per) -> GlobalImportance:
        frequency, score = self.present / self.annotated, self.score / self.correct[:, None]
        return measure(self.weight / self.samples.clamp(min=1), frequency, score, self.center, per)

    @staticmethod
    def _means(found: GlobalImportance) -> dict[str, Tensor]:
        return {name: value.nanmean() for name, value in found._asdict().items()}
