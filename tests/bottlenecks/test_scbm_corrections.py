"""Corrections of the stochastic bottleneck, against the textbook conditional of each sample."""

from __future__ import annotations

import math

import numpy as np
import torch
from bottlenecks.stochastic_models import GROUPED, covariance_of, make, predict
from golden_models import engine_of, planned
from small_models import CONCEPTS, small_model, small_samples
from torch import Tensor

from cbm_lightning.bottlenecks import StochasticBottleneck
from cbm_lightning.interventions import Policy
from cbm_lightning.interventions.gaussian import ConfidenceRegionValues
from cbm_lightning.randomness import step_generator
from cbm_lightning.types import Features, Intervention


def given(mean: Tensor, covariance: Tensor, known: list[int], told: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Textbook conditional of one sample, in double precision."""
    mean, covariance, told = mean.double(), covariance.double(), told.double()
    free = [k for k in range(len(mean)) if k not in known]
    gain = covariance[free][:, known] @ torch.linalg.inv(covariance[known][:, known])
    return (
        mean[free] + gain @ (told - mean[known]),
        covariance[free][:, free] - gain @ covariance[known][:, free],
        free,
    )


def test_a_correction_conditions_the_others() -> None:
    bottleneck = make(samples=500)
    output = predict(bottleneck, 4)
    mask = torch.tensor([[True, False, False], [False, True, True], [False] * 3, [True] * 3])
    values = torch.tensor([[1.0, 9, 9], [9, 0.0, 0.3], [9] * 3, [1.0, 0.0, 1.0]])
    found = bottleneck.intervene(output, Intervention(mask, values))
    low, high = math.log(0.05 / 0.95), math.log(0.95 / 0.05)
    for b in range(4):
        known = mask[b].nonzero().flatten().tolist()
        assert torch.equal(found.values[:, b, known], values[b, known].expand(500, -1))
        assert torch.equal(found.probs[b, known], values[b, known])
        if not known or len(known) == 3:
            continue
        told = low + (high - low) * values[b, known]
        mean, covariance, free = given(output.logits[b], covariance_of(output)[b], known, told)
        torch.testing.assert_close(found.uncertainty[b, free].double(), covariance.diagonal().sqrt(), rtol=0, atol=1e-3)
        factor = torch.linalg.cholesky(covariance)
        scores = mean + bottleneck.normal[:, free].double() @ factor.T
        torch.testing.assert_close(found.probs[b, free].double(), scores.sigmoid().mean(0), rtol=0, atol=1e-4)
        drawn = (scores + bottleneck.noise.fixed[:, free] > 0).float()
        assert (found.values[:, b, free] != drawn).float().mean() < 0.01
    assert torch.equal(found.values[:, 2], output.values[:, 2])
    assert torch.equal(found.probs[2], output.probs[2])
    torch.testing.assert_close(found.uncertainty[2], output.uncertainty[2])
    assert found.features is output.features
    assert found.distribution is output.distribution


def test_a_partner_moves_along_and_an_opponent_away() -> None:
    bottleneck = make("empirical", samples=400)
    with torch.no_grad():
        bottleneck.mean.weight.zero_()
        bottleneck.mean.bias.zero_()
    together = 4 * torch.tensor([[1.0, 0.9, -0.9], [0.9, 1.0, -0.8], [-0.9, -0.8, 1.0]])
    bottleneck.factor.copy_(torch.linalg.cholesky(together))
    output = predict(bottleneck, 1)
    mask = torch.tensor([[True, False, False]])
    present, absent = (bottleneck.intervene(output, Intervention(mask, torch.full((1, 3), c))) for c in (1.0, 0.0))
    torch.testing.assert_close(output.probs, torch.full((1, 3), 0.5), rtol=0, atol=0.05)
    assert present.probs[0, 1] > 0.85
    assert present.probs[0, 2] < 0.15
    torch.testing.assert_close(absent.probs[0, 1:], 1 - present.probs[0, 1:], rtol=0, atol=0.05)
    assert (present.values[:, 0, 1].mean() - absent.values[:, 0, 1].mean()) > 0.7


def test_a_value_strategy_says_what_the_others_are_conditioned_on() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    mask = torch.tensor([True, False, False]).expand(5, 3)
    ones, weak = torch.ones(5, 3), torch.full((5, 3), 0.4)
    by_itself = bottleneck.intervene(output, Intervention(mask, ones))
    high = bottleneck.value_range[1]
    same = bottleneck.intervene(output, Intervention(mask, ones, high.expand(5, 3)))
    firm = bottleneck.intervene(output, Intervention(mask, ones, weak))
    assert torch.equal(same.values, by_itself.values)
    assert not torch.equal(firm.probs[:, 1:], by_itself.probs[:, 1:])
    # the head reads what was told, however firmly
    assert torch.equal(firm.values[..., 0], torch.ones(40, 5))


def test_percentiles_of_training_scores_replace_the_constant_ones() -> None:
    bottleneck = make()
    torch.testing.assert_close(bottleneck.value_range.sigmoid(), torch.tensor([[0.05] * 3, [0.95] * 3]))
    scores = torch.randn(1001, 3) * torch.tensor([1.0, 2.0, 3.0]) + 1
    bottleneck.fit_statistics(scores, scores.sigmoid())
    expected = np.percentile(scores.numpy(), [5, 95], axis=0)
    torch.testing.assert_close(bottleneck.value_range, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-5)


def test_what_is_taken_out_says_nothing_of_the_others() -> None:
    bottleneck = make()
    output = predict(bottleneck, 5)
    mask = torch.tensor([True, True, False]).expand(5, 3)
    without = bottleneck.intervene(output, Intervention(mask, torch.tensor([math.nan, 1.0, 0.0]).expand(5, 3)))
    alone = bottleneck.intervene(output, Intervention(mask & torch.tensor([False, True, True]), torch.ones(5, 3)))
    assert not without.values[..., 0].any()
    assert torch.equal(without.values[..., 1:], alone.values[..., 1:])
    assert torch.equal(without.probs, alone.probs)
    assert without.probs.isfinite().all()
    nothing = bottleneck.intervene(output, Intervention(mask, torch.full((5, 3), math.nan)))
    assert torch.equal(nothing.values[..., 2], output.values[..., 2])
    assert torch.equal(nothing.probs, output.probs)


def test_one_after_another_is_all_at_once() -> None:
    bottleneck = make(concepts=CONCEPTS)
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
    again = bottleneck.intervene(step, Intervention(torch.zeros(8, 6).bool(), values))
    assert torch.equal(again.values, step.values)
    changed = bottleneck.intervene(step, Intervention(first, 1 - values))
    assert torch.equal(changed.probs[first & ~values.isnan()], (1 - values)[first & ~values.isnan()])


def test_nothing_remains_of_what_is_taken_back() -> None:
    bottleneck = make(concepts=CONCEPTS)
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


def test_of_a_group_the_member_that_was_told_is_drawn() -> None:
    bottleneck = make(concepts=GROUPED, strength=0.5)
    output = predict(bottleneck, 4)
    mask = torch.tensor([False, False, True, False]).expand(4, 4)
    present = bottleneck.intervene(output, Intervention(mask, torch.ones(4, 4)))
    assert torch.equal(present.values[..., [0, 2, 3]], torch.tensor([0.0, 1.0, 0.0]).expand(40, 4, 3))
    torch.testing.assert_close(present.probs[:, [0, 3]], torch.zeros(4, 2))
    absent = bottleneck.intervene(output, Intervention(mask, torch.zeros(4, 4)))
    assert not absent.values[..., 2].any()
    assert torch.equal(absent.values[..., [0, 3]].sum(-1), torch.ones(40, 4))


def test_corrections_in_training_pass_gradients_to_the_others() -> None:
    bottleneck = make(strength=0.4).train()
    x = torch.randn(6, 5)
    mask = torch.tensor([True, False, False]).expand(6, 3)
    with bottleneck.drawing(step_generator(0)):
        output = bottleneck(Features(x))
        corrected = bottleneck.intervene(output, Intervention(mask, torch.ones(6, 3)))
    corrected.values[..., 1:].sum().backward()
    gradients = [weight.grad for weight in bottleneck.parameters()]
    assert all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
    # the first mean is seen by the surprise that its correction is
    assert bottleneck.mean.weight.grad[0].abs().sum() > 0


def test_concepts_that_cannot_be_told_apart_are_corrected_all_the_same() -> None:
    bottleneck = make("empirical")
    bottleneck.factor.copy_(torch.tensor([[1.0, 0, 0], [1.0, 1e-6, 0], [0.5, 0, 1.0]]))
    output = predict(bottleneck, 3)
    mask = torch.tensor([True, True, False]).expand(3, 3)
    found = bottleneck.intervene(output, Intervention(mask, torch.ones(3, 3)))
    assert found.probs.isfinite().all()
    one = bottleneck.intervene(output, Intervention(mask & torch.tensor([True, False, False]), torch.ones(3, 3)))
    assert (one.uncertainty[:, 1] < 0.01).all()


def test_confidence_regions_are_made_for_it() -> None:
    model = small_model(StochasticBottleneck(samples=50))
    samples = small_samples(model)
    values = ConfidenceRegionValues()
    values.build(CONCEPTS)
    engine = engine_of(model, values=values)
    steps = planned(engine, samples, Policy.make("ucp"))
    with torch.inference_mode():
        found = engine.rollout(samples, steps, range(7))
    torch.testing.assert_close(found.logits[0], samples.prediction.logits)
    told = model.head.linear(samples.answers.told)
    torch.testing.assert_close(found.logits[-1].softmax(-1), told.softmax(-1))
    # half-way, the free concepts have moved
    assert not torch.allclose(found.logits[3], engine_of(model).rollout(samples, steps, [3]).logits[0], atol=1e-4)
