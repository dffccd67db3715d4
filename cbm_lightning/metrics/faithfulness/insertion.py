"""Does the concept appear soon when the pixels that its map names are brought in?"""

from __future__ import annotations

from cbm_lightning.metrics.faithfulness.base import CurveMetric
from cbm_lightning.saliency.faithfulness import insertion


class InsertionAUC(CurveMetric):
    """Mean area under insertion curves, see `cbm_lightning.saliency.faithfulness.insertion`; large is good.

    Args:
        num_concepts: ``K``.
        kwargs: ``step`` and ``substrate`` (``"blur"`` by default), see `CurveMetric`; ``activation``, ``batch_size``
            and ``seed``, see `FaithfulnessMetric`; and options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_concepts``, ``step`` or ``batch_size`` is below 1.

    Example:
        >>> metric = InsertionAUC(num_concepts=1, step=1, substrate="zero")
        >>> images, pixel = torch.full((1, 1, 4, 4), 9.0), torch.zeros(1, 4, 4)
        >>> pixel[0, 2, 2] = 1.0
        >>> metric.update(lambda x: x[:, :, 2, 2], images, pixel, torch.tensor([0]), torch.tensor([0]))
        >>> metric.compute(), metric.compute() > metric.chance()
        (tensor(0.9843), tensor(True))
    """

    curve = staticmethod(insertion)
