"""Does a map look where the concept is? Measures of where saliency lies, each with its chance level beside it.

All work on pairs of an image and a concept, as `cbm_lightning.saliency.pairs.visible_pairs` makes them: ``maps
[P, H, W]`` signed saliency of any real type, ``masks [P, H, W]`` bool or numbers (set above one half), and return
`Scores`. What the measures share:

- A pair is undefined, so NaN and never a hit, if its mask is empty or its map holds NaN or infinity.
- The order of pixels is by signed saliency, the largest first, equal ones in raster order.
- Shares of saliency are of its positive part: negative saliency speaks against the concept and counts as zero. They are
  undefined for a map without a positive pixel.
- Chance is what a map that knows nothing of the mask scores on average: the same numbers in random places.
- A ``ValueError`` names what does not fit: maps that are not ``[P, H, W]``, or masks of another shape.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.saliency.scores import Scores, check_maps, in_chunks, over_pairs

Overlap = Literal["iou", "dice", "precision"]

_ROUNDING = 1e-6
_EULER = 0.5772156649015329


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0.0) -> Scores:
    """Whether the largest pixel lies in the mask, 0 or 1 (Zhang et al. 2016, who allow 15 pixels).

    Of several largest pixels the first in raster order counts, not the one that hits. Chance is the area of the mask
    with all that lies within the tolerance.

    Args:
        maps: ``[P, H, W]``.
        masks: ``[P, H, W]``.
        tolerance: A pixel this far (Euclidean, in pixels) from the mask still hits.

    Raises:
        ValueError: A shape does not fit, or the tolerance is negative or not finite.

    Example:
        >>> maps, masks = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
        >>> maps[0, 0, 0], masks[0, 0, 2] = 1.0, 1.0
        >>> [pointing_game(maps, masks, tolerance).values.item() for tolerance in (0, 2)]
        [0.0, 1.0]
    """
    check_tolerance(tolerance)

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        near = _dilated(a.unflatten(1, maps.shape[1:]), tolerance).flatten(1) if tolerance >= 1 else a
        return near.gather(1, s.argmax(1, keepdim=True))[:, 0].to(s.dtype), _area(near, s)

    return over_pairs(measure, maps, masks)


def energy_in_mask(maps: Tensor, masks: Tensor) -> Scores:
    """Share of the positive saliency inside the mask, in [0, 1] (energy-based pointing game, Wang et al. 2020).

    Also known as relevance mass accuracy and attribution localisation. Chance is the area of the mask.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -9.0]]])
        >>> energy_in_mask(maps, torch.tensor([[[True, False], [False, True]]]))
        Scores(values=tensor([0.7500]), chance=tensor([0.5000]))
    """

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        share = _positive(s)
        return (share * a).sum(1) / share.sum(1), _area(a, s)

    return over_pairs(measure, maps, masks)


def rank_accuracy(maps: Tensor, masks: Tensor) -> Scores:
    """Share of the top pixels, as many as the mask has, that lie in it, in [0, 1] (Arras et al. 2022).

    Chance is the area of the mask.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -9.0]]])
        >>> rank_accuracy(maps, torch.tensor([[[True, False], [False, True]]])).values
        tensor([0.5000])
    """

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        size = a.sum(1, keepdim=True)
        among_top = torch.arange(s.shape[1], device=s.device) < size
        return (_top_first(s, a) & among_top).sum(1).to(s.dtype) / size[:, 0], _area(a, s)

    return over_pairs(measure, maps, masks)


def top_k_intersection(maps: Tensor, masks: Tensor, k: int) -> Scores:
    """Share of the top ``k`` pixels that lie in the mask, in [0, 1] (Theiner et al. 2022).

    Chance is the area of the mask; values divided by chance are the variant called concept influence.

    Raises:
        ValueError: A shape does not fit, or ``k`` is not a number of pixels from 1 to ``H W``.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -9.0]]])
        >>> top_k_intersection(maps, torch.tensor([[[True, False], [False, True]]]), k=1).values
        tensor([1.])
    """
    check_maps(maps)
    pixels = math.prod(maps.shape[1:])
    if not 1 <= k <= pixels:
        raise ValueError(f"k: expected a number of pixels from 1 to {pixels} (all of a map), got {k}")

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return _top_first(s, a)[:, :k].sum(1).to(s.dtype) / k, _area(a, s)

    return over_pairs(measure, maps, masks)


def iou_at_mass(maps: Tensor, masks: Tensor, mass: float) -> Scores:
    """Overlap of the mask with the top pixels that hold a share of the positive saliency, in [0, 1].

    The top pixels are the smallest set that holds the share (up to one millionth, which is rounding), with all that
    equal the last of them. Chance puts the expected intersection with a random set of the same size into the formula,
    which is slightly less than the expected overlap.

    Args:
        maps: ``[P, H, W]``.
        masks: ``[P, H, W]``.
        mass: The share of the positive saliency, in (0, 1].

    Raises:
        ValueError: A shape does not fit, or the mass is not in (0, 1].

    Example:
        >>> maps = torch.tensor([[[5.0, 3.0], [2.0, -9.0]]])
        >>> iou_at_mass(maps, torch.tensor([[[True, False], [False, True]]]), mass=0.75).values
        tensor([0.3333])
    """
    check_mass(mass)

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        share = _positive(s)
        ordered = share.sort(1, descending=True).values
        # whole numbers: a running sum of floats depends on the order of its terms, which CUDA does not promise
        running = (ordered * 2.0 ** (62 - s.shape[1].bit_length())).round().long().cumsum(1)
        held = running.to(s.dtype) / running[:, -1:].to(s.dtype)
        last = (held < mass - _ROUNDING).sum(1, keepdim=True).clamp(max=s.shape[1] - 1)
        threshold = ordered.gather(1, last)
        # of a map without positive saliency no pixel is chosen
        return _overlap(((share >= threshold) & (threshold > 0)).to(s.dtype), a, "iou")

    return over_pairs(measure, maps, masks)


def half_max_overlap(maps: Tensor, masks: Tensor, kind: Overlap = "iou", soft: bool = False) -> Scores:
    """Overlap of the mask with the pixels above half the maximum, in [0, 1] (SL-CBM, 2026).

    Positive saliency ``S`` divided by its maximum counts as 1 above one half and as 0 below it (exactly one half stays
    one half). With ``I = sum(S A)``: ``"iou"`` is ``I / sum(max(S, A))``, ``"dice"`` is ``2 I / (sum(S) + sum(A))``,
    ``"precision"`` is ``I / sum(S)``. The official code adds 1e-10 to both sides of each fraction and so calls an empty
    mask under an empty map a perfect match; here both are undefined. Chance puts the expected ``I`` of ``S`` in random
    places into the formula: exact for Dice and precision, slightly less than the expected overlap for IoU.

    Args:
        maps: ``[P, H, W]``.
        masks: ``[P, H, W]``.
        kind: Which overlap.
        soft: Leave ``S`` as it is, without the cut at one half.

    Raises:
        ValueError: A shape does not fit, or the kind is unknown.

    Example:
        >>> maps = torch.tensor([[[5.0, 3.0], [2.0, -9.0]]])
        >>> half_max_overlap(maps, torch.tensor([[[True, False], [False, True]]]), "precision").values
        tensor([0.5000])
    """
    check_kind(kind)

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        share = _positive(s)
        if not soft:
            share = torch.where(share == 0.5, share, (share > 0.5).to(s.dtype))
        return _overlap(share, a, kind)

    return over_pairs(measure, maps, masks)


def pixel_auroc(maps: Tensor, masks: Tensor) -> Scores:
    """Probability that a pixel of the mask has more saliency than one outside (ties count half), in [0, 1].

    The area under the ROC curve of pixels. Undefined for a mask that covers everything; chance is one half.

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [1.0, -9.0]]])
        >>> pixel_auroc(maps, torch.tensor([[[False, True], [False, False]]])).values
        tensor([0.5000])
    """

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ordered, order = s.sort(1)
        # twice the mean rank of ties is a whole number, and sums of those are exact
        twice_rank = torch.searchsorted(ordered, ordered) + torch.searchsorted(ordered, ordered, right=True) + 1
        inside = a.sum(1)
        outside = s.shape[1] - inside
        twice_won = (twice_rank * a.gather(1, order)).sum(1) - inside * (inside + 1)
        values = twice_won.to(s.dtype) / (2 * inside * outside)
        return values, torch.full_like(values, 0.5)

    return over_pairs(measure, maps, masks)


def pixel_average_precision(maps: Tensor, masks: Tensor) -> Scores:
    """Mean precision at the pixels of the mask, from the largest saliency down (tied ones together), in [0, 1].

    Undefined for a mask that covers everything. Chance is the expectation over random orders of the pixels, which
    exceeds the area of the mask a little in small maps (Bestgen 2015).

    Example:
        >>> maps = torch.tensor([[[3.0, 1.0], [0.0, -9.0]]])
        >>> pixel_average_precision(maps, torch.tensor([[[True, False], [True, False]]])).values
        tensor([0.8333])
    """
    check_maps(maps)
    pixels = math.prod(maps.shape[1:])
    harmonic = float(torch.digamma(torch.tensor(pixels + 1.0, dtype=torch.float64))) + _EULER

    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        ordered, order = (-s).sort(1)
        hits = a.gather(1, order)
        # as many pixels have at least this saliency
        reached = torch.searchsorted(ordered, ordered, right=True)
        precision = hits.cumsum(1).gather(1, reached - 1).to(s.dtype) / reached
        inside = a.sum(1)
        values = (precision * hits).sum(1) / inside
        others = (inside - 1).to(s.dtype) / max(pixels - 1, 1)
        chance = others + (1 - others) * (harmonic / pixels)
        return values.masked_fill(inside == pixels, torch.nan), chance

    return over_pairs(measure, maps, masks)


def keypoint_distance(maps: Tensor, points: Tensor, normalised: bool = False) -> Scores:
    """Distance from the largest pixel (the first in raster order) to a keypoint, the smaller the better.

    Chance is the mean distance of all pixels to the point, exactly. Comes from the evaluation of CUB's parts by Furby
    et al. (2023).

    Args:
        maps: ``[P, H, W]``.
        points: ``[P, 2]``, ``(x, y)`` in pixels of the map: the pixel in row 2 and column 5 is ``(5, 2)``. Undefined
            where a point is NaN (invisible) or infinite.
        normalised: In units of the diagonal ``sqrt(H^2 + W^2)``, to compare images of several sizes, not in pixels.

    Raises:
        ValueError: A shape does not fit.

    Example:
        >>> maps = torch.zeros(1, 8, 8)
        >>> maps[0, 2, 5] = 1.0
        >>> keypoint_distance(maps, torch.tensor([[5.0, 6.0]])).values
        tensor([4.])
    """
    check_maps(maps)
    if points.shape != (len(maps), 2):
        raise ValueError(f"points: expected [{len(maps)}, 2], (x, y) for every map, got {list(points.shape)}")
    height, width = maps.shape[1:]
    unit = math.hypot(height, width) if normalised else 1.0

    def measure(s: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(s.shape[1], device=s.device)
        x, y = place % width, place.div(width, rounding_mode="floor")
        p = p.to(s.dtype)
        distance = ((x - p[:, :1]) ** 2 + (y - p[:, 1:]) ** 2).sqrt() / unit
        values = distance.gather(1, s.argmax(1, keepdim=True))[:, 0]
        return values.masked_fill(~p.isfinite().all(1), torch.nan), distance.mean(1)

    return in_chunks(measure, maps, points)


def check_tolerance(tolerance: float) -> float:
    """The tolerance of `pointing_game`; a ``ValueError`` if it is none."""
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: expected a number of pixels from 0, got {tolerance}")
    return tolerance


def check_mass(mass: float) -> float:
    """The mass of `iou_at_mass`; a ``ValueError`` if it is none."""
    if not 0 < mass <= 1:
        raise ValueError(f"mass: expected a share in (0, 1], got {mass}")
    return mass


def check_kind(kind: Overlap) -> Overlap:
    """The kind of `half_max_overlap`; a ``ValueError`` if it is unknown."""
    if kind not in get_args(Overlap):
        raise ValueError(f"kind: expected 'iou', 'dice' or 'precision', got {kind!r}")
    return kind


def _area(a: Tensor, like: Tensor) -> Tensor:
    """Share of the pixels in a mask."""
    return a.sum(1).to(like.dtype) / a.shape[1]


def _positive(s: Tensor) -> Tensor:
    """The positive part divided by its maximum, so that sums neither overflow nor vanish; zeros where all is zero."""
    s = s.clamp(min=0)
    top = s.amax(1, keepdim=True)
    return s / top.where(top > 0, 1.0)


def _top_first(s: Tensor, a: Tensor) -> Tensor:
    """Whether a pixel lies in the mask, from the largest saliency down."""
    return a.gather(1, s.sort(dim=1, descending=True, stable=True).indices)


def _overlap(share: Tensor, a: Tensor, kind: Overlap) -> tuple[Tensor, Tensor]:
    """Overlap of ``share`` in [0, 1] with a mask and its chance level, NaN where all shares are zero."""
    size, area = share.sum(1), a.sum(1).to(share.dtype)

    def of(inside: Tensor) -> Tensor:
        if kind == "iou":
            # max(S, A) is S + A - S A where A is 0 or 1
            value = inside / (size + area - inside)
        else:
            value = 2 * inside / (size + area) if kind == "dice" else inside / size
        return value.masked_fill(size == 0, torch.nan)

    return of((share * a).sum(1)), of(size * area / a.shape[1])


def _dilated(masks: Tensor, tolerance: float) -> Tensor:
    """``[p, H, W]``, the pixels within a Euclidean distance of a mask: runs along rows, then shifted between rows."""
    height, width = masks.shape[1:]
    before = torch.nn.functional.pad(masks.cumsum(2, dtype=torch.int32), (1, 0))
    column = torch.arange(width, device=masks.device)
    near = torch.zeros_like(masks)
    tolerance = min(tolerance, height + width)
    for shift in range(min(int(tolerance), height - 1) + 1):
        reach = math.isqrt(int(tolerance**2 - shift**2))
        run = before[..., (column + reach + 1).clamp(max=width)] > before[..., (column - reach).clamp(min=0)]
        near[:, shift:] |= run[:, : height - shift]
        near[:, : height - shift] |= run[:, shift:]
    return near
