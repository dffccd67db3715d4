"""The numbers that training and evaluation log, under the names of the design."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import Accuracy

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.metrics import (
    ConceptAccuracy,
    ConceptAUROC,
    ConceptAveragePrecision,
    ConceptCalibrationError,
    ConceptJointAccuracy,
    RealConceptError,
)
from cbm_lightning.types import Batch


class SampleMean(Metric):
    """The mean of batch means over samples; unlike ``torchmetrics.MeanMetric`` it does not hide a NaN."""

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, samples: int) -> None:
        """Count the mean of a batch."""
        self.total += value.float() * samples
        self.samples += samples

    def compute(self) -> Tensor:
        """The mean over all samples."""
        return self.total / self.samples


class EvaluationMetrics(nn.Module):
    """Exact metrics of one evaluation stage: mean losses, label accuracy and the quality of the concepts.

    Sums and counts are kept apart until the end, so that processes with different numbers of samples give the
    numbers of one process.

    Args:
        concepts: The concept set.
        num_classes: Number of classes.
        task: What the label is.
    """

    def __init__(self, concepts: ConceptSet, num_classes: int, task: Task) -> None:
        super().__init__()
        self.task = task
        self.label_acc = Accuracy(task, num_classes=num_classes, num_labels=num_classes, average="micro")
        discrete: dict[str, Metric | MetricCollection] = {
            "concept_acc": ConceptAccuracy(concepts),
            "concept_joint_acc": ConceptJointAccuracy(concepts),
            "concept_auroc": ConceptAUROC(concepts),
            "concept_ap": ConceptAveragePrecision(concepts),
            "concept_ece": ConceptCalibrationError(concepts),
        }
        real = concepts.is_real()
        chosen = {} if real.all() else discrete
        if real.any():
            chosen["concept_mae"] = RealConceptError(concepts)
        self.means: dict[str, SampleMean] = {}
        # those that keep every prediction share them as a compute group
        self.concepts = MetricCollection(chosen, compute_groups=True)

    def update(
        self, means: dict[str, Tensor], probs: Tensor, logits: Tensor, batch: Batch, label_matters: bool
    ) -> None:
        """Count a batch: scalars to be averaged over samples by name, ``probs [B, K]``, class ``logits [B, L]``."""
        for name, value in means.items():
            if name not in self.means:
                self.means[name] = SampleMean().to(value.device)
            self.means[name].update(value.detach(), len(probs))
        if label_matters:
            label = batch["label"].long()
            # torchmetrics takes numbers for probabilities wherever all of them lie in [0, 1], so it never gets logits
            predicted = logits.argmax(-1) if self.task == "multiclass" else logits.sigmoid().view(label.shape)
            self.label_acc.update(predicted, label)
        if "concepts" in batch:
            self.concepts.update(probs.float(), batch["concepts"])

    def finish(self) -> dict[str, Tensor]:
        """The values by name, without scores that nothing annotated defines; a loss that is NaN stays. Starts over."""
        values: dict[str, Tensor] = {name: mean.compute() for name, mean in self.means.items() if mean.update_called}
        if self.label_acc.update_called:
            values["label_acc"] = self.label_acc.compute()
        if any(metric.update_called for metric in self.concepts.values()):
            scores: dict[str, Tensor] = self.concepts.compute()
            values |= {name: score for name, score in scores.items() if not torch.isnan(score)}
        self.reset()
        return values

    def reset(self) -> None:
        """Forget every batch."""
        self.means.clear()
        # states made under inference mode could not be updated by the validation within a fit
        with torch.inference_mode(False):
            self.label_acc.reset()
            self.concepts.reset()


class RunningMeans:
    """Means over samples of scalars by name, summed on their device so that no step waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: dict[str, Tensor], samples: int) -> None:
        """Count the means of a batch."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().float() * samples
            self._counts[name] = self._counts.get(name, 0) + samples

    def finish(self) -> dict[str, Tensor]:
        """The means by name; starts over."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


@torch.no_grad()
def training_metrics(
    probs: Tensor, logits: Tensor, batch: Batch, task: Task, label_matters: bool, discrete: Tensor
) -> dict[str, Tensor]:
    """Cheap accuracies of one training batch: ``label_acc``, and ``concept_acc`` over annotated entries.

    Args:
        probs: ``[B, K]``.
        logits: ``[B, L]``.
        batch: With ``label``, and ``concepts`` if there are any.
        task: What the label is.
        label_matters: Whether to score the label.
        discrete: ``[K]`` bool, False for real-valued concepts, which have no accuracy.
    """
    values: dict[str, Tensor] = {}
    if label_matters:
        label = batch["label"]
        right = (
            logits.argmax(-1) == label if task == "multiclass" else (logits >= 0).view(label.shape) == (label >= 0.5)
        )
        values["label_acc"] = right.float().mean()
    if "concepts" in batch:
        concepts = batch["concepts"]
        known = ~concepts.isnan() & discrete
        right = ((probs >= 0.5) == (concepts >= 0.5)) & known
        values["concept_acc"] = right.sum() / known.sum().clamp(min=1)
    return values
