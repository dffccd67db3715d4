"""What is left of a concept where its image is multiplied by its map?"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from cbm_lightning.metrics.faithfulness.base import FaithfulnessMetric
from cbm_lightning.saliency.faithfulness import MaskEffect, Score, average_drop


class _MaskEffectMetric(FaithfulnessMetric):
    """One part of `cbm_lightning.saliency.faithfulness.average_drop`; the model is asked ``B + 2 P`` times."""

    @abstractmethod
    def part(self, effect: MaskEffect) -> Tensor:
        """``[P]``, the part that counts here."""

    def measure(self, score: Score, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The part ``[P]`` in [0, 1]."""
        effect = average_drop(
            score, images, maps, rows, concepts, activation=self.activation, batch_size=self.batch_size
        )
        return self.part(effect)


class AverageDrop(_MaskEffectMetric):
    """Mean share of a concept's score that is lost where its image is multiplied by its map.

    See `cbm_lightning.saliency.faithfulness.average_drop`; in [0, 1], small is good.

    Example:
        >>> metric = AverageDrop(num_concepts=1)
        >>> images, pixel = torch.full((1, 1, 4, 4), 9.0), torch.zeros(1, 4, 4)
        >>> pixel[0, 2, 2] = 1.0
        >>> metric.update(lambda x: x[:, :, 2, 2], images, pixel, torch.tensor([0]), torch.tensor([0]))
        >>> metric.compute(), metric.chance()
        (tensor(0.), tensor(0.4999))
    """

    higher_is_better = False

    def part(self, effect: MaskEffect) -> Tensor:
        """The share that is lost."""
        return effect.drop


class AverageIncrease(_MaskEffectMetric):
    """Share of the pairs whose score rises where the image is multiplied by the map; large is good, see `AverageDrop`.

    Example:
        >>> metric = AverageIncrease(num_concepts=1)
        >>> images, left = torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[1.0, 0.0]]])
        >>> metric.update(lambda x: x.sum((2, 3)), images, left, torch.tensor([0]), torch.tensor([0]))
        >>> metric.compute()
        tensor(1.)
    """

    def part(self, effect: MaskEffect) -> Tensor:
        """Whether it rises."""
        return effect.increase


class AverageGain(_MaskEffectMetric):
    """Mean share of what a concept's score lacks to 1 that is won where its image is multiplied by its map.

    In [0, 1], large is good, see `AverageDrop`. Pairs whose score is 1 to begin with do not count.

    Example:
        >>> metric = AverageGain(num_concepts=1)
        >>> images, left = torch.tensor([[[[9.0, -9.0]]]]), torch.tensor([[[1.0, 0.0]]])
        >>> metric.update(lambda x: x.sum((2, 3)), images, left, torch.tensor([0]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.9998)
    """

    def part(self, effect: MaskEffect) -> Tensor:
        """The share that is won."""
        return effect.gain
