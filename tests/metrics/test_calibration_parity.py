"""Concept metrics and temperature against the numbers of the official SCBM code, and what is wrong with those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cbm_lightning.bottlenecks import StochasticBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import label_log_probs
from cbm_lightning.metrics import ConceptAUROC, ConceptAveragePrecision, ConceptBrierScore, ConceptCalibrationError
from cbm_lightning.types import FeatureDims

BINS = {"ECE": "l1", "TL-ECE": "l2"}


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden" / "dev" / "calibration_and_temperature.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def predictions(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return golden["concept_probs"].float(), golden["concepts"].float()


def test_brier_scores(golden: dict[str, Tensor]) -> None:
    each, official = ConceptBrierScore(5, average=None)(*predictions(golden)).double(), golden["per_concept_Brier"]
    torch.testing.assert_close(each[:4], official[:4], rtol=0, atol=1e-6)
    # officially a concept that never varies counts double
    torch.testing.assert_close(2 * each[4], official[4], rtol=0, atol=1e-6)
    torch.testing.assert_close(golden["mean_Brier"], official.mean(), rtol=0, atol=1e-7)
    torch.testing.assert_close(ConceptBrierScore(5)(*predictions(golden)).double(), each.mean(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BINS)
def test_calibration_errors_a_concept(golden: dict[str, Tensor], name: str) -> None:
    probs, concepts = predictions(golden)
    found = [ConceptCalibrationError(1, norm=BINS[name])(probs[:, [k]], concepts[:, [k]]) for k in range(5)]
    torch.testing.assert_close(torch.stack(found).double(), golden[f"per_concept_{name}"], rtol=0, atol=1e-6)


def test_the_official_mean_of_the_second_error_counts_the_last_concept_twice(golden: dict[str, Tensor]) -> None:
    each = golden["per_concept_TL-ECE"]
    torch.testing.assert_close((each.sum() + each[-1]) / 5, golden["OFFICIAL_BUG_mean_TL-ECE"], rtol=0, atol=1e-7)
    # the first one is a plain mean
    torch.testing.assert_close(golden["per_concept_ECE"].mean(), golden["mean_ECE"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(("metric", "name"), [(ConceptAUROC, "AUROC"), (ConceptAveragePrecision, "AUPR")])
def test_a_concept_that_never_varies_has_no_rank(golden: dict[str, Tensor], metric: type, name: str) -> None:
    ours = metric(5)
    mean = ours(*predictions(golden)).double()
    each, official = ours.per_concept().double(), golden[f"per_concept_{name}"]
    torch.testing.assert_close(each[:4], official[:4], rtol=0, atol=2e-3)
    assert each[4].isnan()
    torch.testing.assert_close(mean, official[:4].mean(), rtol=0, atol=2e-3)
    # officially it counts as 0, and drags the mean down
    assert official[4] == 0
    torch.testing.assert_close(golden[f"mean_{name}"], official.mean(), rtol=0, atol=1e-7)


def test_the_label_score_counts_all_classes(golden: dict[str, Tensor]) -> None:
    probs, label = golden["task_probs"], golden["class_labels"]
    same = label_log_probs(probs.log(), "multiclass").exp().squeeze(1)
    truth = torch.nn.functional.one_hot(label, 3)
    torch.testing.assert_close((same - truth).square().sum(1).mean(), golden["task_Brier"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("epochs", [100, 300])
def test_the_temperature(golden: dict[str, Tensor], epochs: int) -> None:
    bottleneck = StochasticBottleneck(samples=1)
    bottleneck.build(FeatureDims(2), ConceptSet.make(2), 2)
    found = []
    for epoch in range(epochs + 20):
        # there is no progress after the end
        bottleneck.on_progress(min(epoch / epochs, 1.0))
        found.append(bottleneck.temperature.item())
    expected = golden[f"gumbel_temperature_{epochs}epochs"]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), expected, rtol=0, atol=1e-6)
