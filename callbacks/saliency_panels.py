"""Which maps a picture of concept saliency shows, and what is written over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.callbacks.saliency_figure import Panel
from cbm_lightning.saliency.evidence import read_evidence
from cbm_lightning.saliency.maps import attribute, class_maps
from cbm_lightning.saliency.methods import SaliencyMethod
from cbm_lightning.saliency.pairs import upsample
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import Batch, Prediction


def panels(
    subject: Subject, method: SaliencyMethod, batch: Batch, prediction: Prediction, concepts: int | list[str]
) -> list[list[Panel]]:
    """The panels of each image: its class, then its concepts.

    The panel of the predicted class shows the sum of the maps of the concepts shown, as the head weighs them, where it
    is linear in one number a concept and the concepts are those that weigh most.

    Args:
        subject: The model.
        method: Makes the maps.
        batch: Of ``B`` images, with masks, boxes, points, annotations and labels as far as there are any.
        prediction: Of these and perhaps more images.
        concepts: Names, or how many of those that weigh most in each prediction; among them, predicted ones go first.
    """
    image = batch["image"]
    size = (image.shape[-2], image.shape[-1])
    probs = prediction.concepts.probs[: len(image)].float()
    chosen = _chosen(subject, prediction, probs, concepts)  # [B, k]
    rows = torch.arange(len(image), device=image.device).repeat_interleave(chosen.shape[1])
    raw = attribute(subject, image, method, rows, chosen.flatten()).unflatten(0, (len(image), chosen.shape[1]))
    maps = upsample(raw, size).cpu()
    evidence = read_evidence(batch, len(subject.concepts))
    annotations = batch.get("concepts")
    real = subject.concepts.is_real().tolist()
    found = _classes(subject, batch, prediction, maps if isinstance(concepts, int) else None, chosen)
    for b, row in enumerate(chosen.tolist()):
        for place, k in enumerate(row):
            known = annotations is not None and not real[k] and not bool(annotations[b, k].isnan())
            truth = bool(annotations[b, k] >= 0.5) if annotations is not None and known else None
            value = f"{probs[b, k]:.3g}" if real[k] else f"{probs[b, k]:.0%}"
            panel = Panel(
                subject.concepts.names[k],
                value + ("" if truth is None else ", present" if truth else ", absent"),
                None if truth is None else bool(probs[b, k] >= 0.5) == truth,
                maps[b, place],
                None if evidence.masks is None else evidence.masks[b, k].cpu(),
                None if evidence.points is None else evidence.points[b, k].cpu(),
            )
            found[b].append(panel)
    return found


def _chosen(subject: Subject, prediction: Prediction, probs: Tensor, concepts: int | list[str]) -> Tensor:
    """``[B, k]`` positions of the concepts to show."""
    if not isinstance(concepts, int):
        return torch.tensor(subject.find(concepts), device=probs.device).expand(len(probs), -1)
    importance = subject.importance(prediction)
    weighs = probs if importance is None else importance[: len(probs)].abs().float()
    # an absent concept is nowhere to be seen, however much its absence weighs
    order = weighs + (probs >= 0.5) * (weighs.amax() + 1.0)
    return order.topk(min(concepts, probs.shape[1]), dim=1).indices


def _classes(
    subject: Subject, batch: Batch, prediction: Prediction, maps: Tensor | None, chosen: Tensor
) -> list[list[Panel]]:
    """For each image a panel of its true class, and one of the predicted class, with a map where there is one."""
    model: Any = subject.model
    classes, weight, labels = subject.classes(prediction), subject.weight(), batch.get("label")
    if classes is None:
        return [[Panel("image", "", None, None)] for _ in chosen]
    classes = classes[: len(chosen)]
    names = getattr(model, "class_names", None)
    sure = prediction.logits[: len(chosen)].float()
    # a binary label has one logit, that of class 1
    sure = sure.softmax(1) if sure.shape[1] > 1 else torch.cat([(-sure).sigmoid(), sure.sigmoid()], 1)
    shown: list[Tensor | None] = [None] * len(chosen)
    if maps is not None and weight is not None:
        weights = weight[classes].gather(1, chosen).cpu()
        shown = list(class_maps(maps, weights, torch.arange(len(chosen))))

    def named(label: int) -> str:
        return str(label) if names is None else str(names[label])

    found = []
    for b, label in enumerate(classes.tolist()):
        truth = None if labels is None else int(labels[b].reshape(-1)[0])
        right = None if truth is None else truth == label
        first = Panel("image" if truth is None else named(truth), "" if truth is None else "true class", None, None)
        second = Panel(named(label), f"{sure[b, label]:.0%}, predicted", right, shown[b])
        found.append([first, second])
    return found
