"""Do maps change when what they explain becomes random?"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.metrics.faithfulness.base import ShiftedChanceMetric
from cbm_lightning.saliency.randomisation import Similarity, check_kind, map_similarity


class RandomisationSimilarity(ShiftedChanceMetric):
    """Mean absolute similarity of maps before and after weights were randomised (Adebayo et al. 2018); small is good.

    Make the second maps inside `cbm_lightning.saliency.randomisation.randomised`. A method passes if the similarity
    comes near its chance level, that of a map and its shifted self; a method that shows the image, as an edge detector
    does, stays at 1.

    Args:
        num_concepts: ``K``.
        kind: ``"cosine"`` or ``"spearman"``, see `cbm_lightning.saliency.randomisation.map_similarity`.
        seed: See `ShiftedChanceMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``num_concepts`` is below 1, or the kind does not exist.

    Example:
        >>> metric = RandomisationSimilarity(num_concepts=1)
        >>> edge = torch.zeros(1, 8, 8)
        >>> edge[0, 2, 5] = 1.0
        >>> metric.update(edge, edge, torch.tensor([0]))
        >>> metric.compute(), metric.chance()
        (tensor(1.), tensor(0.))
    """

    higher_is_better = False

    def __init__(self, num_concepts: int, kind: Similarity = "cosine", *, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(num_concepts, seed=seed, **kwargs)
        self.kind = check_kind(kind)

    def update(self, maps: Tensor, randomised_maps: Tensor, concepts: Tensor) -> None:
        """Count pairs.

        Args:
            maps: ``[P, H, W]`` saliency; ``P`` may be 0.
            randomised_maps: ``[P, H, W]`` saliency of the same pairs with random weights.
            concepts: ``[P]`` int64, which concept a pair is of.

        Raises:
            ValueError: The shapes differ, or a concept is not one of ``0`` to ``K - 1``.
        """
        self.check_concepts(concepts, len(maps))
        # forward, unlike update, leaves gradients on
        maps = maps.detach()
        found = map_similarity(maps, randomised_maps.detach(), self.kind)
        # the same picture with the other sign is the same picture
        self.record(found.abs(), map_similarity(maps, self.elsewhere(maps), self.kind).abs(), concepts)
