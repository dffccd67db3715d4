"""How far is the largest pixel of a map from the concept's keypoint?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import keypoint_distance
from cbm_lightning.saliency.scores import Scores


class KeypointDistance(LocalisationMetric):
    """Mean distance to keypoints, see `cbm_lightning.saliency.localisation.keypoint_distance`.

    Args:
        num_concepts: ``K``.
        normalised: In units of the image's diagonal; otherwise in pixels.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> maps = torch.zeros(1, 3, 4)
        >>> maps[0, 0, 0] = 1.0
        >>> KeypointDistance(num_concepts=1)(maps, torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
        tensor(0.6000)
    """

    higher_is_better = False

    def __init__(self, num_concepts: int, normalised: bool = True, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        self.normalised = normalised

    def update(self, maps: Tensor, points: Tensor, concepts: Tensor) -> None:
        """Count pairs.

        Args:
            maps: ``[P, H, W]`` signed saliency; ``P`` may be 0.
            points: ``[P, 2]``, ``(x, y)`` in pixels, NaN where invisible.
            concepts: ``[P]`` int64, which concept a pair is of.

        Raises:
            ValueError: A shape does not fit, or a concept is not one of ``0`` to ``K - 1``.
        """
        self.count(maps, points, concepts)

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Distances of ``[P, H, W]`` maps from ``[P, 2]`` points."""
        return keypoint_distance(maps, truth, self.normalised)
