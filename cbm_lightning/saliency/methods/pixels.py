"""What attributions to pixels share: captum's explainers over pairs of an image and a concept."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.subject import Subject

ChannelReduction = Literal["sum", "abs_sum", "max_abs"]


class PixelAttribution(SaliencyMethod):
    """An explainer of captum whose attributions ``[P, C, H, W]`` become maps ``[P, H, W]``.

    Args:
        channels: ``"sum"`` keeps signs, which suits attributions that add up to the score; ``"abs_sum"`` and
            ``"max_abs"`` (Simonyan et al. 2014) suit slopes, whose sign says nothing of presence.
        batch_size: Images a pass at most.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    def __init__(self, channels: ChannelReduction = "sum", batch_size: int = 32) -> None:
        if channels not in get_args(ChannelReduction):
            raise ValueError(f"channels: expected one of {get_args(ChannelReduction)}, got {channels!r}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.channels = channels
        self.batch_size = batch_size

    @abstractmethod
    def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
        """Captum's object for a function of images ``[N, C, H, W]`` to scores ``[N, K]``."""

    def options(self) -> dict[str, Any]:
        """Further arguments of its ``attribute``."""
        return {}

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps in the resolution of the image."""
        # captum's noise is in single precision
        explain = self.explainer(lambda pixels: subject.logits(pixels.to(image.dtype)))
        maps = [image.new_zeros(0, *image.shape[-2:])]
        for some, wanted in zip(rows.split(self.batch_size), concepts.split(self.batch_size), strict=True):
            pixels = image[some].detach().requires_grad_()
            maps.append(self.reduce(explain.attribute(pixels, target=wanted, **self.options()).detach()))
        return torch.cat(maps)

    def reduce(self, attribution: Tensor) -> Tensor:
        """``[P, C, H, W]`` to ``[P, H, W]``."""
        match self.channels:
            case "sum":
                return attribution.sum(1)
            case "abs_sum":
                return attribution.abs().sum(1)
            case _:
                return attribution.abs().amax(1)


def check_at_least(least: int, **values: int) -> None:
    """Check numbers of steps or samples.

    Raises:
        ValueError: One is below ``least``; the message names it.
    """
    for field, value in values.items():
        if value < least:
            raise ValueError(f"{field}: expected at least {least}, got {value}")
