"""Four backgrounds: sky, forest, water and sand, each a blend of two colours by a pattern of a few waves."""

from __future__ import annotations

import torch
from torch import Tensor

_COLOURS = torch.tensor(
    [
        [[0.58, 0.77, 0.94], [0.94, 0.96, 0.98]],
        [[0.48, 0.66, 0.42], [0.27, 0.42, 0.27]],
        [[0.36, 0.68, 0.72], [0.62, 0.85, 0.84]],
        [[0.90, 0.81, 0.62], [0.77, 0.66, 0.47]],
    ]
)


def backgrounds(kind: Tensor, phases: Tensor, light: Tensor, size: int) -> Tensor:
    """``[N, H, H, 3]`` colours.

    Args:
        kind: ``[N]`` which of the four.
        phases: ``[N, 4]`` phases of the waves.
        light: ``[N, 3]`` factor of the colours.
        size: Pixels a side ``H``.
    """
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    pattern = torch.empty(len(kind), size, size)
    for number, texture in enumerate((_sky, _forest, _water, _sand)):
        rows = (kind == number).nonzero()[:, 0]
        waves = phases[rows][:, :, None, None].unbind(1)
        pattern[rows] = texture(axis[None, None, :], axis[None, :, None], *waves)
    pair = _COLOURS[kind] * light[:, None]
    return torch.lerp(pair[:, None, None, 0], pair[:, None, None, 1], pattern[..., None])


def _sky(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    clouds = (2.6 * x + a + (3 * y + c).sin()).sin() + (5.5 * y + b + (2 * x + d).sin()).sin()
    return (clouds - 0.9).clamp(0, 1) + 0.12 * (1 + y)


def _forest(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    trunks = (9 * x + a + 0.4 * (3 * y + c).sin()).sin()
    leaves = (13 * y + b).sin() * (11 * x + d).sin()
    return (2.5 * trunks - 1).clamp(0, 1) * 0.8 + 0.1 * (1 + leaves)


def _water(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    waves = (16 * y + a + 1.6 * (3.5 * x + b).sin() + (6 * x + c).sin()).sin()
    return (1.6 * waves - 0.5 + 0.2 * (d + y).sin()).clamp(0, 1)


def _sand(x: Tensor, y: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    ripples = (10 * (y + 0.5 * x) + a + 1.3 * (4 * x + b).sin()).sin()
    return 0.35 + 0.3 * ripples + 0.12 * (19 * x + c).sin() * (23 * y + d).sin()
