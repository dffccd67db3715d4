"""What the metrics of faithfulness share: a chance level from the same maps in other places."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from cbm_lightning.metrics.per_concept import PerConceptMetric
from cbm_lightning.randomness import step_generator
from cbm_lightning.saliency.faithfulness import (
    Activation,
    Curve,
    Score,
    Substrate,
    check_pairs,
    check_positive,
    shifted,
)


class ShiftedChanceMetric(PerConceptMetric):
    """Base of metrics whose chance level is what they say of shifted maps.

    Args:
        num_concepts: ``K``.
        seed: Of the places that maps are shifted to. They depend on nothing but the seed and the number of updates
            since the last ``reset``. Another division into batches or processes gives other places, hence another draw
            of the same chance level; the values themselves stay.
        kwargs: Options of ``torchmetrics.Metric``.
    """

    def __init__(self, num_concepts: int, *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(num_concepts, **kwargs)
        self.seed = seed

    def elsewhere(self, maps: Tensor) -> Tensor:
        """The maps ``[P, H, W]`` of this update in other places."""
        return shifted(maps, step_generator(self.seed, self.update_count))


class FaithfulnessMetric(ShiftedChanceMetric):
    """Base of metrics that change images where maps say so and ask the model again.

    Args:
        num_concepts: ``K``.
        activation: From concept logits ``[N, K]`` to scores in [0, 1] of the same shape.
        batch_size: Images that the model is given at once, at most.
        seed: See `ShiftedChanceMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_concepts`` or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        num_concepts: int,
        *,
        activation: Activation = torch.sigmoid,
        batch_size: int = 64,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_concepts, seed=seed, **kwargs)
        check_positive("batch_size", batch_size)
        self.activation = activation
        self.batch_size = batch_size

    @abstractmethod
    def measure(self, score: Score, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """``[P]``, what the metric says of each pair; arguments as in `update`."""

    def update(self, score: Score, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> None:
        """Count pairs, once with their maps and once with the maps in another place.

        Args:
            score: What the model says: images ``[N, C, H, W]`` to concept logits ``[N, K]``. Its mode and its gradients
                are left as they are.
            images: ``[B, C, H, W]`` as the model reads them.
            maps: ``[P, H, W]`` saliency in the resolution of the images; ``P`` may be 0.
            rows: ``[P]`` int64 in ``range(B)``, which image a pair is of.
            concepts: ``[P]`` int64, which concept a pair is of.

        Raises:
            ValueError: Shapes do not fit, an index is out of range, or ``score`` returns something else.
        """
        check_pairs(images, maps, rows, concepts)
        self.check_concepts(concepts, len(maps))
        # in one go, so that batches are filled and what both need is computed once
        both = torch.cat([maps, self.elsewhere(maps)])
        found = self.measure(score, images, both, rows.repeat(2), concepts.repeat(2))
        self.record(found[: len(maps)], found[len(maps) :], concepts)


class CurveMetric(FaithfulnessMetric):
    """Base of metrics that are the mean area under curves; a subclass says which.

    Args:
        num_concepts: ``K``.
        step: Pixels changed at once, one row by default. The model is asked ``2 P (ceil(H W / step) + 1)`` times.
        substrate: ``"zero"``, ``"blur"``, a number or a colour ``[C, 1, 1]``; the default is that of the curve.
        kwargs: See `FaithfulnessMetric`.

    Raises:
        ValueError: ``num_concepts``, ``step`` or ``batch_size`` is below 1.
    """

    curve: ClassVar[Callable[..., Curve]]

    def __init__(
        self, num_concepts: int, *, step: int | None = None, substrate: Substrate | None = None, **kwargs: Any
    ) -> None:
        super().__init__(num_concepts, **kwargs)
        if step is not None:
            check_positive("step", step)
        self.step, self.substrate = step, substrate

    def measure(self, score: Score, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Areas ``[P]``."""
        own = {} if self.substrate is None else {"substrate": self.substrate}
        options = {"step": self.step, "activation": self.activation, "batch_size": self.batch_size, **own}
        return type(self).curve(score, images, maps, rows, concepts, **options).auc
