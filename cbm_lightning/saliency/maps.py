"""Concept maps of a model, and the class maps that they make up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cbm_lightning.modes import evaluating
from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.pairs import upsample
from cbm_lightning.saliency.subject import Localisable, Subject, check_image

Resolution = Literal["image", "method"]


def concept_maps(
    model: Localisable,
    image: Tensor,
    method: str | SaliencyMethod = "auto",
    concepts: Sequence[str | int] | None = None,
    resolution: Resolution = "image",
) -> Tensor:
    """Where in each image each concept score comes from.

    It works anywhere, in Lightning's inference mode too, and leaves modes, gradients and random states as they were.

    Args:
        model: A `CBMModule`, or what has the members of `Localisable`.
        image: ``[B, C, H, W]`` as the model reads it.
        method: A saliency method or its short name, see `saliency.methods`.
        concepts: Names or positions of ``k`` concepts; all by default. Methods of pixels cost a pass or more for each.
        resolution: ``"image"`` brings the maps to the size of the image, bilinearly; ``"method"`` leaves them.

    Returns:
        ``[B, k, H, W]`` float maps, signed: positive is evidence for the concept.

    Raises:
        ValueError: A concept does not exist, the image is none, or the model has not what the method needs.

    Example:
        >>> from cbm_lightning import CBMModule
        >>> model = CBMModule("timm/test_resnet.r160_in1k", concepts=["red", "round"], num_classes=3)
        >>> concept_maps(model, torch.randn(4, 3, 64, 64), "grad_cam").shape
        torch.Size([4, 2, 64, 64])
    """
    if resolution not in get_args(Resolution):
        raise ValueError(f"resolution: expected one of {get_args(Resolution)}, got {resolution!r}")
    subject = Subject(model)
    wanted = torch.tensor(subject.find(concepts), device=check_image(image).device)
    rows = torch.arange(len(image), device=image.device)
    maps = attribute(subject, image, method, rows.repeat_interleave(len(wanted)), wanted.repeat(len(rows))).unflatten(
        0, (len(rows), len(wanted))
    )
    return upsample(maps, (image.shape[-2], image.shape[-1])) if resolution == "image" else maps


def attribute(subject: Subject, image: Tensor, method: str | SaliencyMethod, rows: Tensor, concepts: Tensor) -> Tensor:
    """Maps of chosen pairs of an image and a concept, in the method's resolution.

    Args:
        subject: The model.
        image: ``[B, C, H, W]`` as the model reads it.
        method: A saliency method or its short name.
        rows: ``[P]`` int64, which image.
        concepts: ``[P]`` int64, which concept.

    Returns:
        ``[P, h, w]`` float.

    Raises:
        ValueError: The image is none, or the model has not what the method needs.
    """
    made = SaliencyMethod.make(method)
    check_image(image)
    if not len(rows):
        return torch.zeros(0, *image.shape[-2:], device=image.device)
    with differentiable(subject.model):
        # tensors made in inference mode enter no graph, copies of them do
        maps = made.attribute(subject, image.detach().clone(), rows.clone(), concepts.clone()).detach()
    return maps.to(torch.promote_types(maps.dtype, torch.float32))


@contextmanager
def differentiable(model: object) -> Iterator[None]:
    """Evaluation mode with gradients, whatever surrounds the block; everything is as before afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
        yield


def class_maps(
    maps: Tensor, weight: Tensor, classes: Tensor, values: Tensor | None = None, top_k: int | None = None
) -> Tensor:
    """Where a class logit comes from: its concepts' maps, weighted as the head weighs the concepts.

    With exact maps and a head that reads the scores themselves (``link: logits``) the mean of the map plus the biases
    is the logit; otherwise the map shows what the concepts look at that the class rests on.

    Args:
        maps: ``[B, K, h, w]`` concept maps.
        weight: ``[L, K]`` of the head: ``head.concept_weight()[..., 0]`` where a concept is one number.
        classes: ``[B]`` which class of each image.
        values: ``[B, K]`` what the head reads; ``top_k`` then goes by contribution, else by weight alone.
        top_k: Only the concepts that weigh most for the class (SL-CBM shows 5); all by default.

    Returns:
        ``[B, h, w]``.

    Raises:
        ValueError: Shapes do not fit, or a class or ``top_k`` is out of range.

    Example:
        >>> maps, weight = torch.rand(2, 3, 4, 4), torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -1.0]])
        >>> torch.equal(class_maps(maps, weight, torch.tensor([0, 0])), maps[:, 0])
        True
    """
    if maps.ndim != 4 or weight.ndim != 2 or weight.shape[1] != maps.shape[1] or classes.shape != maps.shape[:1]:
        raise ValueError(
            "maps, weight, classes: expected [B, K, h, w], [L, K] and [B], got "
            f"{list(maps.shape)}, {list(weight.shape)} and {list(classes.shape)}"
        )
    if values is not None and values.shape != maps.shape[:2]:
        raise ValueError(f"values: expected {list(maps.shape[:2])}, got {list(values.shape)}")
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(weight):
        raise ValueError(f"classes: expected 0 to {len(weight) - 1}, got {classes.tolist()}")
    factors = weight[classes].to(maps)
    if top_k is not None:
        if not 1 <= top_k <= maps.shape[1]:
            raise ValueError(f"top_k: expected 1 to {maps.shape[1]} concepts, got {top_k}")
        size = (factors if values is None else factors * values.to(factors)).abs()
        chosen = torch.zeros_like(factors, dtype=torch.bool).scatter(1, size.topk(top_k).indices, True)
        factors = factors.where(chosen, 0.0)
    return torch.einsum("bk,bkhw->bhw", factors, maps)
