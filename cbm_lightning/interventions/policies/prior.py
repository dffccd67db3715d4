"""Learned prior: the policy that a bottleneck trained along with itself (IntCEM)."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def prior_distribution(scores: Tensor, asked: Tensor) -> Tensor:
    """``[B, U]`` probabilities of asking about each unit next.

    Args:
        scores: ``[B, U]`` raw scores of the learned policy.
        asked: ``[B, U]`` bool, units of which a concept was corrected already; they get none unless all were.
    """
    return scores.masked_fill(asked, -1000.0).softmax(-1)


class LearnedPrior(Policy):
    """Asks what the model itself learned to ask (IntCEM, Espinosa Zarlenga et al., NeurIPS 2023).

    The bottleneck offers ``query_scores(output, mask) -> [B, U]``, one score a unit of the evaluation.

    Args:
        sample: Draw the unit from the learned distribution, as the official code does, or take the likeliest.
        adaptive: Ask the model again after each correction.
        label: Name in logs and figures.
    """

    name = "prior"

    def __init__(self, sample: bool = True, *, adaptive: bool = True, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)
        self.sample = sample
        self.stochastic = sample

    def score(self, state: State) -> Tensor:
        """Log-probabilities, with Gumbel noise where the policy draws.

        Raises:
            ValueError: The bottleneck learned no policy, or one for another number of units.
        """
        scores = state.subject.query_scores(state.output, state.mask)
        if scores is None:
            raise ValueError(
                "policies: 'prior' asks what the model learned to ask, and this bottleneck has no query_scores; use a "
                "bottleneck that learns a policy, or 'cloning', which learns one from the greedy oracle"
            )
        if scores.shape[-1] != len(state.units):
            raise ValueError(
                f"unit: the bottleneck learned to choose among {scores.shape[-1]} units, the evaluation has "
                f"{len(state.units)}; choose the unit that it was trained with"
            )
        # the logarithm of `prior_distribution`, which would underflow to "cannot be asked"
        log_probs = scores.float().masked_fill(state.asked, -torch.inf).log_softmax(-1)
        if not self.sample:
            return log_probs
        uniform = state.randomness.uniform(f"prior {state.step}", len(state.units)).to(log_probs)
        # the largest of log-probabilities plus Gumbel noise is a draw from the distribution
        return log_probs - uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log().neg().log()
