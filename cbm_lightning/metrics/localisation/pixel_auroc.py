"""Does saliency tell the pixels of the concept from all others?"""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import pixel_auroc
from cbm_lightning.saliency.scores import Scores


class PixelAUROC(LocalisationMetric):
    """Area under the ROC curve of the pixels of a map, see `cbm_lightning.saliency.localisation.pixel_auroc`.

    The area is that of each pair for itself, not of all pixels in one pool.

    Example:
        >>> metric = PixelAUROC(num_concepts=1)
        >>> metric(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[False, False, True]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Areas of ``[P, H, W]`` maps in [0, 1]."""
        return pixel_auroc(maps, truth)
