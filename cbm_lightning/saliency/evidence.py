"""What a batch knows of where its concepts are: masks, boxes or points."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cbm_lightning.types import Batch


class Evidence(NamedTuple):
    """Where concepts are to be seen.

    Attributes:
        masks: ``[B, K, H, W]`` bool, the pixels that show each concept, or None.
        points: ``[B, K, 2]`` a point ``(x, y)`` of each concept in pixels, NaN where it is not to be seen, or None.
    """

    masks: Tensor | None
    points: Tensor | None

    def shown(self) -> Tensor | None:
        """``[B, K]`` bool, which concepts are to be seen at all; None where nothing is known."""
        found = [] if self.masks is None else [self.masks.flatten(2).any(2)]
        found += [] if self.points is None else [~self.points.isnan().any(2)]
        return torch.stack(found).any(0) if found else None


def read_evidence(batch: Batch, num_concepts: int) -> Evidence:
    """Read ``concept_masks [B,K,h,w]`` or ``concept_boxes [B,K,4]``, and ``concept_points [B,K,2]``, as far as given.

    Masks of another size than the image are resized to it (to the nearest pixel), with a warning. Boxes are
    ``(x0, y0, x1, y1)`` in pixels of the image, the far edges not included; NaN where there is none.

    Args:
        batch: With the ``image [B, C, H, W]``.
        num_concepts: ``K``.

    Raises:
        ValueError: The shape of one does not fit, or there are masks and boxes.
    """
    count, (height, width) = len(batch["image"]), batch["image"].shape[-2:]
    masks, boxes, points = (batch.get(f"concept_{name}") for name in ("masks", "boxes", "points"))
    if masks is not None and boxes is not None:
        raise ValueError("concept_masks, concept_boxes: expected one of them, got both")
    if masks is not None:
        _check("concept_masks", masks, (count, num_concepts, None, None))
        # NaN, where there is no mask, is not above one half
        masks = masks if masks.dtype == torch.bool else masks > 0.5
        if masks.shape[-2:] != (height, width):
            warnings.warn(
                f"concept_masks are {list(masks.shape[-2:])} pixels and images {[height, width]}: the masks are "
                "resized to the nearest pixel",
                stacklevel=2,
            )
            masks = interpolate(masks.float(), (height, width), mode="nearest-exact") > 0.5
    elif boxes is not None:
        _check("concept_boxes", boxes, (count, num_concepts, 4))
        masks = _inside(boxes.float(), height, width)
    if points is not None:
        _check("concept_points", points, (count, num_concepts, 2))
        points = points.float()
        low, high = points.new_zeros(2), points.new_tensor([width, height])
        # the centre of the first pixel is 0, so its edge is half a pixel before that
        outside = ((points < low - 0.5) | (points >= high - 0.5)).any(2, keepdim=True)
        points = points.masked_fill(outside, torch.nan)
    return Evidence(masks, points)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """``[B, K, H, W]`` the pixels whose centres lie in boxes; none for NaN, which no comparison holds for."""
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    x0, y0, x1, y1 = boxes.unsqueeze(-1).unbind(2)
    across, down = (x > x0) & (x < x1), (y > y0) & (y < y1)
    return down.unsqueeze(3) & across.unsqueeze(2)


def _check(field: str, value: Any, shape: tuple[int | None, ...]) -> None:
    found = list(value.shape) if isinstance(value, Tensor) else None
    fits = found is not None and len(found) == len(shape)
    if not fits or any(want is not None and got != want for got, want in zip(found or (), shape, strict=False)):
        expected = ", ".join(str(size) if size else letter for size, letter in zip(shape, "BKHW", strict=False))
        raise ValueError(f"{field}: expected a tensor [{expected}], got {found or type(value).__name__}")
