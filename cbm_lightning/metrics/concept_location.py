"""Does a model look where the concepts are that a prediction rests on?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.saliency.importance import check_area, check_top, concept_location, images_that_count
from cbm_lightning.saliency.pairs import Upsampling


class ConceptLocation(Metric):
    """Share of the most important present concepts whose point lies where their map is most active, mean over images.

    The concept location metric (CLM) of Aysel et al. 2025 (arXiv 2501.19271). The formula is from a secondary
    description: check it against the paper before citing.

    Args:
        top: Number of most important concepts among those that are present and have a point.
        alpha: The area in which a point must lie, in parts of the image; the paper takes 1, 3 and 6.
        parts: In how many parts the image is thought of.
        mode: How maps are brought to the size of the image.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``top`` is below 1, or ``alpha`` not in (0, ``parts``].

    Example:
        >>> metric = ConceptLocation(top=1)
        >>> maps, points = torch.arange(12.0).reshape(1, 1, 3, 4), torch.tensor([[[3.0, 2.0]]])
        >>> metric(maps, points, importance=torch.ones(1, 1), present=torch.ones(1, 1))
        tensor(1.)
        >>> metric.chance()
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(
        self, top: int = 3, alpha: float = 3, parts: int = 12, mode: Upsampling = "bilinear", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_top(top)
        check_area(alpha, parts)
        self.top, self.alpha, self.parts = top, alpha, parts
        self.mode: Upsampling = mode
        for name in ("total", "images"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self,
        maps: Tensor,
        points: Tensor,
        importance: Tensor,
        present: Tensor,
        size: tuple[int, int] | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """Count images.

        Args:
            maps: ``[B, K, h, w]`` saliency.
            points: ``[B, K, 2]`` ``(x, y)`` in pixels of ``size``, NaN where the concept is not to be seen.
            importance: ``[B, K]`` from `cbm_lightning.saliency.importance.local_importance`.
            present: ``[B, K]`` annotations, present from one half; NaN where not known.
            size: ``(H, W)`` of the image; that of the maps by default.
            counted: ``[B]`` bool, images that count, for example those classified correctly; all by default.
        """
        found = concept_location(maps, points, importance, present, self.top, self.alpha, self.parts, size, self.mode)
        kept = images_that_count(found, counted)
        # not in place: a state that was made in inference mode could not be changed outside it
        self.total = self.total + found[kept].sum()
        self.images = self.images + kept.sum()

    def compute(self) -> Tensor:
        """The share in [0, 1], NaN where no present concept had a point and a map."""
        return self.total / self.images

    def chance(self) -> Tensor:
        """The share of the image in which a point must lie."""
        return torch.as_tensor(self.alpha / self.parts, dtype=self.total.dtype, device=self.total.device)
