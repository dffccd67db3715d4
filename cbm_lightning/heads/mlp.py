"""A non-linear head, for labels that no weighted sum of concepts can express."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, FeatureDims, ValueLayout


class MLPHead(LabelHead):
    """Class logits from a ReLU network on the values (the 50-50 network of Koh et al. 2020 for OAI).

    Interventions work as with any head; exact contributions of single concepts do not exist.

    Args:
        hidden: Width of each hidden layer.
        dropout: Dropout probability after each hidden layer.

    Raises:
        ValueError: There is no hidden layer, a width is below 1, or ``dropout`` lies outside [0, 1).

    Example:
        >>> head = MLPHead(hidden=[50, 50])
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3), num_classes=2, task="multiclass")
    """

    def __init__(self, hidden: Sequence[int] = (64,), dropout: float = 0.0) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden: expected one or more widths of at least 1, got {list(hidden)}; see LinearHead")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.hidden = list(hidden)
        self.dropout = dropout

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make the layers."""
        super().build(dims, layout, num_classes, task)
        layers: list[nn.Module] = []
        for before, after in pairwise([layout.size, *self.hidden]):
            layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(self.dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(self.hidden[-1], self.num_outputs))

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """Run the network."""
        return self.layers(values)  # type: ignore[no-any-return]
