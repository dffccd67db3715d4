"""What the label head makes of the true concepts, beside what it makes of the predicted ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.labels import Task, label_outcomes
from cbm_lightning.metrics.leakage.conditional_information import TruthProbe
from cbm_lightning.metrics.leakage.evidence import Evidence, Measurement, Splits, mean_and_error
from cbm_lightning.metrics.leakage.probes import label_correct


def head_on_truth(correct: Tensor, correct_on_truth: Tensor) -> Measurement:
    """Label accuracy with predicted concepts minus that with true ones, of the same head.

    A large gap means that the head reads predictions in a way that the truth does not speak: leakage, or values that
    it never met (a head trained on probabilities sees 0 and 1 for the first time). Only an accuracy above the best that
    the truth allows proves leakage, see `ceiling_gap`.

    Args:
        correct: ``[N]`` whether (for several labels: which share of) the label is right with predicted concepts.
        correct_on_truth: ``[N]`` the same with every annotated concept corrected.

    Returns:
        The gap; ``details`` has ``acc`` and ``acc_on_truth``.
    """
    value, error = mean_and_error((correct - correct_on_truth).unsqueeze(0))
    return Measurement(
        value, error, details={"acc": float(correct.mean()), "acc_on_truth": float(correct_on_truth.mean())}
    )


def ceiling_gap(
    evidence: Evidence, splits: Splits, correct: Tensor, seed: int = 0, probe: TruthProbe | None = None
) -> Measurement:
    """Label accuracy of the model minus the best that a probe reaches from the true concepts (Havasi et al. 2022).

    Above zero, the model knows what the true concepts do not say; a probe may fall short of what they allow.

    Args:
        evidence: Samples that are not annotated completely do not count.
        splits: Of these samples.
        correct: ``[N]`` whether the model's label is right.
        seed: Of the probe.
        probe: The probe on the truth of the same evidence and splits, if there is one already.

    Returns:
        The gap; ``details`` has ``acc`` and ``ceiling``, over the samples that were judged.
    """
    complete = evidence.complete
    base = probe or TruthProbe(evidence.rows(complete), splits.rows(complete), seed)
    gaps = correct[complete].double() - base.correct
    value, error = mean_and_error(gaps)
    ceiling = float(base.correct.nanmean())
    return Measurement(value, error, details={"acc": ceiling + value, "ceiling": ceiling})


class HeadOnTruth(Metric):
    """How much label accuracy a head loses when every concept is corrected: accuracy as predicted minus that on truth.

    See `head_on_truth`.

    Args:
        task: What the label is.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> metric = HeadOnTruth()
        >>> predicted, corrected = torch.eye(4), torch.eye(4)[[0, 1, 2, 2]]
        >>> metric(predicted, corrected, torch.arange(4))
        tensor(0.2500)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    correct: list[Tensor]
    correct_on_truth: list[Tensor]

    def __init__(self, task: Task = "multiclass", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = task
        self.add_state("correct", [], dist_reduce_fx="cat")
        self.add_state("correct_on_truth", [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, logits_on_truth: Tensor, label: Tensor) -> None:
        """Store which labels are right.

        Args:
            logits: ``[B, L]`` class logits from predicted concepts.
            logits_on_truth: ``[B, L]`` from corrected ones.
            label: ``[B]``, or ``[B, L]`` for several labels.
        """
        outcomes = label_outcomes(label, self.task)
        self.correct.append(label_correct(logits.detach(), outcomes, self.task).float())
        self.correct_on_truth.append(label_correct(logits_on_truth.detach(), outcomes, self.task).float())

    def measure(self) -> Measurement:
        """The gap with its uncertainty."""
        held = (self.correct, self.correct_on_truth)
        # after a sync the states are tensors already
        return head_on_truth(*(part if isinstance(part, Tensor) else torch.cat(part) for part in held))

    def compute(self) -> Tensor:
        """The gap in [-1, 1]."""
        return torch.tensor(self.measure().value)
