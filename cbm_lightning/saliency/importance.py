"""Which concepts matter to a model, and whether these are in the image, and where it looks (Aysel et al. 2025).

The formulas of "Concept-Based Explainable Artificial Intelligence: Metrics and Benchmarks" (arXiv 2501.19271) were
taken from a secondary description and agree with the abstract; check them against the paper before citing numbers made
here. What the paper abbreviates to CEM is called concept existence: CEM is also the concept embedding model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cbm_lightning.saliency.pairs import Upsampling, upsample

Per = Literal["concept", "class"]

# a centred vector this small beside the vector it came from is rounding, and its direction means nothing
_CONSTANT = 1e-5
# maps are compared in parts of at most this many pixels
_PIXELS_AT_ONCE = 1 << 24


class GlobalImportance(NamedTuple):
    """Cosines in [-1, 1] with the frequency of concepts in classes; NaN where a vector is missing or has no direction.

    Attributes:
        cgim1: ``[K]`` (or ``[L]``) of the weights of the head.
        cgim2: Of the mean predicted scores.
        cgim3: Of weights times mean scores, that is of contributions.
    """

    cgim1: Tensor
    cgim2: Tensor
    cgim3: Tensor


def concept_global_importance(
    weight: Tensor, frequency: Tensor, scores: Tensor, center: bool = False, per: Per = "concept"
) -> GlobalImportance:
    """Do concepts weigh in the classes in which they occur (CGIM 1 to 3)?

    Each is the cosine of two vectors over classes, one of them the frequency of the concept. A class whose frequency or
    whose scores are NaN is left out of the cosines that read them. Raw frequencies are never negative, which lifts the
    cosines of all that is not negative either: compare with `global_importance_chance`, or centre.

    Args:
        weight: ``[L, K]`` of the label head.
        frequency: ``[L, K]`` in [0, 1], how often a class shows a concept; NaN where that is not known.
        scores: ``[L, K]`` mean predicted score of the concept over the correctly classified samples of a class; NaN
            for a class without any.
        center: Take the mean off both vectors first; the cosine is then a correlation.
        per: ``"concept"`` for vectors over classes, ``"class"`` for vectors over concepts.

    Raises:
        ValueError: Shapes differ, a number is infinite, a weight NaN, or a frequency outside [0, 1].

    Example:
        >>> frequency = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> concept_global_importance(frequency * 2, frequency, frequency - 0.5).cgim1
        tensor([1., 1.])
    """
    return GlobalImportance(*(c.diagonal().clone() for c in _all_cosines(weight, frequency, scores, center, per)))


def global_importance_chance(
    weight: Tensor, frequency: Tensor, scores: Tensor, center: bool = False, per: Per = "concept"
) -> GlobalImportance:
    """What `concept_global_importance` would be of a model that took each concept for another.

    Returns:
        The mean cosine of each concept's vector with the frequencies of all other concepts (of each class's with those
        of all other classes), NaN if there is no other.

    Example:
        >>> frequency = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> global_importance_chance(frequency * 2, frequency, frequency - 0.5).cgim1
        tensor([0., 0.])
    """
    found = _all_cosines(weight, frequency, scores, center, per)
    return GlobalImportance(*(c.clone().fill_diagonal_(torch.nan).nanmean(1) for c in found))


def local_importance(weight: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
    """How much each concept adds to the logit of a class.

    Args:
        weight: ``[L, K]`` of the label head.
        scores: ``[B, K]`` what the head reads.
        classes: ``[B]`` class indices, as a rule the predicted ones.

    Returns:
        ``[B, K]``, signed.

    Raises:
        ValueError: Shapes do not fit, or a class index is out of range.

    Example:
        >>> local_importance(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([0]))
        tensor([[ 0.5000, -0.5000]])
    """
    if weight.ndim != 2:
        raise ValueError(f"weight: expected [L, K], got {list(weight.shape)}")
    if scores.ndim != 2 or scores.shape[1] != weight.shape[1]:
        raise ValueError(f"scores: expected [B, {weight.shape[1]}], got {list(scores.shape)}")
    check_classes(classes, "classes", len(scores), len(weight))
    return weight[classes] * scores


def concept_existence(importance: Tensor, present: Tensor, top: int = 5) -> Tensor:
    """Share of the most important concepts that the image shows (concept existence, CEM in the paper).

    Args:
        importance: ``[B, K]`` from `local_importance`; of equal ones the first counts as more important.
        present: ``[B, K]`` annotations of images (not of classes), present from one half; NaN where not known.
        top: Number of most important concepts, all if there are fewer.

    Returns:
        ``[B]`` share of those of the ``top`` concepts that are annotated, NaN if none is.

    Raises:
        ValueError: Shapes differ, importance is not finite, annotations lie outside [0, 1], or ``top`` is below 1.

    Example:
        >>> concept_existence(torch.tensor([[0.9, 0.1, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]]), top=2)
        tensor([0.5000])
    """
    shown, known = _annotations(importance, present, top)
    first = importance.argsort(dim=1, descending=True, stable=True)[:, :top]
    return _real(shown.gather(1, first).sum(1), importance) / known.gather(1, first).sum(1)


def concept_density(present: Tensor) -> Tensor:
    """``[B]`` share of annotated concepts that an image shows, NaN without any: what `concept_existence` has by chance.

    Args:
        present: ``[B, K]`` annotations, present from one half; NaN where not known.
    """
    return (present >= 0.5).sum(1) / (~present.isnan()).sum(1)


def concept_location(
    maps: Tensor,
    points: Tensor,
    importance: Tensor,
    present: Tensor,
    top: int = 3,
    alpha: float = 3,
    parts: int = 12,
    size: tuple[int, int] | None = None,
    mode: Upsampling = "bilinear",
) -> Tensor:
    """Share of the most important present concepts whose point lies where the map is most active (CLM).

    The most active pixels are ``alpha / parts`` of all, rounded down but at least one; of equally active ones those
    first in raster order. A map that is the same everywhere, or holds NaN, points nowhere and does not count. By chance
    the share is ``alpha / parts``.

    Args:
        maps: ``[B, K, h, w]`` saliency; more is more active.
        points: ``[B, K, 2]`` ``(x, y)`` where the concept is in the image, in pixels of ``size`` with pixel centres at
            whole numbers; NaN where it is not to be seen.
        importance: ``[B, K]`` from `local_importance`; of equal ones the first counts as more important.
        present: ``[B, K]`` annotations, present from one half; NaN where not known.
        top: Number of most important concepts among those that are present and have a point.
        alpha: The area in which a point must lie, in parts of the image; the paper takes 1, 3 and 6.
        parts: In how many parts the image is thought of; 12 are the parts of birds in CUB, left and right as one.
        size: ``(H, W)`` of the image, to which maps are brought; that of the maps by default.
        mode: How, see `upsample`.

    Returns:
        ``[B]``, NaN for an image without a present concept that has a point and a map.

    Raises:
        ValueError: Shapes differ, a number is out of range, or a point lies outside the image.

    Example:
        >>> maps = torch.arange(24.0).reshape(1, 2, 3, 4)
        >>> points = torch.tensor([[[3.0, 2.0], [0.0, 0.0]]])
        >>> concept_location(maps, points, importance=torch.rand(1, 2), present=torch.ones(1, 2))
        tensor([0.5000])
    """
    check_area(alpha, parts)
    shown, _ = _annotations(importance, present, top)
    height, width = size = _image_size(maps, points, importance, size)
    candidates = shown & ~points.isnan().any(2)
    first = importance.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :top]
    rows, slots = candidates.gather(1, first).nonzero(as_tuple=True)
    concepts = first[rows, slots]
    x, y = (points[rows, concepts] + 0.5).floor().long().unbind(1)
    quota = max(1, int(alpha * height * width / parts))

    hits = _real(maps.new_full(first.shape, torch.nan), maps)
    for part in torch.arange(len(rows), device=maps.device).split(max(1, _PIXELS_AT_ONCE // (height * width))):
        flat = upsample(maps[rows[part], concepts[part]], size, mode).flatten(1)
        found = _among_most_active(flat, (y * width + x)[part], quota)
        hits[rows[part], slots[part]] = found.to(hits.dtype)
    return hits.nanmean(1)


def concept_activation_maps(tokens: Tensor, vectors: Tensor) -> Tensor:
    """Where tokens point the way of a concept (CoAM): the product of both, as a mean over channels.

    The mean of a map over its cells is the score of a linear concept on pooled tokens, divided by ``D``.

    Args:
        tokens: ``[B, h, w, D]`` features before pooling.
        vectors: ``[K, D]``, one a concept.

    Returns:
        ``[B, K, h, w]``.

    Raises:
        ValueError: Widths differ.
    """
    if tokens.ndim != 4 or vectors.ndim != 2 or tokens.shape[3] != vectors.shape[1]:
        raise ValueError(
            f"tokens, vectors: expected [B, h, w, D] and [K, D], got {list(tokens.shape)} and {list(vectors.shape)}"
        )
    return torch.einsum("bhwd,kd->bkhw", tokens, vectors) / vectors.shape[1]


def check_top(top: int) -> None:
    """Raise a ValueError unless ``top`` is at least 1."""
    if top < 1:
        raise ValueError(f"top: expected at least 1 concept, got {top}")


def check_area(alpha: float, parts: int) -> None:
    """Raise a ValueError unless ``alpha`` of ``parts`` is a share in (0, 1]."""
    if not 0 < alpha <= parts:
        raise ValueError(f"alpha, parts: expected 0 < alpha <= parts, got {alpha} and {parts}")


def check_classes(classes: Tensor, field: str, samples: int, num_classes: int) -> None:
    """Raise a ValueError that names ``field`` unless it holds ``[samples]`` class indices."""
    if classes.shape != (samples,) or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"{field}: expected [{samples}] class indices, got {list(classes.shape)} of {classes.dtype}")
    if bool(((classes < 0) | (classes >= num_classes)).any()):
        raise ValueError(
            f"{field}: expected class indices from 0 to {num_classes - 1}, got {int(classes.min())} to "
            f"{int(classes.max())}"
        )


def images_that_count(found: Tensor, counted: Tensor | None) -> Tensor:
    """``[B]`` bool, images with a value that are also ``counted``.

    Raises:
        ValueError: ``counted`` is not ``[B]`` bool.
    """
    if counted is None:
        return ~found.isnan()
    if counted.shape != found.shape or counted.dtype != torch.bool:
        raise ValueError(f"counted: expected [{len(found)}] bool, got {list(counted.shape)} of {counted.dtype}")
    return counted & ~found.isnan()


def _real(x: Tensor, like: Tensor) -> Tensor:
    """In double precision if ``like`` is, otherwise in single."""
    return x.double() if like.dtype == torch.float64 else x.float()


def _annotations(importance: Tensor, present: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """``[B, K]`` bool each: which concepts are shown, and of which this is known."""
    check_top(top)
    if importance.ndim != 2 or present.shape != importance.shape:
        raise ValueError(
            f"importance, present: expected [B, K] both, got {list(importance.shape)} and {list(present.shape)}"
        )
    if not bool(importance.isfinite().all()):
        raise ValueError("importance: expected finite numbers, got NaN or infinity")
    if bool(((present < 0) | (present > 1)).any()):
        raise ValueError("present: expected annotations in [0, 1] or NaN, got others; leave real concepts out as NaN")
    return present >= 0.5, ~present.isnan()


def _image_size(maps: Tensor, points: Tensor, importance: Tensor, size: tuple[int, int] | None) -> tuple[int, int]:
    """``(H, W)`` of the images, in which all points must lie."""
    if maps.ndim != 4 or maps.shape[:2] != importance.shape:
        raise ValueError(f"maps: expected [B, K, h, w] of [B, K] {list(importance.shape)}, got {list(maps.shape)}")
    if points.shape != (*importance.shape, 2) or not points.is_floating_point():
        raise ValueError(
            f"points: expected floats {[*importance.shape, 2]}, got {list(points.shape)} of {points.dtype}"
        )
    height, width = (maps.shape[2], maps.shape[3]) if size is None else size
    x, y = points.unbind(2)
    # not to be seen is not outside: NaN is neither below nor above
    outside = (x < -0.5) | (x >= width - 0.5) | (y < -0.5) | (y >= height - 0.5)
    if bool(outside.any()):
        x, y = points[outside][0].tolist()
        raise ValueError(
            f"points: expected (x, y) in an image {width} wide and {height} high, or NaN, got ({x:g}, {y:g})"
        )
    return height, width


def _among_most_active(maps: Tensor, position: Tensor, quota: int) -> Tensor:
    """``[P]`` 1 where a pixel of ``[P, H*W]`` maps is among the ``quota`` most active, 0 if not, NaN for flat maps."""
    value = maps.gather(1, position[:, None])
    earlier = torch.arange(maps.shape[1], device=maps.device) < position[:, None]
    ahead = ((maps > value) | ((maps == value) & earlier)).sum(1)
    points_somewhere = maps.isfinite().all(1) & (maps.amax(1) > maps.amin(1))
    return torch.where(points_somewhere, (ahead < quota).float(), torch.nan)


def _all_cosines(weight: Tensor, frequency: Tensor, scores: Tensor, center: bool, per: Per) -> list[Tensor]:
    """The three matrices ``[K, K]`` (``[L, L]``) of cosines of what the model holds with frequencies."""
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {get_args(Per)}, got {per!r}")
    if weight.ndim != 2 or frequency.shape != weight.shape or scores.shape != weight.shape:
        shapes = [list(x.shape) for x in (weight, frequency, scores)]
        raise ValueError(f"weight, frequency, scores: expected [L, K] all three, got {shapes}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got NaN or infinity")
    if bool(((frequency < 0) | (frequency > 1)).any()):
        raise ValueError("frequency: expected shares in [0, 1] or NaN, got others")
    if bool(scores.isinf().any()):
        raise ValueError("scores: expected finite numbers or NaN, got infinity")
    # small and summed once: on the CPU in double precision, which some devices lack
    theta, v, u = (x.detach().cpu().double() for x in (weight, frequency, scores))
    if per == "class":
        theta, v, u = theta.T, v.T, u.T
    return [_real(_cosines(x, v, center), weight).to(weight.device) for x in (theta, u, theta * u)]


def _cosines(x: Tensor, y: Tensor, center: bool) -> Tensor:
    """``[I, J]`` cosine of each column of ``x`` with each of ``y``, over the rows where neither is NaN."""
    both = [(~z.isnan()).double() for z in (x, y)]
    x, y = x.nan_to_num(nan=0.0), y.nan_to_num(nan=0.0)
    product, x_length, y_length = x.T @ y, (x**2).T @ both[1], both[0].T @ y**2
    if not center:
        return torch.where((x_length > 0) & (y_length > 0), product / (x_length * y_length).sqrt(), torch.nan)
    number = (both[0].T @ both[1]).clamp(min=1)
    x_sum, y_sum = x.T @ both[1], both[0].T @ y
    x_spread, y_spread = x_length - x_sum**2 / number, y_length - y_sum**2 / number
    varies = (x_spread > _CONSTANT**2 * x_length) & (y_spread > _CONSTANT**2 * y_length)
    return torch.where(varies, (product - x_sum * y_sum / number) / (x_spread * y_spread).sqrt(), torch.nan)
