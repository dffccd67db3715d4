"""CCTP: the concept that contributes most to the class logits."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State

Weighting = Literal["activation", "prob"]


class CCTP(Policy):
    """Contribution of Concept on Target Prediction (Shin et al., ICML 2023, section 3.2).

    ``sum_l |c_k d z_l / d c_k|`` with ``c_k`` what the head reads. A linear head has this in closed form; any other
    head takes one backward pass a class.

    Args:
        weighting: ``"activation"`` as in the paper, or ``"prob"``: the slopes weighted by the predicted probability, as
            in the official code, which only differs where the head does not read probabilities.
        adaptive: Score again after each correction.
        label: Name in logs and figures.

    Raises:
        ValueError: The weighting is unknown.
    """

    name = "cctp"

    def __init__(
        self, weighting: Weighting = "activation", *, adaptive: bool = False, label: str | None = None
    ) -> None:
        super().__init__(adaptive=adaptive, label=label)
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting: expected one of {get_args(Weighting)}, got {weighting!r}")
        self.weighting = weighting

    def score(self, state: State) -> Tensor:
        """Summed sizes of the contributions, or of the slopes."""
        scores = torch.zeros_like(state.probs)
        for slope, read in state.slopes():
            # [B, K, m]; the numbers of a concept contribute together
            if self.weighting == "activation":
                scores = scores + (slope * read).sum(-1).abs()
            else:
                scores = scores + state.probs * slope.abs().sum(-1)
        return state.by_unit(scores)
