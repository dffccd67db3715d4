"""What metrics over pairs of an image and a concept share: means of each concept, with the chance level beside."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class PerConceptSummary(NamedTuple):
    """What was measured on all processes; NaN where nothing was.

    Attributes:
        value: Mean of ``per_concept`` over the concepts that were measured.
        chance: The same mean of ``chance_per_concept``.
        per_concept: ``[K]``, mean over the pairs of a concept.
        chance_per_concept: ``[K]``, what chance would score on these pairs.
        counts: ``[K]`` int64, how many pairs were measured.
    """

    value: Tensor
    chance: Tensor
    per_concept: Tensor
    chance_per_concept: Tensor
    counts: Tensor


class PerConceptMetric(Metric):
    """Base of metrics over pairs of an image and a concept: every concept counts the same, however often it is seen.

    Pairs for which the value or its chance level is undefined (NaN) do not count, in either.

    `summary` has all there is to know and reads what all processes counted; so do the methods that return a part of it.
    Like the first ``compute`` after an ``update`` they are collective: where there are several processes, call them on
    every one, also on one that has not seen a pair.

    Args:
        num_concepts: ``K``.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_concepts`` is below 1.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    apart: Tensor

    def __init__(self, num_concepts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_concepts < 1:
            raise ValueError(f"num_concepts: expected at least 1, got {num_concepts}")
        self.num_concepts = num_concepts
        # values, their chance levels, how many
        self.add_state("sums", torch.zeros(3, num_concepts), dist_reduce_fx="sum")
        # a MetricCollection lets metrics share a state if theirs are equal after the first batch, as they are after one
        # without a pair; NaN equals nothing
        self.add_state("apart", torch.tensor(torch.nan), dist_reduce_fx="sum")

    def check_concepts(self, concepts: Tensor, pairs: int) -> None:
        """Refuse concepts that there are not.

        Args:
            concepts: ``[P]`` int64, which concept a pair is of.
            pairs: ``P``.

        Raises:
            ValueError: There is not one concept a pair, or it is not one of ``0`` to ``K - 1``.
        """
        if concepts.shape != (pairs,) or concepts.is_floating_point():
            raise ValueError(
                f"concepts: expected whole numbers [{pairs}], one for every map, got {list(concepts.shape)} of "
                f"{concepts.dtype}"
            )
        if pairs and not 0 <= int(concepts.min()) <= int(concepts.max()) < self.num_concepts:
            raise ValueError(
                f"concepts: expected indices from 0 to {self.num_concepts - 1}, got {int(concepts.min())} to "
                f"{int(concepts.max())}"
            )

    def record(self, values: Tensor, chance: Tensor, concepts: Tensor) -> None:
        """Count pairs.

        Args:
            values: ``[P]``, NaN where undefined.
            chance: ``[P]``, what chance would score, NaN where undefined.
            concepts: ``[P]`` int64, see `check_concepts`.
        """
        known = ~(values.isnan() | chance.isnan())
        rows = torch.where(known, torch.stack([values, chance, torch.ones_like(values)]), 0.0)
        # not in place: a state that was made in inference mode could not be changed outside it
        self.sums = self.sums.index_add(1, concepts.long(), rows.to(self.sums.dtype))

    def compute(self) -> Tensor:
        """The mean over the concepts that were measured, NaN where none was."""
        return self._summary().value

    def summary(self) -> PerConceptSummary:
        """Value, chance level and counts, over all concepts and for each; collective, see the class."""
        if self._is_synced:
            return self._summary()
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._summary()

    def per_concept(self) -> Tensor:
        """``[K]`` means over the pairs of a concept, NaN where there is none; collective, see the class."""
        return self.summary().per_concept

    def chance(self) -> Tensor:
        """The value that chance would have on the pairs that counted; collective, see the class."""
        return self.summary().chance

    def chance_per_concept(self) -> Tensor:
        """``[K]`` values that chance would have; collective, see the class."""
        return self.summary().chance_per_concept

    def counts(self) -> Tensor:
        """``[K]`` int64, how many pairs counted; collective, see the class."""
        return self.summary().counts

    def _summary(self) -> PerConceptSummary:
        values, chance, counts = self.sums
        values, chance = values / counts, chance / counts
        return PerConceptSummary(values.nanmean(), chance.nanmean(), values, chance, counts.long())
