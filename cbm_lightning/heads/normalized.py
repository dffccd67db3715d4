"""A weighted sum of concept scores that are normalised within each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, Contributions, FeatureDims, ValueLayout


class NormalizedHead(LabelHead):
    """Class logits as a weighted sum of the values after a LayerNorm over them (SL-CBM, arXiv 2601.12804).

    The label rests on how far a concept stands out among the others of the same sample, so a score that is the same
    for all concepts means nothing, and one correction shifts the part of every concept a little. A concept that is
    taken out counts as the value zero, which is not nothing where the mean lies elsewhere. Scale and shift of
    the LayerNorm are left out, for the weights that follow can take them over: this is the same set of functions.
    Contributions are exact, given the mean and the deviation of the sample. A head of few concepts a class, which the
    paper cuts off in evaluation, is trained with `SparsitySchedule`.

    Args:
        bias: Add a bias a class.

    Raises:
        ValueError: From `build`, the head would read a single number, which normalises to zero.

    Example:
        >>> import torch
        >>> from cbm_lightning.types import Features
        >>> head = NormalizedHead()
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3), num_classes=2, task="multiclass")
        >>> values = torch.tensor([[0.0, 2.0, 4.0]])
        >>> outputs = [ConceptOutput(Features(torch.zeros(1, 8)), x, x, x) for x in (values, 10 * values + 1)]
        >>> torch.allclose(head(outputs[0]), head(outputs[1]), atol=1e-4)
        True
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.bias = bias

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make the linear map."""
        super().build(dims, layout, num_classes, task)
        if layout.size < 2:
            raise ValueError(
                "NormalizedHead: expected two numbers to read or more, got 1, which is zero once it is normalised; "
                "use LinearHead"
            )
        self.linear = nn.Linear(layout.size, self.num_outputs, bias=self.bias)

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """The weighted sum of the normalised values."""
        return self.linear(self.normalize(values))  # type: ignore[no-any-return]

    def normalize(self, values: Tensor) -> Tensor:
        """``[..., V]`` values less their mean, divided by their deviation, sample by sample."""
        return layer_norm(values, (self.layout.size,))

    def contributions(self, output: ConceptOutput) -> Contributions | None:
        """Weight times normalised value, summed within each concept; bias and free dimensions apart."""
        if output.label_logits is not None or output.sample_dim or output.time_dim:
            return None
        concepts, width, extra = self.layout
        own, free = self.normalize(output.values).split([concepts * width, extra], -1)
        weight, free_weight = self.linear.weight.split([concepts * width, extra], -1)
        each = torch.einsum(
            "bkm,lkm->blk", own.unflatten(-1, (concepts, width)), weight.unflatten(-1, (concepts, width))
        )
        other = {}
        if self.bias:
            other["bias"] = self.linear.bias.expand(len(own), -1)
        if extra:
            other["unsupervised"] = free @ free_weight.T
        return Contributions(each, other)
