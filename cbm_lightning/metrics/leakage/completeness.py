"""How much of what can be told of the label the concepts tell (Yeh et al., NeurIPS 2020), and who of them tells it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.labels import Task, label_outcomes
from cbm_lightning.metrics.leakage.evidence import Evidence, Measurement, Splits
from cbm_lightning.metrics.leakage.probes import Probes, fit_probes, label_correct, label_nll, out_of_fold, standardised

EXACT = 12
"""Up to so many concepts all subsets are evaluated."""


def completeness(accuracy: float, accuracy_of_features: float, chance: float) -> float:
    """``(accuracy - chance) / (accuracy_of_features - chance)``; NaN where the features are no better than chance.

    Args:
        accuracy: Of the label from concepts.
        accuracy_of_features: Of the label from what the concepts are predicted from.
        chance: Of the label without looking.

    Example:
        >>> completeness(0.7, 0.9, 0.5)
        0.5
    """
    room = accuracy_of_features - chance
    return round((accuracy - chance) / room, 12) if room > 0 else float("nan")


def completeness_score(
    evidence: Evidence, splits: Splits, correct: Tensor, features: Tensor, seed: int = 0
) -> Measurement:
    """Completeness of a model's concepts: its label accuracy between chance and that of a linear probe on the features.

    It can exceed 1. A completeness above that of the true concepts is bought by leakage.

    Args:
        evidence: Has the label.
        splits: Rows to fit the probe on and to judge it on.
        correct: ``[N]`` whether the model's label is right.
        features: ``[N, D]`` what the concepts were predicted from.
        seed: Of the probe.

    Returns:
        The score, NaN where the probe is no better than chance. ``details`` has ``acc``, ``probe_acc`` and ``chance``,
        the share of the commonest class, over the samples that were judged.
    """
    fit, hold, judge = splits.flat()
    outcomes, task = evidence.outcomes, evidence.task
    outputs = 1 if task == "binary" else evidence.num_classes
    probes = Probes(len(fit), features.shape[1], outputs, 0, torch.Generator().manual_seed(seed))
    x = standardised(features.detach().cpu().double(), fit)
    logits = fit_probes(probes, x, lambda out: label_nll(out, outcomes, task), fit, hold)
    right = out_of_fold(label_correct(logits, outcomes, task), splits)
    judged = judge.any(0)
    common = [(column == column.mode().values).double().mean() for column in outcomes[judged].unbind(1)]
    found = {
        "acc": float(correct[judged].double().mean()),
        "probe_acc": float(right.nanmean()),
        "chance": float(torch.stack(common).mean()),
    }
    value = completeness(*found.values())
    # by the delta method, for two accuracies of the same samples
    room = found["probe_acc"] - found["chance"]
    rows = correct[judged].double() - value * right.nanmean(0)[judged]
    error = float(rows.std()) / len(rows) ** 0.5 / room if room > 0 else float("nan")
    return Measurement(value, error, details=found)


class Completeness(Metric):
    """Label accuracy of a concept model between chance and the accuracy of a model without a bottleneck (Yeh 2020).

    Args:
        task: What the label is.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = Completeness()
        >>> label = torch.tensor([0, 0, 1, 1])
        >>> free = torch.eye(2)[label]
        >>> metric(torch.eye(2)[[0, 0, 0, 1]], free, label)
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: list[Tensor]
    outcomes: list[Tensor]

    def __init__(self, task: Task = "multiclass", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = task
        self.add_state("right", [], dist_reduce_fx="cat")
        self.add_state("outcomes", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, free_logits: Tensor, label: Tensor) -> None:
        """Store which labels are right.

        Args:
            logits: ``[B, L]`` from concepts.
            free_logits: ``[B, L]`` from a model that is free to read anything, such as a probe on the features.
            label: ``[B]``, or ``[B, L]`` for several labels.
        """
        outcomes = label_outcomes(label, self.task)
        right = [label_correct(given.detach(), outcomes, self.task) for given in (logits, free_logits)]
        self.right.append(torch.stack(right, 1).float())
        self.outcomes.append(outcomes)

    def compute(self) -> Tensor:
        """The score; NaN where the free model is no better than chance."""
        # after a sync the states are tensors already
        held = (self.right, self.outcomes)
        right, outcomes = (part if isinstance(part, Tensor) else torch.cat(part) for part in held)
        accuracy, free = right.double().mean(0).tolist()
        common = (outcomes == outcomes.mode(0).values).double().mean()
        return torch.tensor(completeness(accuracy, free, float(common)))


def concept_shap(
    accuracy: Callable[[Tensor], Tensor], count: int, orders: int = 256, seed: int = 0, exact: bool | None = None
) -> Tensor:
    """``[m]`` share of completeness that each concept contributes: the Shapley values of Yeh et al. 2020, section 5.

    They add up to 1: the value of a set of concepts is its accuracy between that of none and that of all.

    Args:
        accuracy: ``[S]`` accuracies when only the concepts of each subset ``[S, m]`` (bool) are known.
        count: Number ``m`` of concepts.
        orders: Orders in which concepts are drawn to join, and the same backwards, where not all subsets are evaluated.
        seed: Of the orders.
        exact: Evaluate all ``2^m`` subsets; by default up to 12 concepts.

    Raises:
        ValueError: There is no concept, or all of them are as accurate as none.

    Example:
        >>> weight = torch.tensor([0.3, 0.2])
        >>> values = concept_shap(lambda subsets: 0.5 + subsets.float() @ weight, 2)
        >>> [round(value, 4) for value in values.tolist()]
        [0.6, 0.4]
    """
    if count < 1:
        raise ValueError(f"count: expected at least one concept, got {count}")
    ends = torch.zeros(2, count, dtype=torch.bool)
    ends[1] = True
    none, everything = accuracy(ends).double().tolist()
    if everything == none:
        raise ValueError(f"accuracy: all concepts are as accurate as none ({none:.3f}), so there is nothing to share")
    if exact is None:
        exact = count <= EXACT
    found = _all_subsets(accuracy, count) if exact else _drawn_orders(accuracy, count, orders, seed)
    shares: Tensor = found / (everything - none)
    return shares


def _all_subsets(accuracy: Callable[[Tensor], Tensor], count: int) -> Tensor:
    subsets = torch.zeros(2**count, count, dtype=torch.bool)
    members = [list(chosen) for size in range(count + 1) for chosen in combinations(range(count), size)]
    for row, chosen in enumerate(members):
        subsets[row, chosen] = True
    values = accuracy(subsets).double()
    size = subsets.sum(1)
    # a subset weighs as often as it is who came before (or, with the concept, who is there after)
    before = [1 / (count * comb(count - 1, s)) if s < count else 0.0 for s in size.tolist()]
    after = [1 / (count * comb(count - 1, s - 1)) if s else 0.0 for s in size.tolist()]
    joined, missing = (torch.tensor(share, dtype=torch.float64).unsqueeze(1) for share in (after, before))
    weight = torch.where(subsets, joined, -missing)
    return values @ weight


def _drawn_orders(accuracy: Callable[[Tensor], Tensor], count: int, orders: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(count, dtype=torch.float64)
    for _ in range(orders):
        forward = torch.randperm(count, generator=generator)
        for order in (forward, forward.flip(0)):
            subsets = torch.zeros(count + 1, count, dtype=torch.bool)
            for step, concept in enumerate(order.tolist(), start=1):
                subsets[step:, concept] = True
            total[order] += accuracy(subsets).double().diff()
    return total / (2 * orders)
