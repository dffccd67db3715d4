"""Policies that learn from the training or the validation split."""

from __future__ import annotations

import pytest
import torch
from golden_models import engine_of, planned, samples_of
from sklearn.metrics import roc_auc_score
from small_models import CONCEPTS, MIXED, MODELS, small_model, small_samples
from torch import Tensor
from torch.nn.functional import cross_entropy

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.heads import MLPHead
from cbm_lightning.interventions import InterventionEngine, Policy, Samples, State
from cbm_lightning.interventions.policies import (
    BehaviouralCloning,
    GlobalGreedy,
    GlobalOrder,
    GlobalValidationError,
    GlobalValidationImprovement,
    GreedyOracle,
)
from cbm_lightning.interventions.policies.global_validation import quality, rank_scores
from cbm_lightning.types import Features, Intervention


def alone(rows: Tensor) -> Tensor:
    """One process has all rows."""
    return rows


def fitted(policy: Policy, engine: InterventionEngine, *blocks: Samples) -> Policy:
    policy.build(engine.units)
    with torch.inference_mode():
        policy.fit([engine.start(block) for block in blocks], alone)
    return policy


def accuracy(model: CBMModule, samples: Samples, mask: Tensor) -> tuple[float, float]:
    """Label accuracy and cross-entropy with some concepts of every sample corrected."""
    logits = model.intervene(samples.prediction, Intervention(mask, samples.answers.told)).logits
    return (logits.argmax(-1) == samples.label).double().mean().item(), cross_entropy(logits, samples.label).item()


# ---------------------------------------------------------------- validation error


@pytest.mark.parametrize("thresholded", [False, True])
def test_validation_error_is_how_near_the_auroc_is_to_one_half(thresholded: bool) -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model, 61, missing=0.2)
    policy = fitted(GlobalValidationError(thresholded), engine, samples)
    probs, truth = samples.prediction.concepts.probs, samples.answers.truth
    predicted = (probs >= 0.5).float() if thresholded else probs
    known = ~truth.isnan()
    aurocs = [roc_auc_score(truth[known[:, k], k], predicted[known[:, k], k]) for k in range(len(CONCEPTS))]
    expected = torch.tensor([1 / abs(auroc - 0.5) for auroc in aurocs], dtype=torch.float32)
    torch.testing.assert_close(policy.unit_scores, expected, rtol=1e-3, atol=1e-4)
    by_group = fitted(GlobalValidationError(thresholded), engine_of(model, "group", reduce="max"), samples)
    members = [expected[:2].max(), expected[2:5].max(), expected[5]]
    torch.testing.assert_close(by_group.unit_scores, torch.stack(members), rtol=1e-3, atol=1e-4)


def test_validation_error_without_two_outcomes_comes_last() -> None:
    model = MODELS["mixed"]()
    samples = small_samples(model, 61)
    samples.answers.truth[:, MIXED.index("wet")] = 1.0
    policy = fitted(GlobalValidationError(), engine_of(model), samples)
    silent = torch.tensor([name in ("weight", "wet") for name in MIXED])
    assert (policy.unit_scores[silent] == 0).all()
    assert (policy.unit_scores[~silent] > 0).all()


# ---------------------------------------------------------------- validation improvement, greedy


@pytest.mark.parametrize("unit", ["concept", "group"])
def test_improvement_is_that_of_each_unit_alone(unit: str) -> None:
    model = MODELS["logits"]()
    engine, samples = engine_of(model, unit), small_samples(model, 31)
    policy = fitted(GlobalValidationImprovement(), engine, samples)
    gains = []
    for members in engine.units.membership:
        right, loss = accuracy(model, samples, members.expand(len(samples), -1))
        gains.append((right, -loss))
    expected = sorted(range(len(gains)), key=lambda u: gains[u], reverse=True)
    assert policy.unit_scores.argsort(descending=True).tolist() == expected


def test_global_greedy_adds_the_best_unit_each_time() -> None:
    model = small_model(LinearBottleneck("sigmoid"), MLPHead([9]))
    engine, samples = engine_of(model), small_samples(model, 31)
    policy = fitted(GlobalGreedy(), engine, samples)
    mask, order = torch.zeros(len(samples), len(CONCEPTS), dtype=torch.bool), []
    while len(order) < len(CONCEPTS):
        gains = {}
        for k in set(range(len(CONCEPTS))) - set(order):
            tried = mask.clone()
            tried[:, k] = True
            right, loss = accuracy(model, samples, tried)
            gains[k] = (right, -loss)
        order.append(max(gains, key=lambda k: gains[k]))
        mask[:, order[-1]] = True
    assert policy.unit_scores.argsort(descending=True).tolist() == order
    assert torch.equal(planned(engine, samples, policy)[0].argsort(), torch.tensor(order))


def test_equal_qualities_keep_the_order_of_the_units() -> None:
    best_first = rank_scores([(0.5, -1.0), (0.9, -1.0), (0.5, -1.0), (0.5, -0.3)]).argsort(descending=True)
    assert best_first.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("policy", [GlobalValidationError, GlobalValidationImprovement, GlobalGreedy])
def test_blocks_and_repeated_samples_do_not_matter(policy: type[GlobalOrder]) -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model, 31, missing=0.2)
    other = small_samples(model, 12, seed=5)
    whole = fitted(policy(), engine, Samples.cat([samples, other]))
    repeated = Samples.cat([other, other])
    repeated.counted[len(other) :] = False
    parts = fitted(policy(), engine, samples, repeated)
    torch.testing.assert_close(whole.unit_scores, parts.unit_scores)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_quality_of_other_labels(task: str) -> None:
    model = MODELS[task]()
    engine, samples = engine_of(model), small_samples(model, 31)
    with torch.inference_mode():
        right, gain = quality([engine.start(samples)], [0, 3], alone)
    mask = torch.zeros(len(samples), len(CONCEPTS), dtype=torch.bool)
    mask[:, [0, 3]] = True
    logits = model.intervene(samples.prediction, Intervention(mask, samples.answers.told)).logits
    label = samples.label.view(len(samples), -1).float()
    assert right == pytest.approx(((logits >= 0).float() == label).float().mean().item())
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, label)
    assert gain == pytest.approx(-loss.item(), rel=1e-5)


@pytest.mark.parametrize("unanswered", ["skip", "spend"])
def test_the_quality_of_questions_in_vain_is_that_of_the_answers(unanswered: str) -> None:
    model = MODELS["logits"]()
    engine, samples = engine_of(model, unanswered=unanswered), small_samples(model, 31, missing=0.4)
    with torch.inference_mode():
        found = quality([engine.start(samples)], range(len(CONCEPTS)), alone)
    right, loss = accuracy(model, samples, samples.answers.answerable)
    assert found == pytest.approx((right, -loss), rel=1e-5)


# ---------------------------------------------------------------- behavioural cloning


def agreement(policy: Policy, states: list[State]) -> float:
    """How often a policy chooses what the greedy oracle chooses."""
    with torch.inference_mode():
        same = [
            (
                policy.score(state).masked_fill(state.mask, -torch.inf).argmax(-1)
                == GreedyOracle().score(state).argmax(-1)
            )
            for state in states
        ]
    return torch.cat(same).float().mean().item()


def doubtful(n: int, seed: int) -> Samples:
    """The label follows from the concepts; each sample is in doubt about one of them and right about the others."""
    generator = torch.Generator().manual_seed(seed)
    model = small_model(LinearBottleneck("sigmoid"))
    concepts = (torch.rand(n, len(CONCEPTS), generator=generator) < 0.5).float()
    logits = 8 * concepts - 4
    doubt = torch.randint(len(CONCEPTS), (n, 1), generator=generator)
    logits.scatter_(1, doubt, torch.rand(n, 1, generator=generator) - 0.5)
    output = model.bottleneck.make_output(Features(torch.zeros(n, 1)), logits)
    with torch.no_grad():
        label = model.head(output.replace(values=concepts)).argmax(-1)
        return samples_of(model.decide(output), concepts, label)


def test_cloning_learns_what_the_oracle_would_ask() -> None:
    engine = engine_of(small_model(LinearBottleneck("sigmoid")))
    policy = fitted(BehaviouralCloning([64], num_samples=1500, epochs=60), engine, doubtful(300, seed=1))
    start = engine.start(doubtful(300, seed=2))
    # at the start, and with other concepts corrected in each sample
    asked = (torch.arange(len(CONCEPTS)) + torch.arange(300)[:, None]) % len(CONCEPTS) < 2
    states = [start, start.corrected(asked)]
    reached, chance = agreement(policy, states), agreement(Policy.make("rand"), states)
    assert reached > chance + 0.3, f"agrees with the oracle in {reached:.2f} of decisions, chance in {chance:.2f}"


def test_cloning_is_reproducible_and_leaves_the_global_draws_alone() -> None:
    model = MODELS["embedding"]()
    engine, samples = engine_of(model, "group"), small_samples(model, 40, missing=0.2)
    before = torch.get_rng_state()
    first = planned(engine, samples, fitted(BehaviouralCloning([8], 100, 3), engine, samples))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = planned(engine, samples, fitted(BehaviouralCloning([8], 100, 3), engine, samples))
    other = planned(engine, samples, fitted(BehaviouralCloning([8], 100, 3, seed=1), engine, samples))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(weight.grad is None for weight in model.parameters())


def test_cloning_never_learns_from_concepts_that_nobody_knows() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model, 40)
    samples.answers.answerable[:, :5] = False
    policy = fitted(BehaviouralCloning([8], 200, 10), engine, samples)
    with torch.inference_mode():
        scores = policy.score(engine.start(samples))
    assert (scores.argmax(-1) == 5).all()
    samples.answers.answerable[:] = False
    with pytest.raises(ValueError, match="found no sample with a concept to correct"):
        fitted(BehaviouralCloning([8], 3, 1), engine, samples)


def test_cloning_refuses_numbers_that_are_not_positive() -> None:
    for options in ({"num_samples": 0}, {"epochs": 0}, {"lr": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: expected a positive number"):
            BehaviouralCloning(**options)
