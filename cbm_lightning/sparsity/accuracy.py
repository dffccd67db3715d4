"""Label accuracy of many linear heads at once, such as one a number of effective concepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.labels import Task, label_log_probs, label_outcomes


class HeadAccuracy(Metric):
    """Accuracy of ``R`` linear heads on the same scores; counts are kept, so that processes add up exactly.

    Args:
        weight: ``[R, L, V]``.
        bias: ``[R, L]``.
        task: What the logits mean.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> metric = HeadAccuracy(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]), torch.zeros(2, 2))
        >>> metric(torch.tensor([[2.0], [3.0]]), torch.tensor([0, 0]))
        tensor([1., 0.])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, task: Task = "multiclass", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task: Task = task
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.add_state("correct", torch.zeros(len(weight), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor, label: Tensor) -> None:
        """Count scores ``[B, V]`` with their labels ``[B]`` (``[B, L]`` for several labels)."""
        logits = values.to(self.weight) @ self.weight.mT + self.bias.unsqueeze(1)
        predicted = label_log_probs(logits, self.task).argmax(-1)
        self.correct += (predicted == label_outcomes(label, self.task)).sum((-2, -1))
        self.total += len(values)

    def compute(self) -> Tensor:
        """``[R]`` accuracies, NaN without samples."""
        variables = self.weight.shape[1] if self.task == "multilabel" else 1
        return self.correct / (self.total * variables)
