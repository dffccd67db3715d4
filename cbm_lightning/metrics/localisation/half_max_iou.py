"""Do the pixels above half the maximum cover the concept?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import Overlap, check_kind, half_max_overlap
from cbm_lightning.saliency.scores import Scores


class HalfMaxIoU(LocalisationMetric):
    """Overlap at half the maximum, see `cbm_lightning.saliency.localisation.half_max_overlap`.

    Args:
        num_concepts: ``K``.
        kind: ``"iou"``, ``"dice"``, or ``"precision"`` (the share of what is marked that lies in the mask).
        soft: Take the saliency as it is, divided by its maximum, without the cut at one half.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The kind is unknown.

    Example:
        >>> metric = HalfMaxIoU(num_concepts=1)
        >>> metric(torch.tensor([[[5.0, 3.0, 2.0]]]), torch.tensor([[[True, False, False]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def __init__(self, num_concepts: int, kind: Overlap = "iou", soft: bool = False, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        self.kind, self.soft = check_kind(kind), soft

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Overlaps of ``[P, H, W]`` maps in [0, 1]."""
        return half_max_overlap(maps, truth, self.kind, self.soft)
