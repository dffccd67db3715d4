"""Greedy oracle: the concept whose correction helps the true label most."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


def true_probability(log_probs: Tensor, label: Tensor) -> Tensor:
    """``[n]`` probability of the true outcomes ``label [n, M]`` under ``[n, M, C]``, averaged over the variables."""
    return log_probs.gather(-1, label.unsqueeze(-1))[..., 0].exp().mean(-1)


class GreedyOracle(Policy):
    """Corrects what raises the probability of the true label most (Chauhan et al. 2023; cem's GreedyOptimal).

    An oracle that knows concepts and label: the skyline of policies that look one step ahead. The score of a group is
    that of its members one by one, as in cem.

    Args:
        adaptive: Score again after each correction.
        label: Name in logs and figures.
    """

    name = "greedy"
    is_oracle = True

    def __init__(self, *, adaptive: bool = True, label: str | None = None) -> None:
        super().__init__(adaptive=adaptive, label=label)

    def score(self, state: State) -> Tensor:
        """Mean probability of the true outcomes after each correction."""
        scores = torch.zeros_like(state.probs)
        for k, rows, (after,) in state.branches(state.told):
            scores[rows, k] = true_probability(after, state.label[rows]).to(scores.dtype)
        return state.by_unit(scores)
