"""Grouped probes against probes one by one, and the numbers that are read off them."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn
from torch.nn.functional import cross_entropy

from cbm_lightning.metrics.leakage.evidence import cross_splits, mean_and_error, representation, subsample
from cbm_lightning.metrics.leakage.probes import (
    Probes,
    auroc,
    concept_loss,
    fit_probes,
    label_correct,
    label_nll,
    out_of_fold,
    standardised,
    temper,
)
from cbm_lightning.types import ConceptOutput, Features, ValueLayout


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_groups_are_networks_of_their_own() -> None:
    probes = Probes(3, 4, 2, 5, generator())
    x = torch.randn(3, 10, 4)
    for group in range(3):
        first, second = nn.Linear(4, 5), nn.Linear(5, 2)
        for layer, i in ((first, 0), (second, 1)):
            layer.weight.data, layer.bias.data = probes.weights[i][group].T, probes.biases[i][group, 0]
        torch.testing.assert_close(probes(x)[group], second(first(x[group]).relu()))
    assert (Probes(2, 4, 2, 5, generator(), start_at_zero=True)(x[:2]) == 0).all()
    assert len(Probes(2, 4, 2, 0, generator()).weights) == 1


def test_a_group_learns_its_own_rows_and_is_stopped_by_others() -> None:
    x, target = torch.randn(1, 200, 1), torch.randn(200)
    target[:100] = 3 * x[0, :100, 0]  # the second half is noise
    fit = torch.zeros(2, 200, dtype=torch.bool)
    fit[0, :80], fit[1, 100:180] = True, True
    hold = torch.zeros_like(fit)
    hold[0, 80:100], hold[1, 180:] = True, True
    probes = Probes(2, 1, 1, 16, generator(), start_at_zero=True)

    def loss(outputs):
        return (outputs[..., 0] - target).square()

    outputs = fit_probes(probes, x, loss, fit, hold)
    learned = loss(outputs)[0, :100].mean()
    assert learned < 0.2 * target[:100].square().mean()
    # nothing to learn: hardly any better on held-out rows than at the start
    start = target[180:].square().mean()
    assert 0.8 * start < loss(outputs)[1, 180:].mean() <= start


def test_the_best_step_is_kept() -> None:
    """With one row to fit, every further step makes the held-out rows worse."""
    x = torch.eye(4).unsqueeze(0)
    label = torch.tensor([0, 1, 1, 1])
    fit, hold = torch.tensor([[True, False, False, False]]), torch.tensor([[False, True, True, True]])
    probes = Probes(1, 4, 2, 0, generator(), start_at_zero=True)
    outputs = fit_probes(probes, x, lambda out: label_nll(out, label[:, None], "multiclass"), fit, hold)
    assert (outputs == 0).all()


def test_likelihoods_are_those_of_torch() -> None:
    logits, label = torch.randn(2, 30, 4), torch.randint(0, 4, (30,))
    expected = torch.stack([cross_entropy(part, label, reduction="none") for part in logits])
    torch.testing.assert_close(label_nll(logits, label[:, None], "multiclass"), expected)
    bits = torch.randint(0, 2, (30, 4))
    expected = nn.functional.binary_cross_entropy_with_logits(logits[0], bits.float(), reduction="none").sum(1)
    torch.testing.assert_close(label_nll(logits, bits, "multilabel")[0], expected)
    one = label_nll(logits[..., :1], bits[:, :1], "binary")[0].mean().item()
    assert one == pytest.approx(log_loss(bits[:, 0], logits[0, :, 0].sigmoid()), abs=1e-5)
    assert label_correct(logits[0], label[:, None], "multiclass").tolist() == (logits[0].argmax(1) == label).tolist()
    right = ((logits[0] > 0) == bits.bool()).float().mean(1)
    torch.testing.assert_close(label_correct(logits[0], bits, "multilabel"), right)


def test_unknown_concepts_have_no_loss() -> None:
    logits = torch.randn(2, 5, 3)
    concepts = torch.rand(5, 3).round()
    concepts[0, 1] = torch.nan
    concepts[4] = torch.nan
    loss = concept_loss(logits, concepts)
    one = nn.functional.binary_cross_entropy_with_logits(logits[1, 0, [0, 2]], concepts[0, [0, 2]])
    assert loss[1, 0].item() == pytest.approx(one.item(), abs=1e-6)
    assert (loss[:, 4] == 0).all()


def test_the_temperature_is_found_a_group() -> None:
    label = torch.randint(0, 3, (3000, 1))
    true = 2.0 * nn.functional.one_hot(label[:, 0], 3) + torch.randn(3000, 3)
    scale = torch.tensor([0.2, 4.0])[:, None, None]
    hold = torch.ones(2, 3000, dtype=torch.bool)

    def loss(logits):
        return label_nll(logits, label, "multiclass")

    found = temper(scale * true, loss, hold)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    inverse = (found[0] / true).median()
    steps = [loss((inverse * factor * true).unsqueeze(0)).mean() for factor in (0.95, 1.0, 1.05)]
    assert steps[1] < min(steps[0], steps[2])


def test_columns_are_standardised_by_the_rows_to_fit_on() -> None:
    x = torch.randn(50, 3).double() * 5 + 100
    x[:, 2] = 7.0
    fit = torch.zeros(2, 50, dtype=torch.bool)
    fit[0, :20], fit[1, 20:] = True, True
    found = standardised(x, fit)
    expected = (x - x[:20].mean(0)) / x[:20].std(0, correction=0)
    torch.testing.assert_close(found[0, :, :2], expected[:, :2].float())
    assert (found[..., 2] == 0).all()


def test_every_row_is_taken_from_where_it_was_judged() -> None:
    splits = cross_splits(60, 3, 2)
    rows = torch.arange(6.0)[:, None].expand(6, 60)
    found = out_of_fold(rows, splits)
    for repeat in range(2):
        for fold in range(3):
            assert (found[repeat, splits.judge[repeat, fold]] == 3 * repeat + fold).all()
    splits.judge[0, 0] = False
    assert out_of_fold(rows, splits).isnan().any()


def test_areas_are_those_of_scikit_learn() -> None:
    scores = (torch.randn(3, 40) * 2).round()  # with ties
    targets = torch.randint(0, 2, (2, 40)).float()
    targets[1, :7] = torch.nan
    found = auroc(scores.unsqueeze(1), targets)
    for i in range(3):
        assert found[i, 0].item() == pytest.approx(roc_auc_score(targets[0], scores[i]))
        assert found[i, 1].item() == pytest.approx(roc_auc_score(targets[1, 7:], scores[i, 7:]))
    assert auroc(scores[0], torch.ones(40)).isnan()


def test_the_error_is_that_of_samples_and_repeats() -> None:
    one = torch.randn(1, 10000).double()
    value, error = mean_and_error(one)
    assert (value, error) == pytest.approx((one.mean().item(), one.std().item() / 100))
    # repeats that agree add nothing; repeats that differ do
    assert mean_and_error(one.expand(4, -1))[1] == pytest.approx(error)
    assert mean_and_error(torch.cat([one, one + 1]))[1] > 0.4


def test_a_draw_is_sorted_and_seeded() -> None:
    assert subsample(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    drawn = subsample(100, 10, 3)
    assert len(drawn.unique()) == 10
    assert (drawn.diff() > 0).all()
    assert torch.equal(drawn, subsample(100, 10, 3))
    assert not torch.equal(drawn, subsample(100, 10, 4))


def test_what_represents_a_concept() -> None:
    logits = torch.randn(4, 2)
    features = Features(torch.zeros(4, 1))
    values = torch.randn(4, 7)  # two concepts of three numbers, and one free number
    layout = ValueLayout(2, 3, 1)
    output = ConceptOutput(features, logits, logits.sigmoid(), values)
    own, extra = representation(output, layout)
    assert torch.equal(own, values[:, :6].view(4, 2, 3))
    assert torch.equal(extra, values[:, 6:])
    assert torch.equal(representation(output, layout, "logits")[0], logits.unsqueeze(-1))
    assert torch.equal(representation(output, layout, "probs")[0], logits.sigmoid().unsqueeze(-1))

    samples = ConceptOutput(features, logits, logits, torch.stack([values, values + 2]), sample_dim=True)
    torch.testing.assert_close(representation(samples, layout)[0], own + 1)
    steps = torch.stack([values, values + 2, torch.full_like(values, 1e9)], 1)
    real = torch.tensor([[True, True, False]]).expand(4, 3)
    clip = ConceptOutput(Features(features.pooled, steps, real), logits, logits, steps, time_dim=True)
    torch.testing.assert_close(representation(clip, layout)[0], own + 1)
    assert representation(output, ValueLayout(7), "values")[1] is None
