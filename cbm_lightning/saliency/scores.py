"""What measures of maps share: a score for every pair with its chance level, and which pairs are undefined."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From flat maps ``[p, H W]``, all finite, and what is true of them to their values and chance levels, each ``[p]``."""

# sorting these many with their places takes some 100 MB
_PIXELS_AT_ONCE = 1 << 21


class Scores(NamedTuple):
    """How well maps are placed.

    Attributes:
        values: ``[P]``, one a pair, NaN where undefined.
        chance: ``[P]``, what chance would score on these pairs, NaN where ``values`` is.
    """

    values: Tensor
    chance: Tensor


def check_maps(maps: Tensor) -> None:
    """Check the shape of maps.

    Raises:
        ValueError: They are not ``[P, H, W]``, or have no pixels.
    """
    if maps.ndim != 3 or 0 in maps.shape[1:]:
        raise ValueError(f"maps: expected [P, H, W] with pixels, got {list(maps.shape)}")


def over_pairs(measure: Measure, maps: Tensor, masks: Tensor) -> Scores:
    """The scores of maps against masks, undefined where a mask is empty.

    Args:
        measure: Told ``[p, H W]`` bool masks.
        maps: ``[P, H, W]``.
        masks: ``[P, H, W]`` bool or numbers (set above one half).

    Raises:
        ValueError: The maps are not ``[P, H, W]``, or the masks have another shape.
    """
    check_maps(maps)
    if masks.shape != maps.shape:
        raise ValueError(
            f"masks: expected the shape of the maps {list(maps.shape)}, got {list(masks.shape)}; visible_pairs of "
            "cbm_lightning.saliency brings maps to the size of the masks"
        )

    def of_shown(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        # NaN is not above one half
        shown = a.flatten(1) if a.dtype == torch.bool else a.flatten(1) > 0.5
        values, chance = measure(s, shown)
        return values.masked_fill(~shown.any(1), torch.nan), chance

    return in_chunks(of_shown, maps, masks)


def in_chunks(measure: Measure, maps: Tensor, truth: Tensor) -> Scores:
    """The scores of maps, undefined where one holds NaN or infinity; measured in chunks that memory holds.

    Args:
        measure: Told ``truth`` as it is.
        maps: ``[P, H, W]``.
        truth: ``[P, ...]``, what is true of each.
    """
    size = max(1, _PIXELS_AT_ONCE // maps[0].numel()) if len(maps) else 1
    parts = []
    for s, t in zip(maps.split(size), truth.split(size), strict=True):
        s = (s if s.dtype == torch.float64 else s.float()).flatten(1).contiguous()
        bad = ~s.isfinite().all(1)
        # NaN has no place in an order
        values, chance = measure(s.masked_fill(bad[:, None], 0.0), t)
        values = values.to(s.dtype).masked_fill(bad, torch.nan)
        parts.append(Scores(values, chance.to(s.dtype).masked_fill(values.isnan(), torch.nan)))
    return Scores(torch.cat([part.values for part in parts]), torch.cat([part.chance for part in parts]))
