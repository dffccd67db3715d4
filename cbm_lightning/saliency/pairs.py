"""Which maps are measured, against what: the pairs of an image and a concept that it shows."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

Upsampling = Literal["bilinear", "bicubic", "nearest"]


class Pairs(NamedTuple):
    """Pairs of an image and a concept, the maps in the resolution of the masks.

    Attributes:
        maps: ``[P, H, W]`` signed saliency.
        masks: ``[P, H, W]`` bool, the pixels that show the concept.
        rows: ``[P]`` int64, which image of the batch.
        concepts: ``[P]`` int64, which concept.
    """

    maps: Tensor
    masks: Tensor
    rows: Tensor
    concepts: Tensor


def visible_pairs(maps: Tensor, masks: Tensor, counted: Tensor | None = None, mode: Upsampling = "bilinear") -> Pairs:
    """The pairs whose concept is to be seen: at least one pixel of its mask is set.

    Args:
        maps: ``[B, K, h, w]`` saliency in any resolution.
        masks: ``[B, K, H, W]`` bool or numbers (set above one half); NaN where there is no mask.
        counted: ``[B, K]`` bool, the pairs that count; all by default.
        mode: How maps are brought to the size of the masks, see `upsample`.

    Raises:
        ValueError: Maps and masks differ in images or concepts, or ``counted`` does not fit.

    Example:
        >>> maps, masks = torch.rand(2, 3, 4, 4), torch.zeros(2, 3, 8, 8)
        >>> masks[0, 1, 2:4, 2:4] = 1
        >>> pairs = visible_pairs(maps, masks)
        >>> pairs.maps.shape, pairs.rows.tolist(), pairs.concepts.tolist()
        (torch.Size([1, 8, 8]), [0], [1])
    """
    if maps.ndim != 4 or masks.ndim != 4 or maps.shape[:2] != masks.shape[:2]:
        raise ValueError(
            f"maps, masks: expected [B, K, h, w] and [B, K, H, W], got {list(maps.shape)} and {list(masks.shape)}"
        )
    # NaN is not above one half
    shown = masks if masks.dtype == torch.bool else masks > 0.5
    wanted = shown.flatten(2).any(2)
    if counted is not None:
        if counted.dtype != torch.bool or counted.shape != wanted.shape:
            raise ValueError(f"counted: expected bool {list(wanted.shape)}, got {counted.dtype} {list(counted.shape)}")
        wanted = wanted & counted
    rows, concepts = wanted.nonzero(as_tuple=True)
    size = (masks.shape[-2], masks.shape[-1])
    return Pairs(upsample(maps[rows, concepts], size, mode), shown[rows, concepts], rows, concepts)


def upsample(maps: Tensor, size: tuple[int, int], mode: Upsampling = "bilinear") -> Tensor:
    """Maps ``[..., h, w]`` in another resolution ``[..., H, W]``.

    Args:
        maps: Saliency; corners of cells, not their centres, lie at the corners of the image (``align_corners=False``).
        size: ``(H, W)``.
        mode: ``"bilinear"``, ``"bicubic"`` (overshoots below zero and above the largest value) or ``"nearest"``.
    """
    if maps.shape[-2:] == size:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).to(torch.promote_types(maps.dtype, torch.float32))
    exact = {} if mode == "nearest" else {"align_corners": False}
    if not len(flat):
        return flat.new_zeros(*maps.shape[:-2], *size)
    return interpolate(flat, size, mode=mode, **exact).reshape(*maps.shape[:-2], *size)
