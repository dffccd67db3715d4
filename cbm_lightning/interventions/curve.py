"""`InterventionCurve`: how well the label is predicted, budget by budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from cbm_lightning.interventions.engine import Rollout
from cbm_lightning.labels import Task, label_log_probs, label_outcomes

Average = Literal["micro", "macro"]


class InterventionCurve(Metric):
    """Label accuracy and loss at every budget of an intervention, and what the concepts did meanwhile.

    ``update(rollout, label, group)`` takes what `InterventionEngine.rollout` gives for ``B`` samples; ``compute()``
    returns ``[R]`` tensors by name: ``label_acc``, the score that was asked for instead (`score_name`), ``loss`` (mean
    negative log-probability of the true label, nats), ``concepts`` (mean number corrected), ``cost`` (mean),
    ``concept_acc`` (of annotated concepts that nobody corrected, NaN where there are none: it moves only in bottlenecks
    that propagate corrections), and with groups ``worst_group`` (the lowest accuracy of any group). Sums and counts
    only, so processes of different sizes give the numbers of one; groups keep ``N (4 R + 8)`` bytes.

    Args:
        budgets: The ``R`` budgets.
        num_classes: ``L``.
        task: What the label is.
        average: Accuracy over all samples (``"micro"``), or averaged over the classes that occur (``"macro"``, balanced
            accuracy).
        metric: Any torchmetrics metric instead of the accuracy, updated with probabilities (``[B, L]``; ``[B]`` for a
            binary label) and labels.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The average is unknown.

    Example:
        >>> rollout = Rollout(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), *torch.zeros(4, 2, 1))
        >>> curve = InterventionCurve(budgets=[0, 1], num_classes=2)
        >>> curve.update(rollout, torch.tensor([1]))
        >>> curve.compute()["label_acc"]
        tensor([0., 1.])
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    count: Tensor
    sums: Tensor
    samples: Tensor
    free: Tensor
    groups: list[Tensor]
    group_right: list[Tensor]

    def __init__(
        self,
        budgets: Sequence[int],
        num_classes: int,
        task: Task = "multiclass",
        average: Average = "micro",
        metric: Metric | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if average not in ("micro", "macro"):
            raise ValueError(f"average: expected 'micro' or 'macro', got {average!r}")
        if metric is not None and average != "micro":
            raise ValueError("average: has no effect beside task_metric; give one or the other")
        if metric is not None and metric.higher_is_better is False:
            raise ValueError(
                f"task_metric: of {type(metric).__name__} less is better, which area, gain and budgets would read "
                "upside down; give a metric of which more is better"
            )
        self.budgets = list(budgets)
        self.task: Task = task
        self.average = average
        outcomes = 2 if task == "binary" else num_classes
        budgets_shape = (len(self.budgets),)
        self.add_state("right", torch.zeros(*budgets_shape, outcomes, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(outcomes, dtype=torch.long), dist_reduce_fx="sum")
        # loss, corrected concepts and cost
        self.add_state("sums", torch.zeros(3, *budgets_shape), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("free", torch.zeros(2, *budgets_shape, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("groups", [], dist_reduce_fx="cat")
        self.add_state("group_right", [], dist_reduce_fx="cat")
        self.metrics = None if metric is None else nn.ModuleList(metric.clone() for _ in self.budgets)
        self.score_name = (
            type(metric).__name__ if metric is not None else "label_acc" if average == "micro" else "balanced_acc"
        )

    def update(self, rollout: Rollout, label: Tensor, group: Tensor | None = None) -> None:
        """Count a block.

        Args:
            rollout: Of ``B`` samples at the ``R`` budgets.
            label: ``[B]`` classes, or ``[B, L]`` of several labels.
            group: ``[B]`` int, subgroup of each sample.

        Raises:
            ValueError: The rollout has another number of budgets.
        """
        if len(rollout.logits) != len(self.budgets):
            raise ValueError(f"rollout: expected {len(self.budgets)} budgets, got {len(rollout.logits)}")
        log_probs = label_log_probs(rollout.logits, self.task)  # [R, B, M, C]
        truth = label_outcomes(label, self.task)  # [B, M]
        right = log_probs.argmax(-1) == truth
        # several labels are counted by label, one label by its class
        if self.task == "multilabel":
            self.count += len(label)
            self.right += right.sum(1)
        else:
            kind = torch.nn.functional.one_hot(truth[:, 0], len(self.count))
            self.count += kind.sum(0)
            self.right += (right[..., 0].float() @ kind.float()).round().long()
        surprise = -log_probs.gather(-1, truth.expand(len(right), *truth.shape).unsqueeze(-1))[..., 0]
        self.sums += torch.stack(
            [surprise.mean(-1).sum(-1), rollout.corrected.float().sum(-1), rollout.cost.float().sum(-1)]
        )
        self.samples += len(label)
        self.free += torch.stack([rollout.free_right.sum(-1), rollout.free_known.sum(-1)]).long()
        # nothing is appended as an empty row, so that all processes synchronise the same states
        rows = slice(None) if group is not None else slice(0)
        self.groups.append(label.new_zeros(0, dtype=torch.long) if group is None else group.long())
        self.group_right.append(right.float().mean(-1).T[rows])
        if self.metrics is not None:
            probs = log_probs.exp()
            probs = probs[..., 0, :] if self.task == "multiclass" else probs[..., 1]
            for metric, row in zip(self.metrics, probs, strict=True):
                metric.update(row.reshape(label.shape) if self.task == "binary" else row, label.long())  # type: ignore[operator]

    def compute(self) -> dict[str, Tensor]:
        """The curves by name, each ``[R]``."""
        loss, corrected, cost = self.sums / self.samples
        accuracy = self.right.sum(-1) / self.count.sum()
        curves = {"label_acc": accuracy, "loss": loss, "concepts": corrected, "cost": cost}
        if self.score_name != "label_acc":
            curves = {self.score_name: self._score(), **curves}
        curves["concept_acc"] = self.free[0] / self.free[1]
        # after a synchronisation the lists are tensors already
        groups = torch.cat(self.groups) if isinstance(self.groups, list) else self.groups
        right = torch.cat(self.group_right) if isinstance(self.group_right, list) else self.group_right
        if len(groups):
            curves["worst_group"] = torch.stack([right[groups == g].mean(0) for g in groups.unique()]).amin(0)
        return curves

    def _score(self) -> Tensor:
        if self.metrics is not None:
            found = [metric.compute() for metric in self.metrics]  # type: ignore[operator]
            if found[0].ndim:
                raise ValueError(
                    f"task_metric: {self.score_name} gives {list(found[0].shape)} numbers, a curve needs one a budget; "
                    "choose an average"
                )
            return torch.stack(found)
        present = self.count > 0
        return (self.right[:, present] / self.count[present]).mean(-1)

    def reset(self) -> None:
        """Forget every block."""
        super().reset()
        for metric in self.metrics or []:
            metric.reset()  # type: ignore[operator]
