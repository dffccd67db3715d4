"""Where CUB-200-2011 shows its concepts: which parts an attribute is about, and the point that this gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.data.images import ImageDataset
from cbm_lightning.types import Batch

_WINGS, _EYES, _LEGS = (("left " + part, "right " + part) for part in ("wing", "eye", "leg"))

PARTS_OF_GROUP: dict[str, tuple[str, ...]] = {
    "has_bill_shape": ("beak",),
    "has_bill_length": ("beak",),
    "has_bill_color": ("beak",),
    "has_crown_color": ("crown",),
    "has_forehead_color": ("forehead",),
    "has_nape_color": ("nape",),
    "has_throat_color": ("throat",),
    "has_eye_color": _EYES,
    "has_breast_pattern": ("breast",),
    "has_breast_color": ("breast",),
    "has_belly_pattern": ("belly",),
    "has_belly_color": ("belly",),
    "has_back_pattern": ("back",),
    "has_back_color": ("back",),
    "has_wing_shape": _WINGS,
    "has_wing_pattern": _WINGS,
    "has_wing_color": _WINGS,
    "has_leg_color": _LEGS,
    "has_tail_shape": ("tail",),
    "has_tail_pattern": ("tail",),
    # there is one point for the tail, whichever side of it the photograph shows
    "has_upper_tail_color": ("tail",),
    "has_under_tail_color": ("tail",),
    # a head has up to seven points, of which a pattern may be at any
    "has_head_pattern": (),
    # these are about several parts (back and wings, throat to tail) or about the whole bird
    "has_upperparts_color": (),
    "has_underparts_color": (),
    "has_primary_color": (),
    "has_size": (),
    "has_shape": (),
}
"""The parts that an attribute may be seen at, by what stands before ``::``; none where it is about no single part.

This is what the table of Furby et al. (2023) means. In their code nine of the 112 concepts have the parts of their
predecessor in the list, each the first of its group: the length of the bill is looked for at the eyes.
"""


def candidate_parts(attributes: Sequence[str], part_names: Sequence[str]) -> Tensor:
    """``[K, P]`` bool, the parts that each attribute may be seen at.

    Args:
        attributes: ``K`` names as in ``attributes.txt``; an unknown group has no parts.
        part_names: ``P`` names as in ``parts.txt``.
    """
    rows = [[part in PARTS_OF_GROUP.get(name.partition("::")[0], ()) for part in part_names] for name in attributes]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(attributes), len(part_names))


def concept_points(parts: Tensor, candidates: Tensor) -> Tensor:
    """The point of each concept, after Furby et al. (2023): that of its candidate part if exactly one is visible.

    Of two visible wings none is the place of the wing colour, and the concept has no point.

    Args:
        parts: ``[..., P, 3]`` ``(x, y, visible)``.
        candidates: ``[K, P]`` bool from `candidate_parts`.

    Returns:
        ``[..., K, 2]`` ``(x, y)`` as in ``parts``, NaN without a point.

    Example:
        >>> parts = torch.tensor([[4.0, 2.0, 1.0], [0.0, 0.0, 0.0], [7.0, 5.0, 1.0]])
        >>> concept_points(parts, torch.tensor([[True, True, False], [True, False, True]]))
        tensor([[4., 2.],
                [nan, nan]])
    """
    seen = candidates & (parts[..., 2] > 0).unsqueeze(-2)
    first = seen.int().argmax(-1, keepdim=True)
    return torch.take_along_dim(parts[..., :2], first, -2).masked_fill(seen.sum(-1, keepdim=True) != 1, torch.nan)


class CubImages(ImageDataset):
    """`ImageDataset` whose items with ``parts`` have ``concept_points [K, 2]`` beside them.

    They are in pixels of the transformed image. A concept without a point, or whose value in ``concepts`` is not above
    one half, has NaN: it is not to be seen, or not at one place. Parts that the transform cuts off are not visible.

    Args:
        args: Of `ImageDataset`.
        candidates: ``[K, P]`` bool, the ``parts`` that each concept may be seen at; None gives no points.
        options: Of `ImageDataset`.
    """

    def __init__(self, *args: Any, candidates: Tensor | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.candidates = candidates

    def __getitem__(self, index: int) -> Batch:
        item = super().__getitem__(index)
        if self.candidates is not None and "parts" in item:
            absent = ~(item["concepts"] > 0.5)
            item["concept_points"] = concept_points(item["parts"], self.candidates).masked_fill(
                absent[:, None], torch.nan
            )
        return item
