"""The contract of a policy: which unit of each sample to ask about next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from torch import Tensor

from cbm_lightning.interventions.state import State
from cbm_lightning.interventions.units import Units
from cbm_lightning.registry import Named

Split = Literal["train", "val"]
Gather = Callable[[Tensor], Tensor]
"""Joins the rows of all processes, the same everywhere; the identity on one process."""


class Policy(Named, ABC, field="policies"):
    """Scores the units of each sample: the highest is asked about first, the lowest index on a tie.

    A policy of one's own subclasses this and defines `score`; with a ``name`` it has a short name in YAML files.

    Args:
        adaptive: Score again after each correction, or rank the units once before the first one. Each policy's default
            is that of its paper.
        label: Name in logs and figures; the short name by default.

    Attributes:
        name: Short name.
        fits_on: The split that `fit` wants to see before the evaluation, None for no fit.
        stochastic: Whether the policy draws, so that curves are averaged over seeds.
        is_oracle: Whether the policy knows what only the person or nobody knows: a bound, not advice.

    Example:
        >>> class LeastSure(Policy):
        ...     name = "least_sure"
        ...
        ...     def score(self, state: State) -> Tensor:
        ...         return state.by_unit(-(state.probs - 0.5).abs())
        >>> Policy.make("least_sure").label
        'least_sure'
    """

    fits_on: ClassVar[Split | None] = None
    stochastic: bool = False
    is_oracle: ClassVar[bool] = False

    def __init__(self, *, adaptive: bool = False, label: str | None = None) -> None:
        self.adaptive = adaptive
        self.label = label or self.name or type(self).__name__

    def build(self, units: Units) -> None:
        """Get to know what can be asked, and check the arguments against it; called once before anything else."""

    def fit(self, states: Sequence[State], gather: Gather) -> None:
        """Learn from the split ``fits_on``.

        Args:
            states: Its samples before any correction.
            gather: Joins the rows of all processes.
        """

    @abstractmethod
    def score(self, state: State) -> Tensor:
        """``[B, U]``, higher is sooner; minus infinity for what must not be asked."""
