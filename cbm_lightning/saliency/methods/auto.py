"""The best method that a model allows."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.methods.exact import ExactMaps
from cbm_lightning.saliency.methods.grad_cam import GradCAM
from cbm_lightning.saliency.subject import NoExactMaps, Subject


class Auto(SaliencyMethod):
    """Exact maps where the model has them, Grad-CAM otherwise."""

    name = "auto"

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps of the first method that applies."""
        maps: Tensor
        try:
            maps = ExactMaps().attribute(subject, image, rows, concepts)
        except NoExactMaps:
            maps = GradCAM().attribute(subject, image, rows, concepts)
        return maps
