"""The contract of a label head: what a bottleneck lays out becomes class logits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.configurable import Part
from cbm_lightning.labels import Task, mean_over_samples
from cbm_lightning.types import ClassFacts, ConceptOutput, Contributions, FeatureDims, ValueLayout


class LabelHead(Part):
    """Turns ``ConceptOutput.values`` into class logits.

    A head implements `build` and `classify`; axes of samples and time are reduced here, the same for every head.

    Attributes:
        layout: How the values are laid out, known after `build`.
        num_outputs: Number of logits: ``L``, or 1 for a binary label.
        task: What the logits mean.
        reads_values: Whether it reads what the bottleneck lays out at all.
    """

    layout: ValueLayout
    num_outputs: int
    task: Task
    reads_values: bool = True

    def introduce(self, concepts: ConceptSet, classes: ClassFacts) -> None:
        """Get to know concepts and classes by name and text; called by the module before `build`."""

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make the parameters; called once by the module, which knows every size. Extend it in subclasses."""
        self.layout = layout
        self.task = task
        self.num_outputs = 1 if task == "binary" else num_classes

    @abstractmethod
    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """``[..., V]`` values to ``[..., L]`` logits, each position on its own."""

    def forward(self, output: ConceptOutput) -> Tensor:
        """``[B, L]`` class logits; those of the bottleneck itself where it owns the label."""
        if output.label_logits is not None:
            return output.label_logits
        logits = self.classify(output.values, output)
        if output.time_dim:
            logits = self.reduce_time(logits, output.features.mask)
        return mean_over_samples(logits, self.task) if output.sample_dim else logits

    def reduce_time(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """``[..., T, L]`` to ``[..., L]`` over the steps that ``mask [B, T]`` calls real; their mean by default."""
        return mean_over_time(logits, mask)

    def concept_weight(self) -> Tensor | None:
        """``[L, K, m]`` if the logits are linear in the values: how each number of a concept weighs on each class."""
        return None

    def linear_map(self) -> tuple[Tensor, Tensor] | None:
        """Weights ``[L, V]`` and biases ``[L]`` if the logits are linear in the values and depend on nothing else."""
        return None

    def check_solver(self, options: Mapping[str, Any]) -> None:
        """Check that `set_linear` can take over what an estimator of these options fits.

        Raises:
            ValueError: It cannot.
        """
        raise ValueError(
            f"solver: a linear classifier cannot become a {type(self).__name__}; use LinearHead, or train by gradients"
        )

    def set_linear(self, weight: Tensor, bias: Tensor) -> None:
        """Take over a linear classifier: weights ``[L, V]`` and biases ``[L]`` for the values as they are laid out."""
        raise NotImplementedError(f"{type(self).__name__} takes no linear classifier; see check_solver")

    def contributions(self, output: ConceptOutput) -> Contributions | None:
        """What each concept adds to each class logit, exactly, or None where the head is not additive."""
        return None

    def uncertainty(self, output: ConceptOutput) -> Tensor | None:
        """``[B]`` how uncertain the label is, the larger the more, or None where the head does not estimate it."""
        return None

    def losses(self) -> dict[str, Tensor]:
        """Unweighted penalties by name."""
        return {}

    def on_progress(self, fraction: float) -> None:
        """Told before each training step how much of the training is done, in [0, 1]; for temperatures."""

    def constrain(self) -> None:
        """Project parameters after an optimizer step; for non-negative weights and the like."""

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """Scalars worth logging in evaluation, by name."""
        return {}


def mean_over_time(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``[..., T, L]`` over the valid steps; ``mask [B, T]`` is True where a step is real."""
    if mask is None:
        return logits.mean(-2)
    weight = mask.to(logits).unsqueeze(-1)
    return (logits * weight).sum(-2) / weight.sum(-2).clamp(min=1.0)
