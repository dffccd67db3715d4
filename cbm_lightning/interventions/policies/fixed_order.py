"""The same order for every sample: given by the user, or learned on the validation split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Policy
from cbm_lightning.interventions.state import State
from cbm_lightning.interventions.units import Units


class GlobalOrder(Policy):
    """Base of policies with one score a unit for all samples; subclasses set ``unit_scores [U]``.

    Args:
        label: Name in logs and figures.
    """

    unit_scores: Tensor | None = None

    def __init__(self, *, label: str | None = None) -> None:
        super().__init__(adaptive=False, label=label)

    def score(self, state: State) -> Tensor:
        """The same scores for every sample."""
        if self.unit_scores is None:
            raise RuntimeError(
                f"the policy {self.label!r} was never fitted; call fit, or let InterventionEvaluation do"
            )
        return self.unit_scores.to(state.probs).expand(len(state.probs), -1)


class FixedOrder(GlobalOrder):
    """An order given by name, such as a doctor's protocol.

    Args:
        order: Names of concepts or groups, the first one first; those that are left out come last, in their own order.
        label: Name in logs and figures.

    Raises:
        ValueError: A name is repeated, or (from `build`) unknown.
    """

    name = "fixed"

    def __init__(self, order: Sequence[str], *, label: str | None = None) -> None:
        super().__init__(label=label)
        if repeated := sorted({name for name in order if list(order).count(name) > 1}):
            raise ValueError(f"order: each unit comes once, repeated are {repeated}")
        self.order = list(order)

    def build(self, units: Units) -> None:
        """Look the names up."""
        scores = torch.full((len(units),), -1.0)
        for place, name in enumerate(self.order):
            scores[units.index(name)] = len(self.order) - place
        self.unit_scores = scores
