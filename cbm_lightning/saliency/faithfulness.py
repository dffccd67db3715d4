"""Does the model use the pixels that a map names? Change these pixels and watch the concept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

Score = Callable[[Tensor], Tensor]
"""Images ``[N, C, H, W]`` to concept logits ``[N, K]``."""

Activation = Callable[[Tensor], Tensor]
"""Concept logits ``[N, K]`` to numbers in [0, 1] of the same shape."""

Substrate = Literal["zero", "blur"] | float | Tensor
"""What stands where the image is not shown: zeros, the blurred image, one number, or a colour ``[C, 1, 1]``."""


class Curve(NamedTuple):
    """How a concept's score changes while its image is changed pixel by pixel.

    Attributes:
        scores: ``[steps + 1, P]``, from the untouched start to the finished image.
        auc: ``[P]``, the area under the scores by the trapezoid rule, over a width of one.
    """

    scores: Tensor
    auc: Tensor


class MaskEffect(NamedTuple):
    """What becomes of a concept's score when its image is multiplied by its map.

    Attributes:
        drop: ``[P]`` in [0, 1], the share of the score that is lost; low for a map that keeps what matters.
        increase: ``[P]`` 0 or 1, whether the score rises.
        gain: ``[P]`` in [0, 1], the share of what the score lacks to 1 that is won; NaN where it lacks nothing.
    """

    drop: Tensor
    increase: Tensor
    gain: Tensor


def deletion(
    score: Score,
    images: Tensor,
    maps: Tensor,
    rows: Tensor,
    concepts: Tensor,
    *,
    step: int | None = None,
    substrate: Substrate = "zero",
    activation: Activation = torch.sigmoid,
    batch_size: int = 64,
) -> Curve:
    """Take away the pixels that a map ranks highest first (RISE, Petsiuk et al. 2018).

    A concept is scored by its own sigmoid, where RISE takes the softmax over classes: concepts do not exclude each
    other, so that a score does not rise because another concept is deleted.

    Args:
        score: What the model says of images; called ``ceil(P * (steps + 1) / batch_size)`` times.
        images: ``[B, C, H, W]`` as the model reads them. Where they are normalised, zero is the mean colour.
        maps: ``[P, H, W]`` saliency of a concept in an image; pixels of equal value go in raster order. A map of one
            value only, or with NaN, orders nothing: its scores are NaN.
        rows: ``[P]`` int64 in ``range(B)``, the image of each map.
        concepts: ``[P]`` int64 in ``range(K)``, the concept of each map.
        step: Pixels taken at once, of which ``ceil(H * W / step)`` steps follow; one row of pixels (``W``) by default,
            which are the 224 that RISE takes of 224 x 224.
        substrate: What comes into their place.
        activation: From logits to scores. Parity with SL-CBM needs the softmax over concepts.
        batch_size: Images a call of ``score``, at most. Nothing has to be a multiple of it, and no more images than
            these are made at once.

    Returns:
        The curve; the smaller its area, the better the map names what the model uses.

    Raises:
        ValueError: Shapes do not fit, an index is out of range, a step or batch size is not positive, or ``score``
            returns something else than ``[N, K]``.

    Example:
        >>> images, first_pixel = torch.ones(1, 1, 2, 2), torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> index = torch.zeros(1, dtype=torch.int64)
        >>> deletion(lambda x: x[:, :, 0, 0], images, first_pixel, index, index, step=2, activation=torch.clone)
        Curve(scores=tensor([[1.],
            [0.],
            [0.]]), auc=tensor([0.2500]))
    """
    check_pairs(images, maps, rows, concepts)
    empty = _filled(images, substrate)
    return _curve(score, images, empty, maps, rows, concepts, step, activation, batch_size)


def insertion(
    score: Score,
    images: Tensor,
    maps: Tensor,
    rows: Tensor,
    concepts: Tensor,
    *,
    step: int | None = None,
    substrate: Substrate = "blur",
    activation: Activation = torch.sigmoid,
    batch_size: int = 64,
) -> Curve:
    """Bring in the pixels that a map ranks highest first, on a blurred image (RISE, Petsiuk et al. 2018).

    Arguments, NaN and errors as in `deletion`; here a large area speaks for the map.
    """
    check_pairs(images, maps, rows, concepts)
    empty = _filled(images, substrate)
    return _curve(score, empty, images, maps, rows, concepts, step, activation, batch_size)


@torch.no_grad()
def average_drop(
    score: Score,
    images: Tensor,
    maps: Tensor,
    rows: Tensor,
    concepts: Tensor,
    *,
    activation: Activation = torch.sigmoid,
    batch_size: int = 64,
) -> MaskEffect:
    """Multiply images by their maps, brought to [0, 1], and compare the scores before and after.

    Average drop and increase are of Grad-CAM++ (Chattopadhay et al. 2018), average gain is of Opti-CAM (Zhang et al.
    2024). Only the concept that a map belongs to is scored; the official code of SL-CBM averages over all pairs of the
    map of one concept and the score of another. The lowest value of a map hides a pixel altogether, so that a signed
    map shows in part what it is indifferent to; what is hidden becomes 0, the mean colour of a normalised image.

    Args:
        score: What the model says of images.
        images: ``[B, C, H, W]``.
        maps: ``[P, H, W]``; one of a single value only, or with NaN, has no range to be brought to [0, 1]: NaN.
        rows: ``[P]`` int64 in ``range(B)``.
        concepts: ``[P]`` int64 in ``range(K)``.
        activation: From logits to scores in [0, 1].
        batch_size: Images a call of ``score``, at most.

    Raises:
        ValueError: As in `deletion`.
    """
    check_pairs(images, maps, rows, concepts)
    check_positive("batch_size", batch_size)
    kept = images.new_full((len(maps),), torch.nan, dtype=_precision(images))
    varied = _varied(maps)
    if not len(varied):
        return MaskEffect(kept, kept, kept)
    before = _pick(torch.cat([_read(score, x, activation) for x in images.split(batch_size)])[rows], concepts)
    for pairs in varied.split(batch_size):
        chosen = maps[pairs]
        low, high = chosen.amin((1, 2), keepdim=True), chosen.amax((1, 2), keepdim=True)
        shown = ((chosen - low) / (high - low)).to(images.dtype)
        masked = images[rows[pairs]] * shown[:, None]
        kept[pairs] = _pick(_read(score, masked, activation), concepts[pairs]).to(kept.dtype)
    before = before.to(kept.dtype)
    # both quotients are 0 / 0 where there is nothing to lose or to gain
    return MaskEffect(
        drop=(before - kept).clamp(min=0.0) / before,
        increase=torch.where(kept.isnan(), kept, (kept > before).to(kept.dtype)),
        gain=(kept - before).clamp(min=0.0) / (1.0 - before),
    )


def shifted(maps: Tensor, generator: torch.Generator) -> Tensor:
    """The same maps in another place: each is rolled around the torus by an offset of its own, uniform over all.

    What a measure says of a shifted map is its chance level. Pixels in random order would be no fair rival: they
    scatter, and what a model makes of scattered holes says more of holes than of places. A shifted map has the values,
    the area and the smoothness of the map, and differs only in its place.

    Args:
        maps: ``[P, H, W]``.
        generator: Draws the offsets; two numbers a map, the same on every device if it is a CPU generator.

    Raises:
        ValueError: The maps have another shape.

    Example:
        >>> maps = torch.arange(12.0).view(1, 3, 4)
        >>> moved = shifted(maps, torch.Generator().manual_seed(1))
        >>> moved.flatten().sort().values.equal(maps.flatten())
        True
    """
    if maps.ndim != 3:
        raise ValueError(f"maps: expected [P, H, W], got {list(maps.shape)}")

    def places(size: int) -> Tensor:
        """Where the values of each line come from, ``[P, size]``."""
        offset = torch.randint(size, (len(maps), 1), generator=generator, device=generator.device)
        return (torch.arange(size, device=maps.device) - offset.to(maps.device)) % size

    pairs = torch.arange(len(maps), device=maps.device)
    down, across = places(maps.shape[1]), places(maps.shape[2])
    return maps[pairs[:, None, None], down[:, :, None], across[:, None, :]]


def blurred(images: Tensor, size: int = 11, sigma: float = 5.0) -> Tensor:
    """Images ``[B, C, H, W]`` under a Gaussian blur.

    The border is continued outwards; RISE pads with zeros, which draws a frame that the model can see.

    Args:
        images: Any number of channels.
        size: Pixels a side of the kernel, odd.
        sigma: Standard deviation in pixels; that of RISE, which is meant for images of 224 pixels.
    """
    radius = size // 2
    distance = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    weight = (-0.5 * (distance / sigma) ** 2).exp()
    weight = weight / weight.sum()
    planes = pad(images.reshape(-1, 1, *images.shape[2:]), (radius,) * 4, mode="replicate")
    return conv2d(conv2d(planes, weight.view(1, 1, 1, -1)), weight.view(1, 1, -1, 1)).view_as(images)


def check_positive(name: str, number: int) -> None:
    """Refuse an argument, called ``name`` in the ``ValueError``, that is below 1."""
    if number < 1:
        raise ValueError(f"{name}: expected a positive number, got {number}")


def check_pairs(images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> None:
    """Refuse pairs that do not fit their images; arguments as in `deletion`.

    Raises:
        ValueError: Shapes do not fit, or an index is out of range.
    """
    if images.ndim != 4:
        raise ValueError(f"images: expected [B, C, H, W], got {list(images.shape)}")
    if maps.ndim != 3 or maps.shape[1:] != images.shape[2:]:
        raise ValueError(f"maps: expected [P, {images.shape[2]}, {images.shape[3]}], got {list(maps.shape)}")
    for name, index in (("rows", rows), ("concepts", concepts)):
        if index.shape != maps.shape[:1]:
            raise ValueError(f"{name}: expected [{len(maps)}], one a map, got {list(index.shape)}")
        if len(index) and int(index.min()) < 0:
            raise ValueError(f"{name}: expected no negative index, got {int(index.min())}")
    if len(rows) and int(rows.max()) >= len(images):
        raise ValueError(f"rows: expected indices below {len(images)}, got {int(rows.max())}")


@torch.no_grad()
def _curve(
    score: Score,
    start: Tensor,
    finish: Tensor,
    maps: Tensor,
    rows: Tensor,
    concepts: Tensor,
    step: int | None,
    activation: Activation,
    batch_size: int,
) -> Curve:
    """Scores on the way from the images ``start`` to the images ``finish``, pixels in the order of the maps."""
    height, width = maps.shape[1:]
    step = width if step is None else step
    check_positive("step", step)
    check_positive("batch_size", batch_size)
    points = -(-height * width // step) + 1
    scores = start.new_full((len(maps), points), torch.nan, dtype=_precision(start))
    varied = _varied(maps)
    for begin in range(0, len(varied) * points, batch_size):
        end = min(begin + batch_size, len(varied) * points)
        first, last = begin // points, (end - 1) // points
        # pixels are ranked for the few pairs at hand, so that memory does not grow with their number
        pairs = varied[first : last + 1]
        ranks = _ranks(maps[pairs].flatten(1))
        state = torch.arange(begin, end, device=maps.device)
        pair, point = state // points - first, state % points
        done = (ranks[pair] < (point * step)[:, None]).view(-1, 1, height, width)
        row = rows[pairs[pair]]
        probs = _read(score, torch.where(done, finish[row], start[row]), activation)
        scores[pairs[pair], point] = _pick(probs, concepts[pairs[pair]]).to(scores.dtype)
    auc = (scores.sum(1) - (scores[:, 0] + scores[:, -1]) / 2) / (points - 1)
    return Curve(scores.T, auc)


def _ranks(flat: Tensor) -> Tensor:
    """``[P, n]``, when the turn of each pixel comes: the highest is 0, ties in raster order."""
    order = flat.argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(flat.shape[1], device=flat.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, turn)


def _varied(maps: Tensor) -> Tensor:
    """The indices of the maps that say something: more than one value, and no NaN."""
    flat = maps.flatten(1)
    return (flat.amax(1) > flat.amin(1)).nonzero()[:, 0]


def _filled(images: Tensor, substrate: Substrate) -> Tensor:
    """``[B, C, H, W]``, the substrate in place of each image."""
    if isinstance(substrate, str):
        if substrate not in ("zero", "blur"):
            raise ValueError(f"substrate: expected 'zero', 'blur', a number or a tensor [C, 1, 1], got {substrate!r}")
        return blurred(images) if substrate == "blur" else images.new_zeros(()).expand_as(images)
    colour = torch.as_tensor(substrate, dtype=images.dtype, device=images.device)
    if colour.ndim and colour.shape != (images.shape[1], 1, 1):
        raise ValueError(f"substrate: expected a tensor [{images.shape[1]}, 1, 1], got {list(colour.shape)}")
    return colour.expand_as(images)


def _read(score: Score, images: Tensor, activation: Activation) -> Tensor:
    """``[N, K]`` scores, at least in single precision."""
    logits = score(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"score: expected logits [{len(images)}, K] of {len(images)} images, got {got}")
    probs = activation(logits.to(_precision(logits)))
    if probs.shape != logits.shape:
        raise ValueError(f"activation: expected {list(logits.shape)} as it was given, got {list(probs.shape)}")
    return probs


def _pick(probs: Tensor, concepts: Tensor) -> Tensor:
    """``[P]``, the score of each pair's own concept, out of ``[P, K]``."""
    if int(concepts.max()) >= probs.shape[1]:
        raise ValueError(f"concepts: expected indices below {probs.shape[1]}, got {int(concepts.max())}")
    return probs.gather(1, concepts[:, None])[:, 0]


def _precision(x: Tensor) -> torch.dtype:
    """Single precision for what is in half, else its own."""
    return torch.promote_types(x.dtype, torch.float32)
