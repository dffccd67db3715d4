"""Labels of any kind as the targets of a linear classifier."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from cbm_lightning.sparsity.design import Design, as_tensor
from cbm_lightning.sparsity.families import FamilyName


class EncodedLabels(NamedTuple):
    """Labels as targets.

    Attributes:
        targets: ``[n]`` int64 for ``"multinomial"``, ``[n, L]`` of 0 and 1 for ``"ovr"``.
        prevalence: ``[L]`` how often each class occurs, over all processes.
        classes: The labels in the order of the rows.
        multilabel: Whether a sample may have several.
    """

    targets: Tensor
    prevalence: Tensor
    classes: np.ndarray[Any, Any]
    multilabel: bool


def encode_labels(y: Any, family: FamilyName, design: Design) -> EncodedLabels:
    """Turn labels into targets.

    Args:
        y: ``[n]`` labels of any kind, or ``[n, L]`` of 0 and 1 for several labels a sample.
        family: What the targets are for.
        design: The scores of the same samples.

    Raises:
        ValueError: The number of labels is not that of the rows, labels are missing, there is one class only, or
            several labels a sample were given for a softmax.
    """
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.ndim not in (1, 2):
        raise ValueError(f"y: expected [n] or [n, L], got {list(labels.shape)}")
    if len(labels) != design.local_rows:
        raise ValueError(f"y: expected {design.local_rows} labels, one a row of X, got {len(labels)}")
    # what is missing is not equal to itself, or nothing at all
    missing = (labels != labels) | (labels == None)  # noqa: E711
    if bool(np.any(missing)) or (labels.dtype.kind == "f" and not np.isfinite(labels).all()):
        raise ValueError("y: expected a label for each sample, got NaN, infinity or None; leave these samples out")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        return _several(labels, family, design)
    check_classification_targets(labels)
    classes = np.unique(labels)
    if design.distributed:
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, classes)
        classes = np.unique(np.concatenate(found))
    if len(classes) < 2:
        raise ValueError(f"y: expected two classes or more, got only {classes.tolist()}")
    rows = torch.from_numpy(np.searchsorted(classes, labels)).to(design.device)
    counts = design.sum(torch.bincount(rows, minlength=len(classes)).double())
    prevalence = counts / counts.sum()
    if family == "multinomial":
        return EncodedLabels(rows, prevalence, classes, False)
    if len(classes) == 2:
        return EncodedLabels(rows[:, None].to(design.dtype), prevalence[1:], classes, False)
    return EncodedLabels(torch.nn.functional.one_hot(rows, len(classes)).to(design.dtype), prevalence, classes, False)


def _several(labels: np.ndarray[Any, Any], family: FamilyName, design: Design) -> EncodedLabels:
    if family != "ovr":
        raise ValueError(f"y: several labels a sample ({list(labels.shape)}) need family='ovr', got {family!r}")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("y: expected 0 or 1 for each label of each sample")
    targets = as_tensor(labels).to(design.device, design.dtype)
    prevalence = design.sum(targets.double().sum(0)) / design.rows
    if constant := ((prevalence == 0) | (prevalence == 1)).nonzero().flatten().tolist():
        warnings.warn(f"the labels {constant} are the same for all samples; they get no weights", stacklevel=2)
        prevalence = prevalence.clamp(0.5 / design.rows, 1 - 0.5 / design.rows)
    return EncodedLabels(targets, prevalence, np.arange(labels.shape[1]), True)
