"""Concept Embedding Models (Espinosa Zarlenga et al., NeurIPS 2022): two vectors a concept, mixed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, Intervention, ValueLayout


class EmbeddingBottleneck(Bottleneck):
    """A vector for "present" and one for "absent" a concept; the head reads their mix (CEM, arXiv 2209.09056).

    ``v_k = p_k c_k+ + (1 - p_k) c_k-`` with ``p_k = sigmoid(s([c_k+; c_k-]))``. A correction replaces ``p_k`` in the
    mix. Both vectors still depend on the image, so a fully corrected CEM may know more than the concepts.

    Args:
        embedding_size: Length ``m`` of each vector.
        shared_scorer: One scorer ``s`` for all concepts (the paper), or one a concept.
        randint: Probability of correcting a concept in training; .25 in the paper.
        randint_scope: ``"sample"`` as in the paper, ``"batch"`` as in the official code.

    Raises:
        ValueError: ``embedding_size`` is below 1, or (from `build`) a concept is real-valued.

    Example:
        >>> bottleneck = EmbeddingBottleneck(embedding_size=4)
        >>> bottleneck.build(FeatureDims(8), ConceptSet(["red", "round"]), num_classes=3)
        >>> bottleneck(Features(torch.randn(5, 8))).values.shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        embedding_size: int = 16,
        shared_scorer: bool = True,
        *,
        randint: float = 0.25,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(randint=randint, randint_scope=randint_scope)
        if embedding_size < 1:
            raise ValueError(f"embedding_size: expected at least 1, got {embedding_size}")
        self.embedding_size = embedding_size
        self.shared_scorer = shared_scorer

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the embedding map and the scorer."""
        if concepts.is_real().any():
            real = [name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"]
            raise ValueError(
                f"concepts {real} are real-valued; an embedding is mixed by a probability. Use LinearBottleneck"
            )
        self.concepts = concepts
        self.layout = ValueLayout(len(concepts), self.embedding_size)
        self.activation = ConceptActivation(concepts)
        self.embed = nn.Sequential(nn.Linear(dims.pooled, len(concepts) * 2 * self.embedding_size), nn.LeakyReLU())
        scorers = 1 if self.shared_scorer else len(concepts)
        self.score_weight = nn.Parameter(torch.empty(scorers, 2 * self.embedding_size))
        self.score_bias = nn.Parameter(torch.zeros(scorers))
        bound = (2 * self.embedding_size) ** -0.5
        nn.init.uniform_(self.score_weight, -bound, bound)
        nn.init.uniform_(self.score_bias, -bound, bound)

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Embed, score and mix."""
        pairs = self.embed(features.pooled).unflatten(1, (len(self.concepts), 2 * self.embedding_size))  # [B, K, 2m]
        logits = (pairs * self.score_weight).sum(-1) + self.score_bias
        probs = self.activation(logits)
        pairs = pairs.unflatten(2, (2, self.embedding_size))  # [B, K, 2, m], present first
        return ConceptOutput(features, logits, probs, self.mix(pairs, probs), extras={"pairs": pairs})

    @staticmethod
    def mix(pairs: Tensor, probs: Tensor) -> Tensor:
        """``[B, K, 2, m]`` pairs and ``[B, K]`` probabilities to ``[B, K*m]``."""
        present, absent = pairs.unbind(2)
        return torch.lerp(absent, present, probs.to(pairs.dtype).unsqueeze(-1)).flatten(1)

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Mix again with corrected probabilities; a concept that is taken out (NaN) is read as the zero vector."""
        removed = intervention.mask & intervention.values.isnan()
        corrected = intervention.values if intervention.logits is None else self.activation(intervention.logits)
        probs = torch.where(intervention.mask & ~removed, corrected.to(output.probs.dtype), output.probs)
        mixed = self.mix(output.extras["pairs"], probs).masked_fill(self._per_number(removed), 0.0)
        # what is not corrected stays as it is: an earlier correction may have taken it out
        values = torch.where(self._per_number(intervention.mask), mixed, output.values)
        return output.replace(probs=probs, values=values)

    def directions(self, output: ConceptOutput) -> Tensor:
        """The mix moves between the two vectors of a concept."""
        present, absent = output.extras["pairs"].unbind(2)
        difference: Tensor = present - absent
        return difference

    def _per_number(self, mask: Tensor) -> Tensor:
        """``[B, K]`` to ``[B, K*m]``."""
        return mask.repeat_interleave(self.embedding_size, dim=1)
