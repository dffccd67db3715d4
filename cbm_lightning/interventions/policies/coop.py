"""CooP: uncertain concepts that matter for the predicted label, cheap ones first."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.policies.ucp import closeness_to_half
from cbm_lightning.interventions.state import State

Uncertainty = Literal["entropy", "distance"]


def bernoulli_entropy(probs: Tensor) -> Tensor:
    """Entropy in bits, 0 at the ends."""
    inside = probs.clamp(0.0, 1.0)
    entropy: Tensor = torch.special.entr(inside) + torch.special.entr(1.0 - inside)
    return entropy / math.log(2)


def expected_confidence_change(probs: Tensor, now: Tensor, absent: Tensor, present: Tensor) -> Tensor:
    """``|E q_v[y] - q[y]|`` of the outcome ``y`` that is likeliest now. Arguments as in `ectp.expected_change`."""
    likeliest = now.argmax(-1, keepdim=True)
    before, without, with_it = (x.gather(-1, likeliest)[..., 0].exp() for x in (now, absent, present))
    p = probs.unsqueeze(-1)
    return ((1.0 - p) * without + p * with_it - before).abs().sum(-1)


class CooP(Policy):
    """Cooperative prediction (Chauhan et al., AAAI 2023; as in Espinosa Zarlenga et al. 2023).

    ``uncertainty_weight * H(c) + importance_weight * |E q_v[y] - q[y]| - cost_weight * cost``, members of a group
    reduced as the evaluation says, its cost added once. Real-valued concepts have neither uncertainty nor importance.

    Args:
        uncertainty_weight: Of the concept's uncertainty.
        importance_weight: Of the expected change in the confidence of the predicted label; 10 in cem without tuning.
        cost_weight: Of the unit's cost (``costs`` of the evaluation).
        uncertainty: ``"entropy"`` in bits, or ``"distance"``, ``1 / |p - 1/2|`` (cem's proxy).
        adaptive: Score again after each correction, as in the papers.
        label: Name in logs and figures.

    Raises:
        ValueError: A weight is negative or no number, or the uncertainty is unknown.

    Example:
        >>> bernoulli_entropy(torch.tensor([0.5, 1.0]))
        tensor([1., 0.])
    """

    name = "coop"

    def __init__(
        self,
        uncertainty_weight: float = 1.0,
        importance_weight: float = 1.0,
        cost_weight: float = 0.0,
        uncertainty: Uncertainty = "entropy",
        *,
        adaptive: bool = True,
        label: str | None = None,
    ) -> None:
        super().__init__(adaptive=adaptive, label=label)
        weights = {
            "uncertainty_weight": uncertainty_weight,
            "importance_weight": importance_weight,
            "cost_weight": cost_weight,
        }
        for field, value in weights.items():
            if not 0.0 <= value < math.inf:
                raise ValueError(f"{field}: expected a finite number of at least 0, got {value}")
        if uncertainty not in get_args(Uncertainty):
            raise ValueError(f"uncertainty: expected one of {get_args(Uncertainty)}, got {uncertainty!r}")
        self.uncertainty_weight = uncertainty_weight
        self.importance_weight = importance_weight
        self.cost_weight = cost_weight
        self.uncertainty = uncertainty

    def score(self, state: State) -> Tensor:
        """The weighted sum."""
        real = state.subject.concepts.is_real().to(state.probs.device)
        uncertain = bernoulli_entropy if self.uncertainty == "entropy" else lambda p: closeness_to_half(p).sqrt()
        scores = self.uncertainty_weight * uncertain(state.probs).masked_fill(real, 0.0)
        if self.importance_weight:
            scores = scores + self.importance_weight * state.look_ahead(expected_confidence_change)
        return state.by_unit(scores) - self.cost_weight * state.units.costs
