"""The head on true concepts, completeness and ConceptSHAP."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from metrics.leakage.worlds import world

from cbm_lightning.metrics import Completeness, HeadOnTruth
from cbm_lightning.metrics.leakage import (
    ceiling_gap,
    completeness,
    completeness_score,
    concept_shap,
    cross_splits,
    head_on_truth,
)


def test_the_gap_is_a_difference_of_accuracies_with_a_paired_error() -> None:
    correct = (torch.rand(400) < 0.9).double()
    on_truth = (torch.rand(400) < 0.6).double()
    found = head_on_truth(correct, on_truth)
    assert found.details == pytest.approx({"acc": correct.mean().item(), "acc_on_truth": on_truth.mean().item()})
    assert found.value == pytest.approx(found.details["acc"] - found.details["acc_on_truth"])
    assert found.error == pytest.approx((correct - on_truth).std().item() / 20)
    same = head_on_truth(correct, correct)
    assert (same.value, same.error) == (0.0, 0.0)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_the_metric_of_every_task(task: str) -> None:
    metric = HeadOnTruth(task)
    logits, told = torch.randn(2, 60, 1 if task == "binary" else 3)
    label = {
        "multiclass": torch.randint(0, 3, (60,)),
        "binary": torch.randint(0, 2, (60, 1)),
        "multilabel": torch.randint(0, 2, (60, 3)),
    }[task]
    for rows in torch.arange(60).split(25):
        metric.update(logits[rows], told[rows], label[rows])

    def accuracy(given: torch.Tensor) -> float:
        right = given.argmax(1) == label if task == "multiclass" else (given > 0) == label.bool()
        return right.float().mean().item()

    assert metric.compute().item() == pytest.approx(accuracy(logits) - accuracy(told), abs=1e-6)


def test_the_ceiling_is_what_the_truth_allows() -> None:
    given = world().settled()
    perfect, guessing = torch.ones(600), (torch.rand(600) < 0.5).double()
    splits = cross_splits(600, 3, 2)
    found = ceiling_gap(given, splits, perfect)
    # one of two classes that the concepts do not tell apart
    assert found.details["ceiling"] == pytest.approx(0.5, abs=0.06)
    assert found.details["acc"] == pytest.approx(1.0)
    assert found.value == pytest.approx(0.5, abs=0.06)
    assert found.value > 10 * found.error
    fair = ceiling_gap(given, splits, guessing)
    assert abs(fair.value) < 3 * fair.error


def test_completeness_between_chance_and_the_features() -> None:
    assert completeness(0.9, 0.9, 0.5) == 1.0
    assert completeness(0.5, 0.9, 0.5) == 0.0
    assert completeness(1.0, 0.9, 0.5) > 1.0
    assert math.isnan(completeness(0.9, 0.5, 0.5))


def test_completeness_of_a_model() -> None:
    given = world().settled()
    features = torch.nn.functional.one_hot(given.label, 8) + 0.05 * torch.randn(600, 8)
    half = torch.arange(600) % 2 == 0
    found = completeness_score(given, cross_splits(600, 3, 2), half.double(), features)
    assert found.details["probe_acc"] == pytest.approx(1.0, abs=0.02)
    assert found.details["acc"] == 0.5
    assert found.details["chance"] == pytest.approx(given.label.bincount().max().item() / 600)
    assert found.value == pytest.approx((0.5 - found.details["chance"]) / (1 - found.details["chance"]), abs=0.03)
    noise = completeness_score(given, cross_splits(600, 3, 2), half.double(), torch.zeros(600, 2))
    assert noise.details["probe_acc"] <= noise.details["chance"] + 1e-9
    assert math.isnan(noise.value)


def test_the_metric_of_completeness() -> None:
    metric = Completeness("binary")
    label = torch.tensor([0, 0, 0, 1])
    sure = (2.0 * label - 1).unsqueeze(1)
    for rows in (slice(0, 3), slice(3, 4)):
        metric.update(-torch.ones(4, 1)[rows], sure[rows], label[rows])
    assert metric.compute() == 0.0  # no better than saying "no"
    metric.reset()
    metric.update(sure, sure, label)
    assert metric.compute() == 1.0
    metric.reset()
    metric.update(sure, -sure, label)
    assert metric.compute().isnan()


@pytest.fixture
def golden(shared):
    return np.load(shared / "golden" / "dev" / "conceptshap.npz")


def stored_accuracy(golden):
    known = {tuple(row): value for row, value in zip(golden["subsets"].tolist(), golden["accuracy"], strict=True)}
    return lambda subsets: torch.tensor([known[tuple(row)] for row in subsets.long().tolist()])


def test_conceptshap_of_the_published_code(golden) -> None:
    found = concept_shap(stored_accuracy(golden), 5)
    torch.testing.assert_close(found, torch.from_numpy(golden["REFERENCE_exact_shapley"]), atol=1e-9, rtol=0)
    # the published regression puts 1e4 for infinite weights
    torch.testing.assert_close(found, torch.from_numpy(golden["conceptshap"]), atol=1e-3, rtol=0)


def games(subsets: torch.Tensor) -> torch.Tensor:
    """Concepts 0 and 1 are worth something together only; 3 is worth nothing."""
    x = subsets.double()
    return 0.2 + 0.5 * x[:, 0] * x[:, 1] + 0.1 * x[:, 2]


def test_conceptshap_is_the_mean_over_all_orders() -> None:
    by_hand = torch.zeros(4, dtype=torch.float64)
    orders = list(permutations(range(4)))
    for order in orders:
        known = torch.zeros(1, 4, dtype=torch.bool)
        for concept in order:
            before = games(known)
            known = known.clone()
            known[0, concept] = True
            by_hand[concept] += (games(known) - before).item()
    expected = by_hand / len(orders) / 0.6
    torch.testing.assert_close(concept_shap(games, 4), expected)
    assert concept_shap(games, 4).tolist() == pytest.approx([0.25 / 0.6, 0.25 / 0.6, 0.1 / 0.6, 0.0])
    drawn = concept_shap(games, 4, orders=500, exact=False)
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)
    assert drawn.sum().item() == pytest.approx(1.0)
    assert torch.equal(drawn, concept_shap(games, 4, orders=500, exact=False))


def test_many_concepts_are_drawn() -> None:
    asked = []

    def accuracy(subsets: torch.Tensor) -> torch.Tensor:
        asked.append(len(subsets))
        return subsets.double().mean(1)

    torch.testing.assert_close(concept_shap(accuracy, 13, orders=2), torch.full((13,), 1 / 13, dtype=torch.float64))
    assert asked == [2, 14, 14, 14, 14]


@pytest.mark.parametrize(
    ("count", "accuracy", "message"),
    [(0, games, "count: expected at least one"), (2, lambda s: torch.zeros(len(s)), "as accurate as none")],
)
def test_nothing_to_share(count: int, accuracy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concept_shap(accuracy, count)
