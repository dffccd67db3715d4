"""Does the concept appear soon when the pixels that its map names are brought in?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.faithfulness.base import FaithfulnessMetric
from cbm_lightning.saliency.faithfulness import Score, Substrate, check_positive, insertion


class InsertionAUC(FaithfulnessMetric):
    """Mean area under insertion curves, see `cbm_lightning.saliency.faithfulness.insertion`; large is good.

    Args:
        num_concepts: ``K``.
        step: Pixels brought in at once, one row by default. The model is asked ``2 P (ceil(H W / step) + 1)`` times.
        substrate: What they are brought into: ``"blur"``, ``"zero"``, a number or a colour ``[C, 1, 1]``.
        kwargs: ``activation``, ``batch_size`` and ``seed``, see `FaithfulnessMetric`, and options of
            ``torchmetrics.Metric``.

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

    def __init__(
        self, num_concepts: int, *, step: int | None = None, substrate: Substrate = "blur", **kwargs: Any
    ) -> None:
        super().__init__(num_concepts, **kwargs)
        if step is not None:
            check_positive("step", step)
        self.step, self.substrate = step, substrate

    def measure(self, score: Score, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Areas ``[P]``."""
        return insertion(
            score,
            images,
            maps,
            rows,
            concepts,
            step=self.step,
            substrate=self.substrate,
            activation=self.activation,
            batch_size=self.batch_size,
        ).auc
