"""One weight a concept and class: the head that people can read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, Contributions, FeatureDims, ValueLayout


class LinearHead(LabelHead):
    """Class logits as a weighted sum of the values (Koh et al. 2020).

    Args:
        bias: Add a bias a class.

    Example:
        >>> head = LinearHead()
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3), num_classes=2, task="multiclass")
        >>> head.concept_weight().shape
        torch.Size([2, 3, 1])
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.bias = bias

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make the linear map."""
        super().build(dims, layout, num_classes, task)
        self.linear = nn.Linear(layout.size, self.num_outputs, bias=self.bias)

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """The weighted sum."""
        return self.linear(values)  # type: ignore[no-any-return]

    def concept_weight(self) -> Tensor:
        """``[L, K, m]`` weights of the concepts, without those of the free dimensions."""
        concepts, width, _ = self.layout
        weight: Tensor = self.linear.weight[:, : concepts * width].unflatten(1, (concepts, width))
        return weight

    def linear_map(self) -> tuple[Tensor, Tensor]:
        """Weights ``[L, V]`` and biases ``[L]``, zero without a bias."""
        weight: Tensor = self.linear.weight
        return weight, self.linear.bias if self.bias else weight.new_zeros(len(weight))

    def check_solver(self, options: Mapping[str, Any]) -> None:
        """Any linear classifier will do; one without biases if the head has none."""
        if not self.bias and options.get("fit_intercept", True):
            raise ValueError("solver: the head has no bias, but the solver fits one; give it fit_intercept: false")

    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Copy weights and biases, in place so that optimizers keep what they hold."""
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            if self.bias:
                self.linear.bias.copy_(bias)

    def contributions(self, output: ConceptOutput) -> Contributions | None:
        """Weight times value, summed within each concept; bias and free dimensions apart."""
        if output.label_logits is not None or output.sample_dim or output.time_dim:
            return None
        concepts, width, extra = self.layout
        values = output.values[:, : concepts * width].unflatten(1, (concepts, width))
        weight = self.concept_weight()
        each = torch.einsum("bkm,lkm->blk", values, weight)
        other = {}
        if self.bias:
            other["bias"] = self.linear.bias.expand(len(values), -1)
        if extra:
            other["unsupervised"] = output.values[:, -extra:] @ self.linear.weight[:, -extra:].T
        return Contributions(each, other)
