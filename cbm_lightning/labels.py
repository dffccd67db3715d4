"""What class logits mean: one of several classes, yes or no, or any of several labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

Task = Literal["multiclass", "binary", "multilabel"]


def label_log_probs(logits: Tensor, task: Task) -> Tensor:
    """Log-probabilities of every outcome of every label variable.

    Args:
        logits: ``[..., L]`` (``[..., 1]`` for a binary label).
        task: What they mean.

    Returns:
        ``[..., M, C]``: one variable with ``L`` outcomes for ``"multiclass"``, one with two for ``"binary"``, ``L``
        with two each for ``"multilabel"``. At least single precision.

    Example:
        >>> label_log_probs(torch.zeros(5, 4), "multilabel").shape
        torch.Size([5, 4, 2])
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if task == "multiclass":
        return log_softmax(logits, -1).unsqueeze(-2)
    return torch.stack([logsigmoid(-logits), logsigmoid(logits)], -1)


def label_outcomes(label: Tensor, task: Task) -> Tensor:
    """``[B, M]`` the true outcome of every label variable of `label_log_probs`."""
    return label.long() if task == "multilabel" else label.long().view(-1, 1)


def mean_over_samples(logits: Tensor, task: Task) -> Tensor:
    """Average ``[S, B, L]`` in probability space; returns logits ``[B, L]`` of the average."""
    samples = math.log(len(logits))
    if task == "multiclass":
        return torch.logsumexp(log_softmax(logits, -1), 0) - samples
    yes, no = (torch.logsumexp(logsigmoid(sign * logits), 0) for sign in (1.0, -1.0))
    return yes - no
