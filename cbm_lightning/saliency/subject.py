"""The model whose concepts are localised, as the saliency methods see it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Batch, ConceptOutput, Contributions, Features, Prediction


class NoExactMaps(ValueError):
    """The model has no exact concept maps; the message says why."""


class Localisable(Protocol):
    """What saliency methods need of a model; `CBMModule` has it.

    ``bottleneck.concept_maps`` is used where it exists.

    Attributes:
        concept_set: The concepts.
        backbone: The module in which methods look for the last feature map, or for attention.
        bottleneck: ``bottleneck(features)`` predicts concepts.
    """

    concept_set: ConceptSet
    backbone: Any
    bottleneck: Any

    def encode(self, batch: Batch, /) -> Features:
        """Features of a batch with an ``image``."""


class Subject:
    """A model under study.

    Args:
        model: The model.

    Raises:
        TypeError: It lacks a member of `Localisable`; the message names it.
    """

    def __init__(self, model: Localisable) -> None:
        needed = ("concept_set", "backbone", "bottleneck", "encode")
        if missing := [name for name in needed if not hasattr(model, name)]:
            raise TypeError(
                f"{type(model).__name__} has no {missing}, so its concepts cannot be localised: use CBMModule, or give "
                "it the members of `saliency.Localisable`"
            )
        self.model = model
        self.concepts = model.concept_set
        self.backbone: nn.Module = model.backbone
        self.bottleneck: nn.Module = model.bottleneck

    def features(self, image: Tensor) -> Features:
        """Features of images ``[B, C, H, W]``."""
        return self.model.encode({"image": image})

    def output(self, features: Features) -> ConceptOutput:
        """Concepts of features."""
        output: ConceptOutput = self.bottleneck(features)
        return output

    def logits(self, image: Tensor) -> Tensor:
        """``[B, K]`` concept scores of images: what is explained, for a saturated sigmoid passes no gradient."""
        return self.output(self.features(image)).logits

    def exact_maps(self, output: ConceptOutput) -> Tensor:
        """``[B, K, h, w]`` the maps that the bottleneck has of itself.

        Raises:
            NoExactMaps: It has none, or not with these features.
        """
        own: Callable[[ConceptOutput], Tensor | None] | None = getattr(self.bottleneck, "concept_maps", None)
        try:
            maps = output.maps if own is None else own(output)
        except ValueError as error:
            raise NoExactMaps(str(error)) from error
        if maps is None:
            raise NoExactMaps(
                f"{type(self.bottleneck).__name__} has no exact concept maps: its scores are not linear in the "
                "pooled vector; use grad_cam, which needs no such thing"
            )
        if maps.shape[-2:] == (1, 1):
            raise NoExactMaps(
                "exact maps would have a single cell, because the backbone returns a map that it has averaged already; "
                "leave that pooling out, or use grad_cam"
            )
        return maps

    def predict(self, batch: Batch) -> Prediction:
        """Concepts and label of a batch.

        Raises:
            TypeError: The model makes no `Prediction`.
        """
        model: Any = self.model
        prediction = model(batch)
        if not isinstance(prediction, Prediction):
            raise TypeError(
                f"{type(model).__name__} returned {type(prediction).__name__}; return a Prediction(logits, concepts) "
                "for a batch, or hand predictions over"
            )
        return prediction

    def classes(self, prediction: Prediction) -> Tensor | None:
        """``[B]`` the predicted classes, None for several labels."""
        task = getattr(self.model, "task", "multiclass")
        if task == "multilabel":
            return None
        return prediction.logits.argmax(1) if task == "multiclass" else (prediction.logits[:, 0] >= 0).long()

    def importance(self, prediction: Prediction) -> Tensor | None:
        """``[B, K]`` what each concept adds to the predicted class, None where the head is not additive.

        A binary label has one logit, that of class 1; what speaks against it speaks for class 0.
        """
        account: Any = getattr(getattr(self.model, "head", None), "contributions", None)
        classes = self.classes(prediction)
        found: Contributions | None = None if account is None else account(prediction.concepts)
        if found is None or classes is None:
            return None
        if found.concepts.shape[1] == 1:
            return found.concepts[:, 0] * (2 * classes - 1)[:, None]
        return found.concepts[torch.arange(len(classes), device=classes.device), classes]

    def values(self, prediction: Prediction) -> Tensor | None:
        """``[B, K]`` what the head reads where a concept is one number, else None."""
        layout: Any = getattr(self.bottleneck, "layout", None)
        found = prediction.concepts.values
        return found[:, : len(self.concepts)].float() if getattr(layout, "width", 0) == 1 and found.ndim == 2 else None

    def weight(self) -> Tensor | None:
        """``[L, K]`` weights of the head where a concept is one number and a class a row, else None."""
        weigh: Any = getattr(getattr(self.model, "head", None), "concept_weight", None)
        found: Tensor | None = None if weigh is None else weigh()
        if found is None or found.shape[2] != 1 or len(found) < 2:
            return None
        return found[..., 0].detach()

    def find(self, concepts: Sequence[str | int] | None) -> list[int]:
        """Positions of concepts given by name or position; all by default.

        Raises:
            ValueError: A concept does not exist; the message lists near matches.
        """
        if concepts is None:
            return list(range(len(self.concepts)))
        if isinstance(concepts, str) or not concepts:
            raise ValueError(f"concepts: expected a list of names or positions, got {concepts!r}")
        found = [self.concepts.index(c) if isinstance(c, str) else _position(c) for c in concepts]
        if wrong := [k for k in found if type(k) is not int or not 0 <= k < len(self.concepts)]:
            raise ValueError(f"concepts: expected names, or positions below {len(self.concepts)}, got {wrong}")
        return found


def _position(value: Any) -> Any:
    """A whole number of any kind as an int; other things, truth values among them, as they are."""
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def check_image(image: Any) -> Tensor:
    """Check that something is a batch of images.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or not torch.is_floating_point(image) or not len(image):
        found = f"{list(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image: expected one float image [B, C, H, W] or more, as the model reads them, got {found}")
    return image
