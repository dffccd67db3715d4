"""How much of the saliency lies on the concept?"""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import energy_in_mask
from cbm_lightning.saliency.scores import Scores


class EnergyInMask(LocalisationMetric):
    """Share of the positive saliency in the mask, see `cbm_lightning.saliency.localisation.energy_in_mask`.

    Example:
        >>> metric = EnergyInMask(num_concepts=1)
        >>> metric(torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[True, False]]]), torch.tensor([0])), metric.chance()
        (tensor(0.7500), tensor(0.5000))
    """

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Shares of ``[P, H, W]`` maps in [0, 1]."""
        return energy_in_mask(maps, truth)
