"""The head of bottlenecks that predict the label themselves."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.types import ConceptOutput


class PassThroughHead(LabelHead):
    """Hands on the ``label_logits [B, L]`` of a bottleneck that owns the label; it has no parameters.

    Of a binary label, the two classes' logits become their difference, ``[B, 1]``.

    Example:
        >>> import torch
        >>> from cbm_lightning.types import FeatureDims, Features, ValueLayout
        >>> head = PassThroughHead()
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3), num_classes=2, task="multiclass")
        >>> zeros = torch.zeros(1, 3)
        >>> head(ConceptOutput(Features(zeros), zeros, zeros, zeros, label_logits=torch.tensor([[1.0, 2.0]])))
        tensor([[1., 2.]])
    """

    reads_values = False

    def forward(self, output: ConceptOutput) -> Tensor:
        """``[B, L]`` class logits of the bottleneck, ``[B, 1]`` for a binary label."""
        logits = super().forward(output)
        return logits.diff(dim=-1) if self.task == "binary" and logits.shape[-1] == 2 else logits

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """Nothing to classify.

        Raises:
            ValueError: The bottleneck predicts no label.
        """
        raise ValueError("PassThroughHead: the bottleneck predicts no label_logits; use LinearHead")
