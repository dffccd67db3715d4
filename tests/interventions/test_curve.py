"""Curves, what they say in one number, and when they call for a warning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torchmetrics.classification import MulticlassCohenKappa, MultilabelF1Score
from torchmetrics.functional.classification import multiclass_accuracy

from cbm_lightning.interventions.curve import InterventionCurve
from cbm_lightning.interventions.engine import Rollout
from cbm_lightning.interventions.leakage_check import describe_fall
from cbm_lightning.interventions.summaries import (
    area,
    budget_to_reach,
    gain,
    halving_budget,
    intervenability,
    monotonicity,
    summarize,
)

BUDGETS = [0, 1, 3]
N, L = 50, 4


def drawn(classes: int = L, n: int = N, seed: int = 0) -> Rollout:
    """A rollout at three budgets, of which the higher ones correct more and cost more."""
    g = torch.Generator().manual_seed(seed)
    steps = torch.tensor(BUDGETS)[:, None].expand(-1, n)
    known = (6 - steps).clone()
    return Rollout(
        torch.randn(3, n, classes, generator=g),
        steps,
        steps * (torch.rand(n, generator=g) + 0.5),
        (known * torch.rand(3, n, generator=g)).long(),
        known,
    )


def labels(*shape: int, top: int = L) -> Tensor:
    return torch.randint(top, shape or (N,), generator=torch.Generator().manual_seed(7))


def part(rollout: Rollout, rows: slice) -> Rollout:
    return Rollout(*(x[:, rows] for x in rollout))


def test_accuracy_loss_and_what_was_spent() -> None:
    rollout, label = drawn(), labels()
    curve = InterventionCurve(BUDGETS, L)
    curve.update(rollout, label)
    found = curve.compute()
    assert set(found) == {"label_acc", "loss", "concepts", "cost", "concept_acc"}
    for r, logits in enumerate(rollout.logits):
        assert found["label_acc"][r] == (logits.argmax(-1) == label).float().mean()
        torch.testing.assert_close(found["loss"][r], cross_entropy(logits, label))
    assert found["concepts"].tolist() == BUDGETS
    torch.testing.assert_close(found["cost"], rollout.cost.mean(1))
    torch.testing.assert_close(found["concept_acc"], rollout.free_right.sum(1) / rollout.free_known.sum(1))


def test_the_accuracy_of_a_free_concept_is_unknown_where_none_is_left() -> None:
    zeros = torch.zeros(2, 2)
    rollout = Rollout(
        torch.zeros(2, 2, 3), zeros, zeros, torch.tensor([[1, 2], [0, 0]]), torch.tensor([[2, 2], [0, 0]])
    )
    curve = InterventionCurve([0, 1], 3)
    curve.update(rollout, torch.tensor([0, 1]))
    acc = curve.compute()["concept_acc"]
    assert acc[0] == 0.75
    assert acc[1].isnan()


def test_balanced_accuracy_averages_over_the_classes_that_occur() -> None:
    rollout, label = drawn(), labels(top=3)
    curve = InterventionCurve(BUDGETS, L, average="macro")
    curve.update(rollout, label)
    found = curve.compute()
    assert curve.score_name == "balanced_acc"
    for r, logits in enumerate(rollout.logits):
        by_class = [(logits[label == c].argmax(-1) == c).float().mean() for c in range(3)]
        torch.testing.assert_close(found["balanced_acc"][r], torch.stack(by_class).mean())
    # all four classes occur: what torchmetrics calls macro
    label = labels()
    curve.reset()
    curve.update(rollout, label)
    reference = [multiclass_accuracy(x, label, L, average="macro") for x in rollout.logits]
    torch.testing.assert_close(curve.compute()["balanced_acc"], torch.stack(reference))


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
def test_a_binary_label(shape: tuple[int, ...]) -> None:
    rollout, label = drawn(1), labels(*shape, top=2)
    curve = InterventionCurve(BUDGETS, 2, task="binary")
    curve.update(rollout, label)
    found = curve.compute()
    flat = label.view(-1)
    for r, logits in enumerate(rollout.logits[..., 0]):
        assert found["label_acc"][r] == ((logits > 0) == flat).float().mean()
        torch.testing.assert_close(found["loss"][r], binary_cross_entropy_with_logits(logits, flat.float()))


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_several_labels(average: str) -> None:
    rollout, label = drawn(), labels(N, L, top=2)
    curve = InterventionCurve(BUDGETS, L, task="multilabel", average=average)
    curve.update(rollout, label)
    found = curve.compute()
    for r, logits in enumerate(rollout.logits):
        # every label has as many samples, so both averages are one
        torch.testing.assert_close(found[curve.score_name][r], ((logits > 0) == label).float().mean())
        torch.testing.assert_close(found["loss"][r], binary_cross_entropy_with_logits(logits, label.float()))


def test_any_metric_of_the_label() -> None:
    rollout, label = drawn(), labels()
    kappa = MulticlassCohenKappa(L)
    curve = InterventionCurve(BUDGETS, L, metric=kappa)
    for rows in (slice(0, 20), slice(20, N)):
        curve.update(part(rollout, rows), label[rows])
    found = curve.compute()
    assert curve.score_name == "MulticlassCohenKappa"
    torch.testing.assert_close(found["label_acc"], (rollout.logits.argmax(-1) == label).float().mean(1))
    reference = torch.stack([MulticlassCohenKappa(L)(x.softmax(-1), label) for x in rollout.logits])
    torch.testing.assert_close(found["MulticlassCohenKappa"], reference)
    assert kappa.confmat.sum() == 0  # the user's own metric counts nothing
    curve.reset()
    curve.update(part(rollout, slice(0, 20)), label[:20])
    fewer = torch.stack([MulticlassCohenKappa(L)(x[:20].softmax(-1), label[:20]) for x in rollout.logits])
    torch.testing.assert_close(curve.compute()["MulticlassCohenKappa"], fewer)


def test_a_metric_of_several_labels_reads_their_probabilities() -> None:
    rollout, label = drawn(), labels(N, L, top=2)
    curve = InterventionCurve(BUDGETS, L, task="multilabel", metric=MultilabelF1Score(L, threshold=0.3))
    curve.update(rollout, label)
    reference = [MultilabelF1Score(L, threshold=0.3)(x.sigmoid(), label) for x in rollout.logits]
    torch.testing.assert_close(curve.compute()["MultilabelF1Score"], torch.stack(reference))


def test_the_worst_group() -> None:
    rollout, label = drawn(), labels()
    group = torch.tensor([4, 9, 11]).repeat(20)[:N]
    curve = InterventionCurve(BUDGETS, L)
    for rows in (slice(0, 13), slice(13, 14), slice(14, N)):
        curve.update(part(rollout, rows), label[rows], group[rows])
    right = rollout.logits.argmax(-1) == label
    by_group = torch.stack([right[:, group == g].float().mean(1) for g in (4, 9, 11)])
    torch.testing.assert_close(curve.compute()["worst_group"], by_group.amin(0))
    # the worst group may be another one at every budget
    assert len(set(by_group.argmin(0).tolist())) > 1


def test_many_updates_are_one_and_a_reset_forgets() -> None:
    rollout, label = drawn(), labels()
    whole, pieces = InterventionCurve(BUDGETS, L, average="macro"), InterventionCurve(BUDGETS, L, average="macro")
    whole.update(rollout, label)
    pieces.update(drawn(seed=5), label)
    pieces.reset()
    for i in range(0, N, 7):
        pieces.update(part(rollout, slice(i, i + 7)), label[i : i + 7])
    expected, found = whole.compute(), pieces.compute()
    assert expected.keys() == found.keys()
    assert torch.equal(expected["balanced_acc"], found["balanced_acc"])
    assert torch.equal(expected["concept_acc"], found["concept_acc"])
    for name in expected:
        torch.testing.assert_close(expected[name], found[name])


def test_double_precision_and_half_precision_logits_are_taken() -> None:
    rollout, label = drawn(), labels()
    expected = None
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        curve = InterventionCurve(BUDGETS, L)
        curve.update(rollout._replace(logits=rollout.logits.bfloat16().to(dtype)), label)
        found = curve.compute()
        assert all(x.dtype == torch.float32 for x in found.values())
        expected = expected or found
        torch.testing.assert_close(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    curve = InterventionCurve([0, 1], L)
    with pytest.raises(ValueError, match="rollout: expected 2 budgets, got 3"):
        curve.update(drawn(), labels())
    with pytest.raises(ValueError, match="average: expected 'micro' or 'macro', got 'weighted'"):
        InterventionCurve(BUDGETS, L, average="weighted")


# ---------------------------------------------------------------- summaries


def test_summaries_by_hand_with_uneven_budgets() -> None:
    budgets = [0, 1, 4]
    scores = torch.tensor([[0.5, 0.7, 0.9], [0.5, 0.4, 0.6]])
    # trapezoids: (1 * .6 + 3 * .8) / 4 and (1 * .45 + 3 * .5) / 4
    torch.testing.assert_close(area(budgets, scores), torch.tensor([0.75, 0.4875]))
    torch.testing.assert_close(gain(budgets, scores), torch.tensor([0.25, -0.0125]))
    torch.testing.assert_close(monotonicity(scores), torch.tensor([1.0, 0.5]))
    reached = budget_to_reach(budgets, scores, torch.tensor([0.7, 0.7]))
    assert reached[0] == 1
    assert reached[1].isnan()
    assert budget_to_reach(budgets, scores, 0.5).tolist() == [0, 0]
    # the middles are .7 and .55
    assert halving_budget(budgets, scores, 4).tolist() == [1, 4]
    # the end of these budgets is not that of a head on true concepts
    assert halving_budget(budgets, scores, 5).isnan().all()


def test_a_budget_that_halves_nothing_is_none() -> None:
    assert halving_budget([0, 1, 2], torch.tensor([0.9, 0.95, 0.9]), 2).isnan()
    assert halving_budget([0, 1, 2], torch.tensor([0.9, 0.95, 0.8]), 2).isnan()


def test_half_the_units_is_the_nearest_budget() -> None:
    losses = torch.tensor([2.0, 1.5, 1.0, 0.5])
    assert intervenability([0, 1, 3, 6], losses, 6) == 1.0
    # of two as near the smaller one
    assert intervenability([0, 2, 3, 5], losses, 5) == 0.5
    # no budget is half of all units, though one is half of the largest budget
    assert intervenability([0, 1, 2, 3], losses, 10).isnan()


def test_one_budget_alone() -> None:
    scores = torch.tensor([[0.5]])
    found = summarize([0], 3, scores, scores)
    assert found["auc"] == found["final"] == 0.5
    assert found["gain"] == 0
    assert found["monotonicity"].isnan()
    assert found["halving_budget"].isnan()
    assert found["intervenability"].isnan()


def test_summaries_are_means_over_trials() -> None:
    budgets, losses = [0, 2], torch.tensor([[1.0, 0.5], [1.0, 0.1]])
    found = summarize(budgets, 2, torch.tensor([[0.5, 0.7], [0.5, 0.9]]), losses, target=0.7)
    expected = {"auc": 0.65, "gain": 0.15, "final": 0.8, "monotonicity": 1.0, "halving_budget": 2.0}
    assert {name: pytest.approx(float(found[name])) for name in expected} == expected
    assert found["target_budget"] == 2
    # neither 0 nor 2 is half of the units
    assert found["intervenability"].isnan()
    assert "target_budget" not in summarize(budgets, 2, losses, losses)


# ---------------------------------------------------------------- falls


def test_a_fall_is_told_in_numbers() -> None:
    scores = {
        "ucp": torch.tensor([0.9, 0.8, 0.6]),
        "rand": torch.tensor([0.7, 0.85, 0.75]),
        "up": torch.tensor([0.1] * 3),
    }
    message = describe_fall([0, 2, 8], scores, 1000, "group")
    assert message is not None
    assert "(1000 samples)" in message
    assert "ucp: from 0.900 uncorrected to 0.600 with 8 groups corrected" in message
    assert "rand: from 0.850 with 2 corrected to 0.750 with 8 groups corrected (0.700 uncorrected)" in message
    assert "up:" not in message
    assert "with 1 concept corrected" in str(describe_fall([0, 1], {"a": torch.tensor([0.9, 0.1])}, 99, "concept"))


@pytest.mark.parametrize(
    ("curve", "samples"),
    [
        ([0.5, 0.6, 0.9], 10_000),  # a rise
        ([0.5, 0.4, 0.5], 10_000),  # it comes back
        ([0.90, 0.88, 0.85], 100),  # two standard errors are .09
        ([0.999, 0.998, 0.9945], 10**7),  # clear, but less than half a point
        ([1.0, 1.0, 1.0], 10),
    ],
)
def test_what_is_no_fall_is_not_told(curve: list[float], samples: int) -> None:
    assert describe_fall([0, 1, 2], {"ucp": torch.tensor(curve)}, samples, "concept") is None


def test_the_same_fall_is_told_of_more_samples() -> None:
    curve = {"ucp": torch.tensor([0.90, 0.88, 0.85])}
    assert describe_fall([0, 1, 2], curve, 10_000, "concept") is not None


def test_scores_that_are_no_share_of_samples_are_looked_at_too() -> None:
    """Kappa lies between -1 and 1, where ``p (1 - p)`` is no variance."""
    found = [
        describe_fall([0, 1], {"ucp": torch.tensor(curve)}, 10**6, "concept") for curve in ([0.1, -0.3], [-0.3, 0.1])
    ]
    assert found[0] is None or "to -0.300" in found[0]
    assert found[1] is None
