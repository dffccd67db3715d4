"""How many of a fixed number of top pixels lie on the concept?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import top_k_intersection
from cbm_lightning.saliency.scores import Scores


class TopKIntersection(LocalisationMetric):
    """Share of the top pixels in the mask, see `cbm_lightning.saliency.localisation.top_k_intersection`.

    Args:
        num_concepts: ``K``.
        k: How many top pixels (1000 in the original); at most as many as a map has.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``k`` is below 1; in ``update`` also if it exceeds the pixels of a map.

    Example:
        >>> metric = TopKIntersection(num_concepts=1, k=2)
        >>> metric(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[True, True, False]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def __init__(self, num_concepts: int, k: int = 1000, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        if k < 1:
            raise ValueError(f"k: expected at least 1 pixel, got {k}")
        self.k = k

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Shares of ``[P, H, W]`` maps in [0, 1]."""
        return top_k_intersection(maps, truth, self.k)
