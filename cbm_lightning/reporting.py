"""The numbers that training and evaluation log, under the names of the design."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads.base import Task
from cbm_lightning.metrics import (
    ConceptAccuracy,
    ConceptAUROC,
    ConceptAveragePrecision,
    ConceptCalibrationError,
    ConceptJointAccuracy,
    RealConceptError,
)
from cbm_lightning.types import Batch


class EvaluationMetrics(nn.Module):
    """Exact metrics of one evaluation stage: label accuracy and the quality of the concepts.

    Args:
        concepts: The concept set.
        num_classes: Number of classes.
        task: What the label is.
    """

    def __init__(self, concepts: ConceptSet, num_classes: int, task: Task) -> None:
        super().__init__()
        self.label_acc = {
            "multiclass": lambda: MulticlassAccuracy(num_classes, average="micro"),
            "binary": BinaryAccuracy,
            "multilabel": lambda: MultilabelAccuracy(num_classes, average="micro"),
        }[task]()
        real = concepts.is_real()
        chosen = {} if real.all() else {
            "concept_acc": ConceptAccuracy(concepts),
            "concept_joint_acc": ConceptJointAccuracy(concepts),
            "concept_auroc": ConceptAUROC(concepts),
            "concept_ap": ConceptAveragePrecision(concepts),
            "concept_ece": ConceptCalibrationError(concepts),
        }
        if real.any():
            chosen["concept_mae"] = RealConceptError(concepts)
        # the last three keep every prediction: in a compute group they keep it once
        self.concepts = MetricCollection(chosen, compute_groups=True)

    def update(self, probs: Tensor, logits: Tensor, batch: Batch, label_matters: bool) -> None:
        """Count a batch: ``probs [B, K]``, class ``logits [B, L]``."""
        if label_matters:
            label = batch["label"].long()
            self.label_acc.update(logits.squeeze(-1) if logits.shape[-1] == 1 else logits, label.view(-1) if logits.shape[-1] == 1 else label)
        if "concepts" in batch:
            self.concepts.update(probs.float(), batch["concepts"])

    def finish(self) -> dict[str, Tensor]:
        """The values by name, without those that were not measured; starts over."""
        values: dict[str, Tensor] = {}
        if self.label_acc.update_called:
            values["label_acc"] = self.label_acc.compute()
        if any(metric.update_called for metric in self.concepts.values()):
            values |= self.concepts.compute()
        self.label_acc.reset()
        self.concepts.reset()
        return {name: value for name, value in values.items() if not torch.isnan(value)}


@torch.no_grad()
def training_metrics(probs: Tensor, logits: Tensor, batch: Batch, task: Task, label_matters: bool) -> dict[str, Tensor]:
    """Cheap accuracies of one training batch: ``label_acc``, and ``concept_acc`` over annotated entries."""
    values: dict[str, Tensor] = {}
    if label_matters:
        label = batch["label"]
        right = logits.argmax(-1) == label if task == "multiclass" else (logits >= 0).view(label.shape) == (label >= 0.5)
        values["label_acc"] = right.float().mean()
    if "concepts" in batch:
        concepts = batch["concepts"]
        known = ~concepts.isnan()
        right = ((probs >= 0.5) == (concepts >= 0.5)) & known
        values["concept_acc"] = right.sum() / known.sum().clamp(min=1)
    return values
