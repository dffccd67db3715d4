"""Do the pixels that hold most of the saliency cover the concept?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import check_mass, iou_at_mass
from cbm_lightning.saliency.scores import Scores


class MassIoU(LocalisationMetric):
    """Overlap at a level of the mass, see `cbm_lightning.saliency.localisation.iou_at_mass`.

    Args:
        num_concepts: ``K``.
        mass: Share of the positive saliency that the top pixels hold, in (0, 1]; .25, .5, .75 and .95 are usual.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The mass is not in (0, 1].

    Example:
        >>> metric = MassIoU(num_concepts=1, mass=0.75)
        >>> metric(torch.tensor([[[5.0, 3.0, 2.0]]]), torch.tensor([[[True, False, False]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def __init__(self, num_concepts: int, mass: float = 0.5, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        self.mass = check_mass(mass)

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Overlaps of ``[P, H, W]`` maps in [0, 1]."""
        return iou_at_mass(maps, truth, self.mass)
