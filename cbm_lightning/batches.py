"""Batches: reading what users' loaders yield, and checking it before it trains anything."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.types import Batch

INPUTS = ("image", "embedding", "tokens")


def read_batch(batch: Any) -> Batch:
    """A new dict from a dict batch, ``(x, y)`` or ``(x, concepts, y)``; the tensors are shared, never written to.

    Raises:
        TypeError: The batch is none of these.
    """
    if isinstance(batch, dict):
        if not any(name in batch for name in INPUTS):
            raise TypeError(
                f"a dict batch needs one of the keys {INPUTS}, got {sorted(batch)}; override read_batch for others"
            )
        return dict(batch)
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        names = ("image", "label") if len(batch) == 2 else ("image", "concepts", "label")
        return dict(zip(names, batch, strict=True))
    raise TypeError(
        f"expected a batch (x, y), (x, concepts, y) or a dict with {INPUTS[0]!r}, got {type(batch).__name__}"
        f"{f' of length {len(batch)}' if isinstance(batch, (tuple, list)) else ''}; override read_batch for others"
    )


def check_batch(batch: Batch, concepts: ConceptSet, num_classes: int, task: Task, needs_concepts: bool) -> None:
    """Check labels and annotations of a batch.

    Raises:
        ValueError: Something is missing, has another shape, or lies out of range; the message names the field.
    """
    if "label" not in batch:
        raise ValueError(f"the batch has no 'label', only {sorted(batch)}; training and evaluation need one")
    check_labels(batch["label"], num_classes, task)
    if "concepts" in batch:
        check_concepts(batch["concepts"], concepts)
    elif needs_concepts:
        raise ValueError(
            f"the batch has no 'concepts', only {sorted(batch)}, but this bottleneck learns from annotated concepts; "
            "yield (x, concepts, y) or a dict with 'concepts', or use a bottleneck that needs none, such as one that "
            "compares images with concept texts"
        )


def check_task(task: Task, num_classes: int) -> None:
    """Check that the kind of label is known and fits the number of classes.

    Raises:
        ValueError: It does not.
    """
    if task not in get_args(Task):
        raise ValueError(f"task: expected one of {get_args(Task)}, got {task!r}")
    if task == "binary" and num_classes != 2:
        raise ValueError(f"task: a binary label has 2 classes, got num_classes {num_classes}; use 'multiclass'")


def check_labels(label: Tensor, num_classes: int, task: Task) -> None:
    """Check ``[B]`` class indices, or 0/1 labels.

    Raises:
        ValueError: The shape or the range is wrong.
    """
    if task == "multilabel":
        if label.ndim != 2 or label.shape[1] != num_classes:
            raise ValueError(f"label: expected [B, {num_classes}] for several labels, got {list(label.shape)}")
    elif label.ndim != 1 and not (task == "binary" and label.shape[1:] == (1,)):
        raise ValueError(f"label: expected [B] for a {task} label, got {list(label.shape)}")
    if task == "multiclass" and label.is_floating_point():
        raise ValueError(f"label: expected class indices (integers), got {label.dtype}")
    top = num_classes - 1 if task == "multiclass" else 1
    # NaN is neither below nor above
    if label.numel() and not (label.min() >= 0 and label.max() <= top):
        low, high = label.min().item(), label.max().item()
        raise ValueError(f"label: expected values from 0 to {top} ({num_classes} classes), got {low} to {high}")


def check_concepts(values: Tensor, concepts: ConceptSet) -> None:
    """Check ``[B, K]`` annotations.

    Raises:
        ValueError: The number of concepts is another, or a value is infinite, or lies outside [0, 1] though its concept
            is not real.
    """
    if values.ndim != 2 or values.shape[1] != len(concepts):
        raise ValueError(
            f"concepts: the model has {len(concepts)} concepts, the batch has the shape {list(values.shape)}"
        )
    outside = values.isinf() | ((values < 0) | (values > 1)) & ~concepts.is_real().to(values.device)
    if outside.any():
        row, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"concepts: expected values in [0, 1] or NaN, got {values[row, k].item():g} for {concepts.names[k]!r}; "
            "scale it, or declare the concept's kind as 'real' if it is finite"
        )


def as_float(batch: Batch) -> Batch:
    """The batch with its concepts as floats."""
    if "concepts" in batch and not batch["concepts"].is_floating_point():
        batch["concepts"] = batch["concepts"].to(torch.get_default_dtype())
    return batch
