"""Corrections of the autoregressive bottleneck, against exact enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from bottlenecks.autoregressive_models import GROUPED, chances, make, predict, score
from golden_models import engine_of, planned
from small_models import CONCEPTS, small_model, small_samples

from cbm_lightning.bottlenecks import AutoregressiveBottleneck
from cbm_lightning.bottlenecks.autoregressive import systematic
from cbm_lightning.interventions import Policy
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import Features, Intervention


@pytest.mark.parametrize("told", [{0: 1}, {1: 0}, {2: 1}, {0: 0, 2: 1}, {1: 1, 2: 0}])
def test_corrections_condition_on_all_concepts(told: dict[int, int]) -> None:
    bottleneck = make(samples=20000, strength=0.7)
    output = predict(bottleneck, 2)
    mask = torch.zeros(2, 3).bool()
    values = torch.full((2, 3), 0.123)
    for k, c in told.items():
        mask[:, k], values[:, k] = True, c
    found = bottleneck.intervene(output, Intervention(mask, values))
    for b in range(2):
        exact = chances(bottleneck, output.features.pooled[b])
        left = {row: p for row, p in exact.items() if all(row[k] == c for k, c in told.items())}
        total = sum(left.values())
        for k in range(3):
            expected = sum(p for row, p in left.items() if row[k]) / total
            assert found.probs[b, k].item() == pytest.approx(expected, abs=0.02)
            assert found.values[:, b, k].mean().item() == pytest.approx(expected, abs=0.02)
    assert torch.equal(found.values[..., mask[0]], values[:, mask[0]].expand(20000, 2, -1))
    assert found.features is output.features


def test_nothing_everything_and_soft_corrections() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    values = torch.tensor([[1.0, 0.0, 0.3]]).expand(5, 3)
    nothing = bottleneck.intervene(output, Intervention(torch.zeros(5, 3).bool(), values))
    assert torch.equal(nothing.values, output.values)
    assert torch.equal(nothing.probs, output.probs)
    everything = bottleneck.intervene(output, Intervention(torch.ones(5, 3).bool(), values))
    assert torch.equal(everything.values, values.expand(40, 5, 3))
    assert torch.equal(everything.probs, values)
    row = torch.arange(5) == 2
    one = bottleneck.intervene(output, Intervention(row[:, None] & torch.tensor([True, False, True]), values))
    assert torch.equal(one.values[:, ~row], output.values[:, ~row])
    assert torch.equal(one.values[:, 2, [0, 2]], values[2, [0, 2]].expand(40, 2))


def test_a_later_correction_reweighs_and_an_earlier_one_draws_anew() -> None:
    bottleneck = make()
    output = predict(bottleneck, 1)
    ones = torch.ones(1, 3)
    first = bottleneck.intervene(output, Intervention(torch.tensor([[True, False, False]]), ones))
    x = output.features.pooled[0]
    expected = 1 / (1 + math.exp(-score(bottleneck, x, 1, {0: 1.0})))
    assert first.probs[0, 1].item() == pytest.approx(expected, abs=1e-4)
    last = bottleneck.intervene(output, Intervention(torch.tensor([[False, False, True]]), ones))
    logits = [score(bottleneck, x, 2, dict(enumerate(row[:2].tolist()))) for row in output.values[:, 0]]
    weight = torch.tensor(logits).sigmoid()
    kept = ((output.values[:, 0, :2] * weight[:, None]).sum(0) / weight.sum()).tolist()
    # up to the rounding of 40 equally weighted draws
    assert last.values[:, 0, :2].mean(0).tolist() == pytest.approx(kept, abs=0.03)
    assert {tuple(row) for row in last.values[:, 0, :2].tolist()} <= {
        tuple(r) for r in output.values[:, 0, :2].tolist()
    }


def test_equal_weights_choose_each_draw_once() -> None:
    assert torch.equal(systematic(torch.full((2, 100), 0.01)), torch.arange(100).expand(2, 100))
    weight = torch.rand(5, 40).square()
    weight = weight / weight.sum(1, keepdim=True)
    count = torch.stack([row.bincount(minlength=40) for row in systematic(weight)])
    assert count.sum(1).tolist() == [40] * 5
    assert ((count - 40 * weight).abs() < 1).all()


def test_what_is_taken_out_says_nothing_of_the_others() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    mask = torch.tensor([True, True, False]).expand(5, 3)
    without = bottleneck.intervene(output, Intervention(mask, torch.tensor([math.nan, 1.0, 0.0]).expand(5, 3)))
    alone = bottleneck.intervene(output, Intervention(mask & torch.tensor([False, True, True]), torch.ones(5, 3)))
    assert not without.values[..., 0].any()
    assert torch.equal(without.values[..., 1:], alone.values[..., 1:])
    assert torch.equal(without.probs, alone.probs)


def test_one_after_another_is_all_at_once() -> None:
    bottleneck = make(CONCEPTS)
    output = predict(bottleneck, 8)
    first, both = torch.rand(8, 6) < 0.4, torch.rand(8, 6) < 0.3
    both = both | first
    values = (torch.rand(8, 6) < 0.5).float()
    values[0, first[0]] = math.nan
    step = bottleneck.intervene(output, Intervention(first, values))
    step = bottleneck.intervene(step, Intervention(both & ~first, values))
    at_once = bottleneck.intervene(output, Intervention(both, values))
    for found, expected in zip(step.tensors(), at_once.tensors(), strict=True):
        assert torch.equal(found.nan_to_num(nan=7), expected.nan_to_num(nan=7))
    changed = bottleneck.intervene(step, Intervention(first, 1 - values))
    assert torch.equal(changed.probs[first & ~values.isnan()], (1 - values)[first & ~values.isnan()])


def test_nothing_remains_of_what_is_taken_back() -> None:
    bottleneck = make(CONCEPTS)
    output = predict(bottleneck, 4)
    first = torch.eye(4, 6, dtype=torch.bool)
    first[3] = False
    step = bottleneck.intervene(output, Intervention(first, torch.ones(4, 6)))
    assert not torch.equal(step.probs[:3], output.probs[:3])
    # of the first sample nothing else is told, of the second another concept is
    back, other = first.clone(), torch.zeros_like(first)
    other[1, 4] = True
    values = torch.where(back, torch.nan, 1.0)
    found = bottleneck.intervene(step, Intervention(back | other, values))
    expected = bottleneck.intervene(output, Intervention(back | other, values))
    for one, another in zip(found.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one.nan_to_num(nan=7), another.nan_to_num(nan=7))


@pytest.mark.parametrize("told", [{3: 1.0}, {3: 0.0}, {1: 0.0, 3: 0.0}, {2: 1.0}, {2: 1.0, 4: 0.0}])
def test_members_of_a_group_exclude_each_other(told: dict[int, float]) -> None:
    bottleneck = make(GROUPED, samples=20000, strength=0.7)
    output = predict(bottleneck, 1)
    mask, values = torch.zeros(1, 5).bool(), torch.zeros(1, 5)
    for k, c in told.items():
        mask[:, k], values[:, k] = True, c
    found = bottleneck.intervene(output, Intervention(mask, values))
    assert torch.equal(found.values[..., [1, 3, 4]].sum(-1), torch.ones(20000, 1))
    # those of the plain draws that agree
    agree = (output.values[:, 0] == values[0])[:, mask[0]].all(1)
    expected = output.values[agree, 0].mean(0)
    torch.testing.assert_close(found.values[:, 0].mean(0), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(found.probs[0], expected, rtol=0, atol=0.03)


def test_corrections_in_training_pass_gradients_and_use_draws_of_the_step() -> None:
    bottleneck = make(training_samples=4).train()
    x, concepts = torch.randn(6, 5), torch.ones(6, 3)
    mask = torch.tensor([True, False, False]).expand(6, 3)
    found = []
    for _ in range(2):
        with bottleneck.drawing(step_generator(0)):
            output = bottleneck(Features(x), concepts)
            found.append(bottleneck.intervene(output, Intervention(mask, concepts)).values)
    assert torch.equal(*found)
    assert found[0].shape == (4, 6, 3)
    found[0][..., 1:].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in bottleneck.parameters())
    assert bottleneck.from_concepts.grad[1, :, 0].abs().sum() > 0


def test_the_engine_corrects_it_concept_by_concept() -> None:
    model = small_model(AutoregressiveBottleneck(hidden=4, samples=60))
    samples = small_samples(model)
    engine = engine_of(model)
    steps = planned(engine, samples, Policy.make("ucp"))
    with torch.inference_mode():
        found = engine.rollout(samples, steps, range(7))
    torch.testing.assert_close(found.logits[0], samples.prediction.logits)
    told = model.head.linear(samples.answers.told)
    torch.testing.assert_close(found.logits[-1].softmax(-1), told.softmax(-1))
