"""Do the pixels of the concept come first when sorted by saliency?"""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import pixel_average_precision
from cbm_lightning.saliency.scores import Scores


class PixelAveragePrecision(LocalisationMetric):
    """Average precision of pixels, see `cbm_lightning.saliency.localisation.pixel_average_precision`.

    Example:
        >>> metric = PixelAveragePrecision(num_concepts=1)
        >>> metric(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[False, False, True]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Average precisions of ``[P, H, W]`` maps in [0, 1]."""
        return pixel_average_precision(maps, truth)
