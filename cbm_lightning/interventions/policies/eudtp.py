"""EUDTP: the concept whose correction is expected to make the label most certain."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of log-probabilities ``[..., M, C]``, summed over the label variables."""
    return -(log_probs.exp() * log_probs).nan_to_num(nan=0.0).sum((-2, -1))


def expected_certainty(probs: Tensor, now: Tensor, absent: Tensor, present: Tensor) -> Tensor:
    """``H(q) - [(1 - p) H(q_absent) + p H(q_present)]``; may be negative. Arguments as in `ectp.expected_change`."""
    return entropy(now) - (1.0 - probs) * entropy(absent) - probs * entropy(present)


class EUDTP(Policy):
    """Expected Uncertainty Decrease in Target Prediction (Shin et al., ICML 2023, section 3.2).

    Needs calibrated concepts, like `ECTP`. Real-valued concepts score 0.

    Args:
        adaptive: Score again after each correction.
        label: Name in logs and figures.
    """

    name = "eudtp"

    def __init__(self, *, adaptive: bool = False, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)

    def score(self, state: State) -> Tensor:
        """Expected decrease of the entropy."""
        return state.by_unit(state.look_ahead(expected_certainty))
