"""The concept bottleneck of Koh et al. (ICML 2020): one linear score a concept."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from cbm_lightning.bottlenecks.scalar import Link, ScalarBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, FeatureDims, Features


class LinearBottleneck(ScalarBottleneck):
    """Concept scores as a linear map of the pooled features (Concept Bottleneck Models, Koh et al. 2020).

    Args:
        link: What the head reads: ``"sigmoid"``, ``"logits"``, ``"relu"`` or ``"hard"``; see `ScalarBottleneck`.
        extra_dims: Free dimensions beside the concepts (hybrid bottleneck): they train on the label alone, no person
            can correct them, and concepts may leak through them.
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
        *,
        randint: float = 0.0,
        randint_scope: Literal["sample", "batch"] = "sample",
    ) -> None:
        super().__init__(link, randint=randint, randint_scope=randint_scope)
        if extra_dims < 0:
            raise ValueError(f"extra_dims: expected 0 or more, got {extra_dims}")
        self.extra_dims = extra_dims

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the linear maps."""
        self.build_values(concepts, self.extra_dims)
        self.scores = nn.Linear(dims.pooled, len(concepts))
        self.extra = nn.Linear(dims.pooled, self.extra_dims) if self.extra_dims else None

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Score the concepts of the pooled features."""
        extra = None if self.extra is None else self.extra(features.pooled)
        return self.make_output(features, self.scores(features.pooled), extra)
