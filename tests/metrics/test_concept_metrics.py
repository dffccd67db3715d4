from __future__ import annotations

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics import (
    ConceptAccuracy,
    ConceptAUROC,
    ConceptAveragePrecision,
    ConceptCalibrationError,
    ConceptJointAccuracy,
    RealConceptError,
)

MIXED = ConceptSet(["a", "b", "size"], kinds=["binary", "binary", "real"])


def annotated(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    concepts = (torch.rand(n, 4) > 0.6).float()
    concepts[torch.rand(n, 4) < 0.2] = torch.nan
    concepts[:, 3] = 1.0  # one class only
    return (torch.rand(n, 4) + 0.4 * concepts.nan_to_num()) / 1.4, concepts


def in_batches(metric, probs, concepts, size: int = 37):
    for start in range(0, len(probs), size):
        metric.update(probs[start : start + size], concepts[start : start + size])
    return metric.compute()


def test_ranking_scores_agree_with_scikit_learn_over_defined_concepts() -> None:
    probs, concepts = annotated()
    for metric, reference in ((ConceptAUROC(4), roc_auc_score), (ConceptAveragePrecision(4), average_precision_score)):
        scores = []
        for k in range(3):
            known = ~concepts[:, k].isnan()
            scores.append(reference(concepts[known, k], probs[known, k]))
        value = in_batches(metric, probs, concepts)
        assert value.item() == pytest.approx(sum(scores) / 3, abs=1e-6)
        assert metric.per_concept()[3].isnan()


def test_accuracy_counts_annotated_entries_only() -> None:
    probs, concepts = annotated()
    known = ~concepts.isnan()
    right = ((probs >= 0.5) == (concepts >= 0.5)) & known
    assert in_batches(ConceptAccuracy(4), probs, concepts).item() == pytest.approx((right.sum() / known.sum()).item())
    torch.testing.assert_close(
        in_batches(ConceptAccuracy(4, average=None), probs, concepts), right.sum(0) / known.sum(0)
    )
    joint = (right | ~known).all(1).float().mean().item()
    assert in_batches(ConceptJointAccuracy(4), probs, concepts).item() == pytest.approx(joint)


def test_calibration_error_of_a_calibrated_and_an_overconfident_model() -> None:
    probs = torch.rand(20000, 1)
    concepts = (torch.rand(20000, 1) < probs).float()
    assert in_batches(ConceptCalibrationError(1), probs, concepts, 5000) < 0.02
    assert in_batches(ConceptCalibrationError(1), (probs > 0.5).float(), concepts, 5000) > 0.2


def test_real_concepts_count_in_their_own_metric_only() -> None:
    probs = torch.tensor([[0.9, 0.1, 7.0], [0.9, 0.9, 3.0]])
    concepts = torch.tensor([[1.0, 0.0, 5.0], [1.0, 0.0, torch.nan]])
    assert in_batches(ConceptAccuracy(MIXED), probs, concepts) == 0.75
    assert in_batches(ConceptJointAccuracy(MIXED), probs, concepts) == 0.5
    assert in_batches(RealConceptError(MIXED), probs, concepts) == 2.0


@pytest.mark.parametrize(
    "metric", [ConceptAUROC(2), ConceptAveragePrecision(2), ConceptCalibrationError(2), ConceptAccuracy(2)]
)
def test_nothing_annotated_is_not_a_number_rather_than_a_score(metric) -> None:
    assert in_batches(metric, torch.rand(5, 2), torch.full((5, 2), torch.nan)).isnan()


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected probs and concepts \[B, 3\]"):
        ConceptAccuracy(3).update(torch.rand(2, 4), torch.rand(2, 4))
