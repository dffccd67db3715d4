"""Rendering: scenes in pieces of bounded memory to 8-bit pictures, part maps and what is left of each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cbm_lightning.data.birds.attributes import Group, Part
from cbm_lightning.data.birds.bird import draw
from cbm_lightning.data.birds.scene import Scene
from cbm_lightning.data.birds.style import Style
from cbm_lightning.randomness import Randomness

_PIECE = 128
_ENOUGH = 0.25


class Pictures(NamedTuple):
    """Rendered pictures.

    Attributes:
        colours: ``[N, 3, H, H]`` uint8.
        parts: ``[N, H, H]`` uint8, what each pixel shows.
        bare: ``[N, parts]`` pixels of each part before anything comes in front of the bird.
        left: ``[N, parts]`` pixels of each part in the end.
    """

    colours: Tensor
    parts: Tensor
    bare: Tensor
    left: Tensor


def render(scene: Scene, size: int, style: Style, randomness: Randomness) -> Pictures:
    """Render scenes at ``size`` pixels a side, restyled; rows of ``randomness`` are those of the scene."""
    number = len(scene)
    colours = torch.empty(number, 3, size, size, dtype=torch.uint8)
    parts = torch.empty(number, size, size, dtype=torch.uint8)
    bare, left = (torch.empty(number, len(Part), dtype=torch.long) for _ in range(2))
    for start in range(0, number, _PIECE):
        piece = slice(start, min(start + _PIECE, number))
        drawing = draw(scene.rows(piece), size)
        styled = style.apply(drawing.colours, randomness.rows(torch.arange(number)[piece]))
        colours[piece] = styled.mul_(255).round_().to(torch.uint8)
        parts[piece] = drawing.parts
        bare[piece], left[piece] = drawing.bare, drawing.left
    return Pictures(colours, parts, bare, left)


def visible_groups(bare: Tensor, left: Tensor, groups: Sequence[Group], hidden: Tensor) -> Tensor:
    """``[N, G]`` bool, whether enough of each group's parts is left to tell its value.

    Args:
        bare: ``[N, parts]`` pixels of each part before anything comes in front.
        left: ``[N, parts]`` pixels in the end.
        groups: Groups; one whose value draws nothing is looked for where it would be.
        hidden: ``[N]`` position of the group that is hidden, -1 for none.
    """
    columns = []
    for position, group in enumerate(groups):
        parts, host = list(group.parts), group.host
        own, own_left = bare[:, parts].sum(1), left[:, parts].sum(1)
        area = torch.where(own > 0, own, bare[:, host])
        area_left = torch.where(own > 0, own_left, left[:, host])
        columns.append((area_left >= _ENOUGH * area) & (hidden != position))
    return torch.stack(columns, dim=1)
