"""A side channel from the features to the label, and how much of the decision it carries."""

from __future__ import annotations

from torch import Tensor, nn

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.heads.linear import LinearHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, Contributions, FeatureDims, ValueLayout


class ResidualHead(LabelHead):
    """A head on the concepts plus a linear map of the features (PCBM-h, Yuksekgonul et al. 2023).

    The side channel sees everything that the backbone sees, so the concepts are no longer all that the label rests on;
    ``residual_share`` says how much of the logits it carries.

    Args:
        head: The head on the concepts; `LinearHead` by default.
        dropout: Probability of switching the side channel off for a training sample, so that the concepts must carry
            the label alone now and then.

    Raises:
        ValueError: ``dropout`` lies outside [0, 1).

    Example:
        >>> head = ResidualHead(LinearHead())
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3), num_classes=2, task="multiclass")
    """

    def __init__(self, head: LabelHead | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.head = LinearHead() if head is None else head
        self.dropout = dropout

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make both branches; the side channel starts at zero, so that training begins with a pure bottleneck."""
        super().build(dims, layout, num_classes, task)
        self.head.build(dims, layout, num_classes, task)
        self.side = nn.Linear(dims.pooled, self.num_outputs, bias=False)
        nn.init.zeros_(self.side.weight)

    def residual(self, output: ConceptOutput) -> Tensor:
        """``[B, L]`` logits of the side channel alone."""
        return self.side(output.features.pooled)  # type: ignore[no-any-return]

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """Concept logits plus the side channel, the same at every sample and time step."""
        residual = self.residual(output)
        if self.training and self.dropout:
            keep = residual.new_empty(len(residual), 1).bernoulli_(1.0 - self.dropout)
            residual = residual * keep
        return self.head.classify(values, output) + (residual.unsqueeze(1) if output.time_dim else residual)

    def concept_weight(self) -> Tensor | None:
        """The weights of the head on the concepts."""
        return self.head.concept_weight()

    def contributions(self, output: ConceptOutput) -> Contributions | None:
        """The contributions of the inner head, and the side channel under ``residual``."""
        inner = self.head.contributions(output)
        return inner and Contributions(inner.concepts, {**inner.other, "residual": self.residual(output)})

    def losses(self) -> dict[str, Tensor]:
        """The penalties of the inner head."""
        return self.head.losses()

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """``residual_share`` in [0, 1]: the side channel's part of the squared logits, averaged over the samples.

        Both parts are centred over the classes, for a constant decides nothing; a binary logit is taken as it is.
        """
        residual, concepts = self.residual(output), self.head(output)
        if self.task == "multiclass":
            residual, concepts = (x - x.mean(-1, keepdim=True) for x in (residual, concepts))
        side, rest = residual.square().sum(-1), concepts.square().sum(-1)
        share = (side / (side + rest).clamp(min=1e-12)).mean()
        return {"residual_share": share, **self.head.diagnostics(output)}
