"""LCP: the concept that is most wrong."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def concept_error(probs: Tensor, concepts: Tensor) -> Tensor:
    """``|p - c|^2``; 0 where ``c`` is unknown."""
    return (probs - concepts).square().nan_to_num(nan=0.0)


class LCP(Policy):
    """Loss on Concept Prediction (Shin et al., ICML 2023, section 3.2): an oracle that knows the answers.

    A bound for policies, not a policy that people could follow. The official code always compares with class-level
    concepts; here ``label_level`` of the evaluation decides.

    Args:
        adaptive: Score again after each correction.
        label: Name in logs and figures.
    """

    name = "lcp"
    is_oracle = True

    def __init__(self, *, adaptive: bool = False, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)

    def score(self, state: State) -> Tensor:
        """Squared errors."""
        return state.by_unit(concept_error(state.probs, state.told.to(state.probs)))
