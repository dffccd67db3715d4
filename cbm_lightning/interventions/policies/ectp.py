"""ECTP: the concept whose correction is expected to change the label distribution most."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def divergence(new: Tensor, old: Tensor) -> Tensor:
    """``KL(new || old)`` in nats of log-probabilities ``[..., M, C]``, summed over the label variables."""
    return (new.exp() * (new - old)).nan_to_num(nan=0.0).sum((-2, -1))


def expected_change(probs: Tensor, now: Tensor, absent: Tensor, present: Tensor) -> Tensor:
    """``(1 - p) KL(q_absent || q) + p KL(q_present || q)``.

    Args:
        probs: ``[n]`` predicted probability ``p`` of the concept.
        now: ``[n, M, C]`` log-probabilities of the label.
        absent: The same once the concept is corrected to 0.
        present: The same once it is corrected to 1.
    """
    return (1.0 - probs) * divergence(absent, now) + probs * divergence(present, now)


class ECTP(Policy):
    """Expected Change in Target Prediction (Shin et al., ICML 2023, section 3.2).

    Takes the predicted probability for a probability: without calibration (similarities of CLIP models, say) the
    expectation means nothing. Real-valued concepts come last. The score of a group is that of its members one by one.

    Args:
        adaptive: Score again after each correction.
        label: Name in logs and figures.
    """

    name = "ectp"

    def __init__(self, *, adaptive: bool = False, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)

    def score(self, state: State) -> Tensor:
        """Expected divergence."""
        return state.by_unit(state.look_ahead(expected_change))
