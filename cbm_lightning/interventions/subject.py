"""The model whose concepts are corrected, as the intervention engine sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, Intervention, LinearEffects, Prediction, ValueLayout


class Intervenable(Protocol):
    """What the engine needs of a model; `CBMModule` has it.

    Where ``bottleneck.directions`` and ``head.concept_weight`` exist and return something, look-ahead is a rank-one
    update; ``bottleneck.layout`` and ``bottleneck.query_scores`` are used where they exist.

    Attributes:
        concept_set: The concepts.
        task: What the class logits mean.
    """

    concept_set: ConceptSet
    task: Task

    def intervene(self, prediction: Prediction, corrections: Intervention, /) -> Prediction:
        """The prediction with corrected concepts, without running the backbone."""

    def decide(self, output: ConceptOutput, /) -> Prediction:
        """Predict the label from concepts."""


class Subject:
    """A model under evaluation, with the optional parts of its protocol looked up.

    Args:
        model: The model.

    Raises:
        TypeError: It lacks a member of `Intervenable`; the message names it.
    """

    def __init__(self, model: Intervenable) -> None:
        needed = ("concept_set", "task", "intervene", "decide")
        if missing := [name for name in needed if not hasattr(model, name)]:
            raise TypeError(
                f"{type(model).__name__} has no {missing}, so its concepts cannot be corrected: use CBMModule, or give "
                "it the members of `interventions.Intervenable`"
            )
        self.model = model
        self.concepts = model.concept_set
        self.task: Task = model.task
        self.is_linear = True
        self._bottleneck: Any = getattr(model, "bottleneck", None)
        self._head: Any = getattr(model, "head", None)

    def intervene(self, prediction: Prediction, correction: Intervention) -> Prediction:
        """The corrected prediction."""
        return self.model.intervene(prediction, correction)

    def layout(self, output: ConceptOutput) -> ValueLayout:
        """How the values are laid out; without a word of the bottleneck, the same width for each concept."""
        found: ValueLayout | None = getattr(self._bottleneck, "layout", None)
        return found or ValueLayout(len(self.concepts), output.values.shape[-1] // len(self.concepts))

    def linear_effects(self, output: ConceptOutput) -> LinearEffects | None:
        """How a correction moves the class logits where bottleneck and head are linear."""
        if not self.is_linear or not (
            hasattr(self._bottleneck, "directions") and hasattr(self._head, "concept_weight")
        ):
            return None
        directions, weight = self._bottleneck.directions(output), self._head.concept_weight()
        return None if directions is None or weight is None else LinearEffects(directions, weight)

    def query_scores(self, output: ConceptOutput, mask: Tensor) -> Tensor | None:
        """``[B, U]`` scores of a policy that the bottleneck learned, None without one."""
        learned = getattr(self._bottleneck, "query_scores", None)
        scores: Tensor | None = None if learned is None else learned(output, mask)
        return scores

    def slopes(self, output: ConceptOutput) -> Iterator[tuple[Tensor, Tensor]]:
        """How each class logit reacts to what the head reads, class by class.

        Yields:
            ``d z_l / d values`` and the values themselves, both ``[B, K, m]`` (the slope ``[1, K, m]`` where all
            samples share it; ``m`` counts samples and time steps too where values have these axes).
        """
        concepts, width, _ = self.layout(output)
        weight = self._head.concept_weight() if hasattr(self._head, "concept_weight") else None

        def by_concept(values: Tensor) -> Tensor:
            split: Tensor = values[..., : concepts * width].unflatten(-1, (concepts, width))
            if output.sample_dim:
                split = split.movedim(0, -1).flatten(-2)
            if output.time_dim:
                split = split.movedim(1, -1).flatten(-2)
            return split

        if weight is not None and output.values.ndim == 2 and output.label_logits is None:
            for row in weight:
                yield row.unsqueeze(0).float(), by_concept(output.values).float()
            return
        # Lightning evaluates in inference mode, whose tensors no gradient passes
        with torch.inference_mode(False), torch.enable_grad():
            copy = output.map(lambda x: x.detach().clone())
            values = copy.values.requires_grad_()
            logits = self.model.decide(copy).logits
            for row in logits.unbind(-1):
                (slope,) = torch.autograd.grad(row.sum(), values, retain_graph=True)
                yield by_concept(slope).float(), by_concept(values.detach()).float()
