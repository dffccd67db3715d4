"""How many of the top pixels lie on the concept, if they are as many as its own?"""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.saliency.localisation import rank_accuracy
from cbm_lightning.saliency.scores import Scores


class RankAccuracy(LocalisationMetric):
    """Relevance rank accuracy, see `cbm_lightning.saliency.localisation.rank_accuracy`.

    Example:
        >>> metric = RankAccuracy(num_concepts=1)
        >>> metric(torch.tensor([[[3.0, 1.0, 2.0]]]), torch.tensor([[[True, True, False]]]), torch.tensor([0]))
        tensor(0.5000)
    """

    def scores(self, maps: Tensor, truth: Tensor) -> Scores:
        """Shares of ``[P, H, W]`` maps in [0, 1]."""
        return rank_accuracy(maps, truth)
