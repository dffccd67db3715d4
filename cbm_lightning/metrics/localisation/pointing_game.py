"""Does the largest pixel of a map hit the concept?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import check_tolerance, pointing_game
from cbm_lightning.saliency.scores import Scores


class PointingGame(LocalisationMetric):
    """Share of pairs whose largest pixel lies in the mask, see `cbm_lightning.saliency.localisation.pointing_game`.

    Args:
        num_concepts: ``K``.
        tolerance: A pixel this far from the mask still hits (15 in the original).
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The tolerance is negative or not finite.

    Example:
        >>> maps, masks = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
        >>> maps[:, 0, 0], masks[0, 0, 0], masks[1, 0, 2] = 1.0, 1.0, 1.0
        >>> metric = PointingGame(num_concepts=3)
        >>> metric(maps, masks, torch.tensor([0, 2])), metric.per_concept(), metric.chance()
        (tensor(0.5000), tensor([1., nan, 0.]), tensor(0.0625))
    """

    def __init__(self, num_concepts: int, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        self.tolerance = check_tolerance(tolerance)

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Hits of ``[P, H, W]`` maps, 0 or 1."""
        return pointing_game(maps, truth, self.tolerance)
