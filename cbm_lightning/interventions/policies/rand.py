"""RAND: any unit next."""

from __future__ import annotations

from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State


class Rand(Policy):
    """A random order of each sample's own, the baseline of every other policy.

    Each sample draws from a stream of its own, so the order does not depend on batches or processes.

    Args:
        label: Name in logs and figures.
    """

    name = "rand"
    stochastic = True

    def __init__(self, *, label: str | None = None) -> None:
        super().__init__(adaptive=False, label=label)

    def score(self, state: State) -> Tensor:
        """Uniform numbers."""
        return state.randomness.uniform("rand", len(state.units)).to(state.probs)
