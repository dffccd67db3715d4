"""The contract of a backbone: an input becomes `Features`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cbm_lightning.configurable import Part
from cbm_lightning.modes import evaluating
from cbm_lightning.types import FeatureDims, Features

Transform = Callable[[Any], Tensor]
"""A PIL image to a normalised ``[C, H, W]`` tensor."""


class ImageStats(NamedTuple):
    """How the backbone wants its pixels: ``(pixel - mean) / std`` for pixels in [0, 1], a value a channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Backbone(Part):
    """Turns a batch of inputs into `Features`.

    Args:
        frozen: Never train: no gradients, evaluation mode always.
        freeze_norm: Train, but keep BatchNorm layers in evaluation mode with fixed statistics. Needed for weights
            whose BatchNorm was folded, and for small batches.

    Attributes:
        dims: Widths and grid of the features it returns; set by the subclass at construction.
    """

    dims: FeatureDims

    def __init__(self, *, frozen: bool = False, freeze_norm: bool = False) -> None:
        super().__init__()
        self.frozen = frozen
        self.freeze_norm = freeze_norm

    @abstractmethod
    def encode(self, x: Tensor) -> Features:
        """Features of an input batch."""

    def forward(self, x: Tensor) -> Features:
        """Features of an input batch; without a graph if the backbone is frozen and the input asks for no gradient."""
        if self.frozen and not x.requires_grad:
            with torch.no_grad():
                return self.encode(x)
        return self.encode(x)

    def build(self, feature_dim: int | None) -> None:
        """Take the width of precomputed features from the datamodule, None where batches hold images.

        The model calls it once, at construction. Only backbones that measure nothing themselves (`Identity`) listen.
        """

    def eval_transform(self) -> Transform | None:
        """The weights' own preprocessing for evaluation, or None if there is none."""
        return None

    def train_transform(self) -> Transform | None:
        """The weights' own augmentation for training, or None if there is none."""
        return None

    def image_stats(self) -> ImageStats | None:
        """Normalisation of pixels that the weights expect, or None if there is none."""
        return None

    def freeze(self) -> None:
        """Apply ``frozen`` and ``freeze_norm``; subclasses call it at the end of construction."""
        if self.frozen:
            self.requires_grad_(False)
        # a new module is in training mode, and nobody need ever call train() on it
        self.train(self.training)

    def freeze_unused(self, example: Tensor) -> None:
        """Freeze the parameters that no feature depends on (a head that is bypassed, stages that are never run).

        Data parallel training refuses parameters that get no gradient, unless it searches for them in every step.

        Args:
            example: An input batch.
        """
        with evaluating(self), torch.enable_grad():
            features = self.encode(example)
            outputs = [features.pooled.sum()] + ([] if features.tokens is None else [features.tokens.sum()])
            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            used = torch.autograd.grad(torch.stack(outputs).sum(), trained, allow_unused=True)
        for parameter, gradient in zip(trained, used, strict=True):
            parameter.requires_grad_(gradient is not None)

    def train(self, mode: bool = True) -> Backbone:
        """Set the training mode, except for what is frozen."""
        super().train(mode and not self.frozen)
        if mode and self.freeze_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def split_map(features: Tensor, channels_last: bool = False) -> tuple[Tensor, tuple[int, int]]:
    """A feature map ``[B,D,h,w]`` (or ``[B,h,w,D]``) as tokens ``[B, h*w, D]`` in raster order, with its grid."""
    if channels_last:
        return features.flatten(1, 2), (features.shape[1], features.shape[2])
    return features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3])


def probe(encode: Callable[[Tensor], Features], module: nn.Module, example: Tensor) -> FeatureDims:
    """Measure the widths by encoding one example in evaluation mode, leaving modes as they were."""
    with evaluating(module), torch.no_grad():
        features = encode(example)
    tokens = None if features.tokens is None else features.tokens.shape[-1]
    return FeatureDims(features.pooled.shape[-1], tokens, features.grid)
