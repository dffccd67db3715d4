"""Words for birds: captions of pictures, descriptions of classes and of their parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cbm_lightning.data.birds.attributes import Group
from cbm_lightning.randomness import Randomness

_TEMPLATES = ("a bird with {}", "a drawing of a bird with {}", "this bird has {}", "a small bird that has {}")


def mention(visible: Tensor, randomness: Randomness) -> Tensor:
    """``[N, G]`` bool, which groups a caption speaks of: about half of the visible ones, and at least one."""
    wanted = randomness.uniform("mention", visible.shape[1])
    # a number of their own keeps hidden groups last, where they serve only if nothing else is visible
    order = torch.where(visible, wanted, wanted + 1)
    return (visible & (wanted < 0.5)) | (order == order.min(1, keepdim=True).values)


def captions(groups: Sequence[Group], values: Tensor, mentioned: Tensor, index: Tensor) -> list[str]:
    """One sentence a picture.

    Args:
        groups: The groups.
        values: ``[N, G]``.
        mentioned: ``[N, G]`` bool from `mention`.
        index: ``[N]`` sample numbers, which choose the template.
    """
    rows = zip(values.tolist(), mentioned.tolist(), index.tolist(), strict=True)
    return [
        _TEMPLATES[number % len(_TEMPLATES)].format(listing(phrases(groups, value, said)))
        for value, said, number in rows
    ]


def phrases(groups: Sequence[Group], values: Sequence[int], said: Sequence[bool] | None = None) -> list[str]:
    """The values in words, all or those that are ``said``."""
    said = [True] * len(groups) if said is None else said
    return [group.phrases[value] for group, value, keep in zip(groups, values, said, strict=True) if keep]


def listing(items: Sequence[str]) -> str:
    """``"a, b and c"``."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1]]))
