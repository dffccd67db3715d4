"""What bottlenecks with one number a concept share: the link to the head and the meaning of a correction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, Features, Intervention, ValueLayout

Link = Literal["sigmoid", "logits", "relu", "hard"]
LINKS = ("sigmoid", "logits", "relu", "hard")

# what stands for "absent" and "present" on the logit scale until training predictions say better (cem's default)
DEFAULT_LOGIT = 5.0


class ScalarBottleneck(Bottleneck):
    """One number a concept; ``link`` says which number the head reads.

    A correction replaces the number: 0 or 1 with the links ``sigmoid`` and ``hard``; with ``logits`` and ``relu`` the
    5th or the 95th percentile of that concept's training predictions (Koh et al. 2020, section 3), kept in the buffer
    ``value_range [2, K]``, soft corrections in between. The percentiles are those of the latest training epoch. A
    correction on the logit scale goes through the link like a prediction.

    Args:
        link: The head reads probabilities (``"sigmoid"``), scores (``"logits"``), positive scores (``"relu"``) or 0/1
            with a straight-through gradient (``"hard"``).
        randint: See `Bottleneck`.
        randint_scope: See `Bottleneck`.
    """

    value_range: Tensor

    def __init__(
        self, link: Link = "sigmoid", *, randint: float = 0.0, randint_scope: Literal["sample", "batch"] = "sample"
    ) -> None:
        super().__init__(randint=randint, randint_scope=randint_scope)
        if link not in LINKS:
            raise ValueError(f"link: expected one of {LINKS}, got {link!r}")
        self.link = link
        self.statistics_size = 16384 if link in ("logits", "relu") else 0

    def build_values(self, concepts: ConceptSet, extra: int = 0) -> None:
        """Set up activation, layout and value range; called by `build` of the subclasses."""
        self.concepts = concepts
        self.layout = ValueLayout(len(concepts), 1, extra)
        self.activation = ConceptActivation(concepts)
        bounds = {"logits": (-DEFAULT_LOGIT, DEFAULT_LOGIT), "relu": (0.0, DEFAULT_LOGIT)}.get(self.link, (0.0, 1.0))
        value_range = torch.tensor(bounds)[:, None].repeat(1, len(concepts))
        value_range[:, concepts.is_real()] = torch.tensor([[0.0], [1.0]])
        self.register_buffer("value_range", value_range)

    def make_output(self, features: Features, logits: Tensor, extra: Tensor | None = None) -> ConceptOutput:
        """The output for concept scores ``[B, K]`` and free dimensions ``[B, E]``."""
        probs = self.activation(logits)
        values = self.read(logits, probs)
        return ConceptOutput(features, logits, probs, values if extra is None else torch.cat([values, extra], -1))

    def read(self, logits: Tensor, probs: Tensor) -> Tensor:
        """``[..., K]`` what the head reads of scores and probabilities; real-valued concepts are read as they are."""
        match self.link:
            case "sigmoid":
                return probs
            case "hard":
                return self.activation.harden(probs)
            case "relu":
                return torch.where(self.activation.real, logits, logits.relu())
            case _:
                return logits

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Replace the numbers of corrected concepts; the free dimensions stay."""
        mask, removed = intervention.mask, intervention.values.isnan()
        if intervention.logits is None:
            probs, (low, high) = intervention.values, self.value_range
            values = low + (high - low) * probs
        else:
            probs = self.activation(intervention.logits)
            values = self.read(intervention.logits, probs)
        own, free = output.values.split([self.layout.concepts, self.layout.extra], -1)
        own = torch.where(mask, values.masked_fill(removed, 0.0).to(own.dtype), own)
        return output.replace(
            probs=torch.where(mask & ~removed, probs.to(output.probs.dtype), output.probs),
            values=torch.cat([own, free], -1),
        )

    def directions(self, output: ConceptOutput) -> Tensor | None:
        """One number a concept moves along one line."""
        return output.values.new_ones(1, self.layout.concepts, 1) if output.values.ndim == 2 else None

    def fit_statistics(self, logits: Tensor, probs: Tensor) -> None:
        """Set ``value_range`` to the 5th and 95th percentile of the training predictions, concept by concept."""
        # as a correction replaces them, before gates or the like
        values = self.read(logits, probs).float()
        # sorting a column at a time: torch.quantile refuses more than 16 million elements
        quantiles = torch.stack(
            [torch.quantile(column, values.new_tensor([0.05, 0.95])) for column in values.unbind(1)], 1
        )
        self.value_range.copy_(torch.where(self.activation.real, self.value_range, quantiles))
