"""Are the concepts that a prediction rests on in the image?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.saliency.importance import check_top, concept_density, concept_existence, images_that_count


class ConceptExistence(Metric):
    """Share of the most important concepts of a prediction that its image shows, mean over images.

    The concept existence metric of Aysel et al. 2025 (arXiv 2501.19271), which abbreviates it to CEM; that is also the
    concept embedding model. The formula is from a secondary description: check it against the paper before citing.

    Args:
        top: Number of most important concepts, all if there are fewer.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``top`` is below 1.

    Example:
        >>> metric = ConceptExistence(top=2)
        >>> metric(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor(0.5000)
        >>> metric.chance()
        tensor(0.3333)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    total: Tensor
    density: Tensor
    images: Tensor

    def __init__(self, top: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_top(top)
        self.top = top
        for name in ("total", "density", "images"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, importance: Tensor, present: Tensor, counted: Tensor | None = None) -> None:
        """Count images.

        Args:
            importance: ``[B, K]`` from `cbm_lightning.saliency.importance.local_importance`.
            present: ``[B, K]`` annotations of images, present from one half; NaN where not known, and for real-valued
                concepts. Annotations by class say nothing of the image.
            counted: ``[B]`` bool, images that count, for example those classified correctly; all by default.
        """
        found = concept_existence(importance, present, self.top)
        kept = images_that_count(found, counted)
        # not in place: a state that was made in inference mode could not be changed outside it
        self.total = self.total + found[kept].sum()
        self.density = self.density + concept_density(present)[kept].sum()
        self.images = self.images + kept.sum()

    def compute(self) -> Tensor:
        """The share in [0, 1], NaN where nothing was annotated."""
        return self.total / self.images

    def chance(self) -> Tensor:
        """The share if importance were drawn at random: the density of concepts, over the same images."""
        here = self.sync_on_compute and not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=here, should_unsync=here):
            return self.density / self.images
