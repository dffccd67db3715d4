"""A canvas for many pictures at once: shapes in closed form, evaluated on the pixels around them only."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

_FAINTEST = 0.05


class Pose(NamedTuple):
    """Where a thing is in its picture. Lengths are in half picture widths, y points down, angles are in radians.

    Attributes:
        picture: ``[M]`` which picture, each at most once.
        centre: ``[M, 2]`` its origin.
        scale: ``[M]`` its unit of length.
        angle: ``[M]`` how far it is turned.
        mirror: ``[M]`` 1 or, mirrored, -1.
    """

    picture: Tensor
    centre: Tensor
    scale: Tensor
    angle: Tensor
    mirror: Tensor


class Ink(NamedTuple):
    """What a shape does to pixels.

    Attributes:
        distance: ``[M, P]`` to the edge in the thing's own lengths, negative inside.
        tone: ``[M, P]`` factor of the colour.
    """

    distance: Tensor
    tone: Tensor


Shape = Callable[[Tensor, Tensor], Ink]
"""From x and y ``[M, P]`` in a thing's own frame to its ink there."""


class Canvas:
    """Pictures in the making: colours and, for each pixel, the part on top.

    Args:
        colours: ``[N, H, H, 3]`` backgrounds in [0, 1].

    Attributes:
        colours: ``[N * H * H, 3]``, painted over.
        parts: ``[N * H * H]`` uint8, zero for the background.
    """

    def __init__(self, colours: Tensor) -> None:
        self.size = colours.shape[1]
        self.colours = colours.reshape(-1, 3)
        self.parts = torch.zeros(len(self.colours), dtype=torch.uint8)

    def paint(
        self,
        shape: Shape,
        pose: Pose,
        around: tuple[float, float],
        radius: float,
        colour: Tensor,
        part: Tensor,
        opacity: Tensor | None = None,
    ) -> None:
        """Paint a shape over what is there, with smooth edges.

        Args:
            shape: The shape in its own frame.
            pose: Where that frame is.
            around: Centre, in that frame, of a circle outside of which the shape has no pixel.
            radius: Radius of the circle.
            colour: ``[M, 3]``.
            part: ``[M]`` uint8, what the part map says of pixels that the shape covers by half or more.
            opacity: ``[M]`` in [0, 1], one where None; what is nearly transparent is no part.
        """
        if not len(pose.picture):
            return
        index, x, y = self._window(pose, around, radius)
        distance, tone = shape(x, y)
        cover = (0.5 - distance * (pose.scale * self.size / 2)[:, None]).clamp_(0, 1)
        shown = cover > 0.5
        if opacity is not None:
            cover = cover * opacity[:, None]
            shown &= opacity[:, None] > _FAINTEST
        below = self.colours[index].reshape(*cover.shape, 3)
        self.colours[index] = below.lerp(colour[:, None] * tone[..., None], cover[..., None]).reshape(-1, 3)
        self.parts[index] = torch.where(shown, part[:, None], self.parts[index].reshape(shown.shape)).flatten()

    def _window(self, pose: Pose, around: tuple[float, float], radius: float) -> tuple[Tensor, Tensor, Tensor]:
        """The square of pixels around a circle: positions in the canvas, x and y in the frame of the pose."""
        side = min(self.size, ceil(radius * float(pose.scale.max()) * self.size) + 2)
        cos, sin = pose.angle.cos(), pose.angle.sin()
        right, down = around[0] * pose.mirror * pose.scale, around[1] * pose.scale
        place = torch.stack([cos * right - sin * down, sin * right + cos * down], dim=1) + pose.centre
        corner = ((place + 1) * self.size / 2 - side / 2).round().clamp(0, self.size - side).long()
        column, row = (corner[:, :, None] + torch.arange(side)).unbind(1)
        index = (pose.picture[:, None] * self.size + row)[:, :, None] * self.size + column[:, None]
        across = ((column + 0.5) * (2 / self.size) - 1 - pose.centre[:, :1]) / pose.scale[:, None]
        along = ((row + 0.5) * (2 / self.size) - 1 - pose.centre[:, 1:]) / pose.scale[:, None]
        x = (cos[:, None] * across)[:, None] + (sin[:, None] * along)[:, :, None]
        y = (cos[:, None] * along)[:, :, None] - (sin[:, None] * across)[:, None]
        return index.flatten(), (x * pose.mirror[:, None, None]).flatten(1), y.flatten(1)


def ellipse(x: Tensor, y: Tensor, a: float, b: float) -> Tensor:
    """Distance to an ellipse around the origin with half axes ``a`` and ``b``: exact on the edge, close near it."""
    u, v = x / a, y / b
    level = (u.square() + v.square()).sqrt()
    return level * (level - 1) / ((u / a).square() + (v / b).square()).sqrt().clamp(min=1e-6)


def taper(x: Tensor, y: Tensor, length: Tensor, width: Tensor, curve: Tensor) -> Tensor:
    """Distance to a spike along x from the origin: half ``width [M]`` at its foot, bent towards y by ``curve [M]``."""
    along = x / length.clamp(min=1e-3)[:, None]
    middle = curve[:, None] * along.clamp(0, 1).square()
    side = (y - middle).abs() - width[:, None] * (1 - along.clamp(0, 1))
    return torch.maximum(side, torch.maximum(-x, x - length[:, None]))


def turn(x: Tensor, y: Tensor, angle: Tensor | float, at: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame at ``at`` whose x axis is turned by ``angle`` (``[M, 1]`` or a number)."""
    angle = torch.as_tensor(angle)
    cos, sin = angle.cos(), angle.sin()
    x, y = x - at[0], y - at[1]
    return cos * x + sin * y, cos * y - sin * x
