"""What a curve says in one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def area(budgets: Sequence[float], scores: Tensor) -> Tensor:
    """Normalised area under ``[..., R]`` scores by the trapezoid rule: the mean score over all budgets.

    Example:
        >>> area([0, 1, 2], torch.tensor([0.0, 1.0, 1.0]))
        tensor(0.7500)
    """
    x = scores.new_tensor(list(budgets))
    if len(x) == 1:
        return scores[..., 0]
    return torch.trapezoid(scores, x) / (x[-1] - x[0])


def gain(budgets: Sequence[float], scores: Tensor) -> Tensor:
    """How far the mean over all budgets lies above the score without corrections."""
    return area(budgets, scores) - scores[..., 0]


def monotonicity(scores: Tensor) -> Tensor:
    """Share of steps, in [0, 1], in which ``[..., R]`` scores do not fall; NaN of a single budget."""
    return (scores.diff(dim=-1) >= 0).to(scores).mean(-1)


def budget_to_reach(budgets: Sequence[float], scores: Tensor, target: float | Tensor) -> Tensor:
    """The smallest budget at which ``[..., R]`` scores reach a target, NaN if they never do.

    Example:
        >>> budget_to_reach([0, 2, 4], torch.tensor([0.5, 0.7, 0.9]), 0.6)
        tensor(2.)
    """
    reached = scores >= torch.as_tensor(target, dtype=scores.dtype, device=scores.device)[..., None]
    first = scores.new_tensor(list(budgets))[reached.int().argmax(-1)]
    return torch.where(reached.any(-1), first, torch.nan)


def halving_budget(budgets: Sequence[float], scores: Tensor, units: int) -> Tensor:
    """The smallest budget that halves the excess error over all ``units`` corrected.

    NaN if corrections do not help, or if the budgets do not end with all units.
    """
    start, end = scores[..., 0], scores[..., -1]
    # a float's width below the middle: a curve may pass it exactly
    half = budget_to_reach(budgets, scores, (start + end) / 2 - torch.finfo(scores.dtype).eps)
    return torch.where((end > start) & (budgets[-1] == units), half, torch.nan)


def intervenability(budgets: Sequence[float], losses: Tensor, units: int) -> Tensor:
    """How much correcting half of the ``units`` lowers the label loss ``[..., R]`` (Laguna et al., NeurIPS 2024).

    Under random corrections this is their measure with a mask over a random half of the units. The budget nearest one
    half is taken; NaN if none lies within one unit of it.
    """
    x = losses.new_tensor(list(budgets))
    distance = (x - units / 2).abs()
    middle = int(distance.argmin())
    gained = losses[..., 0] - losses[..., middle]
    return gained if distance[middle] < 1 else torch.full_like(gained, torch.nan)


def summarize(
    budgets: Sequence[int], units: int, scores: Tensor, losses: Tensor, target: float | None = None
) -> dict[str, Tensor]:
    """The summaries of one policy by name, averaged over its trials; NaN where a trial has none.

    Args:
        budgets: The ``R`` budgets.
        units: How many units there are.
        scores: ``[trials, R]``.
        losses: ``[trials, R]`` mean label losses.
        target: A score for ``target_budget``, the smallest budget that reaches it.
    """
    reached = {} if target is None else {"target_budget": budget_to_reach(budgets, scores, target).mean()}
    return reached | {
        "auc": area(budgets, scores).mean(),
        "gain": gain(budgets, scores).mean(),
        "final": scores[:, -1].mean(),
        "monotonicity": monotonicity(scores).mean(),
        "halving_budget": halving_budget(budgets, scores, units).mean(),
        "intervenability": intervenability(budgets, losses, units).mean(),
    }
