from __future__ import annotations

import math

import pytest
import torch

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics import ConceptBrierScore, ConceptCalibrationError


def test_it_is_the_mean_square_over_annotated_entries() -> None:
    probs, concepts = torch.rand(90, 3), torch.rand(90, 3).round()
    concepts[torch.rand(90, 3) < 0.3] = math.nan
    concepts[:, 2] = math.nan
    each, pooled = ConceptBrierScore(3, average=None), ConceptBrierScore(3)
    for rows in (slice(0, 40), slice(40, 90)):
        each.update(probs[rows], concepts[rows])
        pooled.update(probs[rows], concepts[rows])
    columns = [((probs - concepts)[:, k].square().nanmean()) for k in range(2)]
    torch.testing.assert_close(each.compute()[:2], torch.stack(columns))
    assert each.compute()[2].isnan()
    torch.testing.assert_close(pooled.compute(), (probs - concepts).square().nanmean())


def test_soft_annotations_are_probabilities_and_real_ones_do_not_count() -> None:
    metric = ConceptBrierScore(ConceptSet(["wet", "size"], kinds=["binary", "real"]))
    assert metric(torch.tensor([[0.5, 3.0]]), torch.tensor([[0.7, 9.0]])).item() == pytest.approx(0.04)


def test_norms_of_the_calibration_error() -> None:
    # two bins of equally many entries, with gaps of 0.2 and 0.4
    probs = torch.tensor([[0.2], [0.2], [0.9], [0.9]])
    concepts = torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    found = [ConceptCalibrationError(1, norm=norm)(probs, concepts).item() for norm in ("l1", "l2", "max")]
    assert found == pytest.approx([0.3, math.sqrt(0.1), 0.4])


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="average: expected 'micro' or None, got 'macro'"):
        ConceptBrierScore(2, average="macro")
    with pytest.raises(ValueError, match="norm: expected 'l1', 'l2' or 'max', got 'l3'"):
        ConceptCalibrationError(2, norm="l3")
