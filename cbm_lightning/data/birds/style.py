"""Shifts of style: the same birds under another hue, blur, noise, contrast or size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import ceil, cos, sin

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from cbm_lightning.randomness import Randomness


@dataclass(frozen=True)
class Style:
    """How pictures look, the defaults changing nothing.

    Args:
        hue: Rotation of all colours about grey, in radians.
        blur: Standard deviation of a Gaussian blur, in pixels.
        noise: Standard deviation of Gaussian pixel noise, colours being in [0, 1].
        contrast: Factor of the distance from middle grey.
        scale: Factor of the bird's size.

    Raises:
        ValueError: Blur, noise, contrast or scale is out of range.
    """

    hue: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    contrast: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("blur", "noise", "contrast"):
            if getattr(self, name) < 0:
                raise ValueError(f"style: expected {name} of at least 0, got {getattr(self, name)}")
        if not 0.2 <= self.scale <= 1.5:
            raise ValueError(f"style: expected a scale in [0.2, 1.5], got {self.scale}")

    @classmethod
    def make(cls, options: Mapping[str, float] | None) -> Style:
        """From a mapping of options.

        Raises:
            ValueError: An option is unknown; the message lists near matches.
        """
        known = [field.name for field in fields(cls)]
        for name in options or {}:
            if name not in known:
                raise ValueError(
                    f"style: no option {name!r}; did you mean {get_close_matches(name, known, 1) or known}?"
                )
        return cls(**(options or {}))

    def apply(self, colours: Tensor, randomness: Randomness) -> Tensor:
        """``[N, 3, H, W]`` colours in [0, 1], restyled but for the scale, which is a matter of drawing."""
        if self.hue:
            colours = torch.einsum("ij,njhw->nihw", _hue_rotation(self.hue), colours)
        if self.blur:
            colours = _blurred(colours, self.blur)
        if self.contrast != 1.0:
            colours = 0.5 + self.contrast * (colours - 0.5)
        if self.noise:
            colours = colours + self.noise * randomness.normal("noise", colours[0].numel()).reshape_as(colours)
        return colours.clamp(0, 1)


def _hue_rotation(angle: float) -> Tensor:
    """``[3, 3]`` rotation of RGB about the grey axis (Rodrigues' formula)."""
    axis = 3**-0.5
    cross = axis * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return cos(angle) * torch.eye(3) + sin(angle) * cross + (1 - cos(angle)) / 3


def _blurred(colours: Tensor, sigma: float) -> Tensor:
    reach = min(ceil(3 * sigma), colours.shape[-1] - 1)
    weights = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = pad(colours, [reach] * 4, mode="reflect")
    return conv2d(conv2d(padded, weights, groups=3), weights.mT.reshape(3, 1, -1, 1), groups=3)
