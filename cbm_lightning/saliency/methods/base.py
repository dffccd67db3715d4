"""The contract of a saliency method: where in an image a concept score comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from cbm_lightning.registry import Named
from cbm_lightning.saliency.subject import Subject


class SaliencyMethod(Named, ABC, field="method"):
    """Makes a map of each wanted pair of an image and a concept.

    A method of one's own subclasses this and defines `attribute`; with a ``name`` it has a short name in YAML files.

    Attributes:
        name: Short name.
        concept_specific: False where all concepts of an image have the same map.
    """

    concept_specific: ClassVar[bool] = True

    @abstractmethod
    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps of pairs; called in evaluation mode, outside inference mode, with gradients enabled.

        Args:
            subject: The model.
            image: ``[B, C, H, W]`` as the model reads it.
            rows: ``[P]`` int64, which image.
            concepts: ``[P]`` int64, which concept.

        Returns:
            ``[P, h, w]`` signed saliency, in the method's own resolution.

        Raises:
            ValueError: The model has not what the method needs; the message says what would help.
        """
