"""What the metrics of localisation share: pairs of a map and what is true of it, counted by concept."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from cbm_lightning.metrics.per_concept import PerConceptMetric
from cbm_lightning.saliency.scores import Scores


class LocalisationMetric(PerConceptMetric):
    """Base of metrics that look at where saliency lies.

    `summary` has the mean over concepts, the chance level and both for every concept, of all processes.

    Args:
        num_concepts: ``K``.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_concepts`` is below 1.
    """

    @abstractmethod
    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """The scores of pairs ``[P]``: of ``maps [P, H, W]`` against what is true of them."""

    def update(self, maps: Tensor, masks: Tensor, concepts: Tensor) -> None:
        """Count pairs, as `cbm_lightning.saliency.pairs.visible_pairs` makes them.

        Args:
            maps: ``[P, H, W]`` signed saliency; ``P`` may be 0.
            masks: ``[P, H, W]`` bool, where the concept is.
            concepts: ``[P]`` int64, which concept a pair is of.

        Raises:
            ValueError: The shapes differ, or a concept is not one of ``0`` to ``K - 1``.
        """
        self.count(maps, masks, concepts)

    def count(self, maps: Tensor, truth: Tensor, concepts: Tensor) -> None:
        """Count pairs, whatever it is that is true of them; arguments and errors as in `update`."""
        self.check_concepts(concepts, len(maps))
        # forward, unlike update, leaves gradients on
        found = self.scores(maps.detach(), truth)
        self.record(found.values, found.chance, concepts)
