"""The concept bottleneck of Koh et al. (ICML 2020): one linear score a concept."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cbm_lightning.bottlenecks.scalar import Link, ScalarBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.sparsity.hard_concrete import HardConcrete
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext


class LinearBottleneck(ScalarBottleneck):
    """Concept scores as a linear map of the pooled features (Concept Bottleneck Models, Koh et al. 2020).

    Args:
        link: What the head reads: ``"sigmoid"``, ``"logits"``, ``"relu"`` or ``"hard"``; see `ScalarBottleneck`.
        extra_dims: Free dimensions beside the concepts (hybrid bottleneck): they train on the label alone, no person
            can correct them, and concepts may leak through them.
        gates: Put a hard-concrete gate on each concept (`HardConcrete`), which closes where the label does not need the
            concept; the head then reads 0, whatever is predicted or corrected. The loss ``l0``, the expected share of
            open gates in [0, 1], says how hard they are pushed: ``loss_weights: {l0: 0.1}``. Logged as ``open_gates``.
            Only the label's gradient keeps a gate open, so concepts and head must train jointly.
        randint: See `Bottleneck`.
        randint_scope: See `Bottleneck`.

    Raises:
        ValueError: ``extra_dims`` is negative.

    Example:
        >>> import torch
        >>> bottleneck = LinearBottleneck(link="sigmoid")
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "round"]), num_classes=3)
        >>> bottleneck(Features(torch.randn(4, 8))).values.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        link: Link = "sigmoid",
        extra_dims: int = 0,
        gates: bool = False,
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(link, randint=randint, randint_scope=randint_scope)
        if extra_dims < 0:
            raise ValueError(f"extra_dims: expected 0 or more, got {extra_dims}")
        self.extra_dims = extra_dims
        self.gated = self.needs_label = gates

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the linear maps."""
        self.build_values(concepts, self.extra_dims)
        self.scores = nn.Linear(dims.pooled, len(concepts))
        self.extra = nn.Linear(dims.pooled, self.extra_dims) if self.extra_dims else None
        self.gates = HardConcrete(len(concepts)) if self.gated else None

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Score the concepts of the pooled features."""
        extra = None if self.extra is None else self.extra(features.pooled)
        output = self.make_output(features, self.scores(features.pooled), extra)
        if self.gates is None:
            return output
        gate = self.gates(len(output.probs))
        own, free = output.values.split([self.layout.concepts, self.layout.extra], -1)
        # drawn gates go along, for a correction in training must meet the same ones
        return output.replace(values=torch.cat([own * gate, free], -1), extras={**output.extras, "gate": gate})

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Replace the numbers of corrected concepts, as far as their gates are open."""
        corrected = super().intervene(output, intervention)
        if self.gates is None:
            return corrected
        own, free = corrected.values.split([self.layout.concepts, self.layout.extra], -1)
        own = torch.where(intervention.mask, own * output.extras["gate"], own)
        return corrected.replace(values=torch.cat([own, free], -1))

    def concept_maps(self, output: ConceptOutput) -> Tensor:
        """Class activation maps of the concepts (Zhou et al. 2016): their mean and the bias make up the score."""
        features = output.features
        return features.as_map(features.averaged_tokens() @ self.scores.weight.T)

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """The concept loss and, with gates, their expected l0 norm a concept."""
        l0 = {} if self.gates is None else {"l0": self.gates.open_probability().mean()}
        return super().losses(output, batch, context) | l0

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """``open_gates``, how many concepts the head can read at all."""
        return {} if self.gates is None else {"open_gates": (self.gates.settled() > 0).sum().float()}
