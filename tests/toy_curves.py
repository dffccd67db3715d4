"""Toy models under `InterventionEvaluation`, and the comparison of two results."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.interventions.study import StudyResult
from cbm_lightning.types import Batch, ConceptOutput, Features


def toy_model(bottleneck: Any = None, head: Any = None, kind: type[CBMModule] = CBMModule, **options: Any) -> CBMModule:
    """A model whose weights are large enough for corrections to matter."""
    torch.manual_seed(3)
    options = {"concepts": ToyData().concept_set, "num_classes": CLASSES, **options}
    backbone = options.pop("backbone", None) or ToyBackbone()
    model = kind(backbone, bottleneck, head, **options)
    for part in (model.bottleneck, model.head):
        for weight in part.parameters():
            nn.init.normal_(weight)
    return model


def run(
    model: LightningModule,
    data: Any = None,
    policies: Any = ("rand", "ucp"),
    trainer: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    **options: Any,
) -> StudyResult:
    """The curves of a test."""
    evaluation = InterventionEvaluation(policies, **options)
    tester = quiet_trainer(callbacks=[evaluation], **(trainer or {}))
    tester.test(model, ToyData() if data is None else data, ckpt_path=ckpt_path, verbose=False)
    assert evaluation.result is not None
    return evaluation.result


def check_same(found: StudyResult, expected: StudyResult) -> None:
    """Scores are equal to the bit; losses come from sums in another order."""
    assert (found.budgets, found.samples) == (expected.budgets, expected.samples)
    assert found.curves.keys() == expected.curves.keys()
    for policy, curves in expected.curves.items():
        assert torch.equal(found.scores(policy), expected.scores(policy)), policy
        assert found.curves[policy].keys() == curves.keys()
        for name, curve in curves.items():
            torch.testing.assert_close(found.curves[policy][name], curve, equal_nan=True)


def accuracy_of_head(model: CBMModule, concepts: Tensor, label: Tensor) -> Tensor:
    """The label accuracy if the head reads these concepts."""
    output = ConceptOutput(Features(concepts), concepts, concepts, concepts)
    with torch.no_grad():
        return (model.eval().head(output).argmax(-1) == label).float().mean()


def plain_accuracy(model: CBMModule, batch: Batch) -> Tensor:
    """The label accuracy without corrections."""
    with torch.no_grad():
        return (model.eval()(batch).logits.argmax(-1) == batch["label"]).float().mean()
