"""What every policy keeps to."""

from __future__ import annotations

import pytest
import torch
from golden_models import engine_of, planned
from small_models import CONCEPTS, MIXED, MODELS, small_model, small_samples
from torch import Tensor

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.interventions import InterventionEngine, Policy, State
from cbm_lightning.interventions.policies import (
    CCTP,
    ECTP,
    EUDTP,
    LCP,
    UCP,
    BehaviouralCloning,
    CooP,
    FixedOrder,
    GlobalOrder,
    LearnedPrior,
)
from cbm_lightning.interventions.ranking import NEVER

NAMES = sorted(name for name, policy in Policy.registry.items() if policy.__module__.startswith("cbm_lightning."))
STATIC = {"rand", "ucp", "lcp", "cctp", "ectp", "eudtp", "fixed", "global_error", "global_improvement", "global_greedy"}
ADAPTIVE = {"coop", "greedy", "prior", "cloning"}
DRAWS = {"rand", "prior"}


def ready(name: str, engine: InterventionEngine) -> Policy:
    """A policy with small defaults, built and fitted."""
    match name:
        case "fixed":
            policy: Policy = FixedOrder(list(engine.units.names[1:3]))
        case "cloning":
            policy = BehaviouralCloning([8], num_samples=24, epochs=2)
        case _:
            policy = Policy.make(name)
    policy.build(engine.units)
    if policy.fits_on:
        # more of them, lest an AUROC is one half
        policy.fit([engine.start(small_samples(engine.subject.model, 41, seed=2))], lambda rows: rows)
    return policy


def answering(model: CBMModule, units: int) -> CBMModule:
    """The model with a learned policy, for those that ask for it."""
    weight = torch.randn(units, model.bottleneck.layout.concepts)
    model.bottleneck.query_scores = lambda output, mask: (output.probs + mask.float()) @ weight.T
    return model


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> CBMModule:
    return MODELS[request.param]()


def test_the_registry_is_complete() -> None:
    assert set(NAMES) == STATIC | ADAPTIVE
    for name in NAMES:
        policy = FixedOrder([]) if name == "fixed" else Policy.make(name)
        assert policy.adaptive == (name in ADAPTIVE)
        assert policy.stochastic == (name in DRAWS)
        assert policy.label == name


@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_a_unit_and_orders_are_permutations(model: CBMModule, name: str, unit: str) -> None:
    engine = engine_of(model, unit)
    answering(model, len(engine.units))
    samples = small_samples(model, missing=0.3)
    with torch.inference_mode():
        policy = ready(name, engine)
        state = engine.start(samples)
        scores = policy.score(state)
    assert scores.shape == (len(samples), len(engine.units))
    assert scores.dtype == torch.float32
    assert not scores.isnan().any()
    assert (scores < torch.inf).all()
    # minus infinity only where there is nothing to ask
    can_be_asked = engine.units.touched(samples.answers.answerable)
    assert scores.isfinite()[can_be_asked].all()
    steps = planned(engine, samples, policy)
    assert torch.equal(steps == NEVER, ~can_be_asked)
    for row, number in zip(steps, can_be_asked.sum(1).tolist(), strict=True):
        assert row[row != NEVER].sort().values.tolist() == list(range(1, number + 1))


@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_masks_are_nested_and_leave_unknown_concepts_alone(name: str, unit: str) -> None:
    model = MODELS["logits"]()
    engine = engine_of(model, unit)
    answering(model, len(engine.units))
    samples = small_samples(model, missing=0.3)
    with torch.inference_mode():
        policy = ready(name, engine)
    steps = planned(engine, samples, policy)
    budgets = range(len(engine.units) + 1)
    masks = [engine.units.expand(steps <= budget) & samples.answers.answerable for budget in budgets]
    with torch.inference_mode():
        rollout = engine.rollout(samples, steps, budgets)
    for budget, mask in zip(budgets, masks, strict=True):
        assert (mask | ~masks[budget - 1]).all() or budget == 0
        assert torch.equal(rollout.corrected[budget], mask.sum(1))
        expected = engine.start(samples).corrected(mask).prediction.logits
        torch.testing.assert_close(rollout.logits[budget], expected)
    assert torch.equal(masks[-1], samples.answers.answerable)


@pytest.mark.parametrize(("policy", "agree"), [(UCP, True), (LCP, True), (CCTP, True), (ECTP, False), (EUDTP, False)])
def test_static_and_adaptive_orders(policy: type[Policy], agree: bool) -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model)
    static, adaptive = (planned(engine, samples, policy(adaptive=adaptive)) for adaptive in (False, True))
    # the label moves with each correction; the concepts of this model that nobody corrected do not
    assert torch.equal(static, adaptive) == agree
    assert torch.equal(static == 1, adaptive == 1)


def test_an_adaptive_plan_stops_at_the_last_budget() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model)
    whole, part = planned(engine, samples, CooP()), planned(engine, samples, CooP(), last=2)
    assert torch.equal(part, whole.masked_fill(whole > 2, NEVER))


class Constant(Policy):
    """Finds all units equally good, or the first one by far, whatever was asked before."""

    def __init__(self, adaptive: bool, best: float = 0.0) -> None:
        super().__init__(adaptive=adaptive)
        self.best = best

    def score(self, state: State) -> Tensor:
        scores = torch.zeros(len(state.probs), len(state.units))
        scores[:, 0] = self.best
        return scores


@pytest.mark.parametrize("scope", ["single", "batch"])
@pytest.mark.parametrize("best", [0.0, 1e9])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ties_go_to_the_first_and_nothing_is_asked_twice(adaptive: bool, best: float, scope: str) -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model, "group", scope=scope), small_samples(model, 6)
    steps = planned(engine, samples, Constant(adaptive, best))
    if scope == "single":
        expected = torch.arange(1, 4).expand(6, 3)
    elif best:
        expected = torch.tensor([[1, 2, 2]] * 3 + [[1, 3, 3]] * 3)
    else:
        expected = torch.arange(18).view(6, 3) // 6 + 1
    assert torch.equal(steps, expected)


def test_a_policy_of_ones_own_has_a_short_name() -> None:
    class LargestProbability(Policy):
        name = "largest_probability"

        def score(self, state: State) -> Tensor:
            return state.by_unit(state.probs)

    try:
        policy = Policy.make("largest_probability")
        model = MODELS["sigmoid"]()
        samples = small_samples(model)
        steps = planned(engine_of(model), samples, policy)
        assert torch.equal(steps.argmin(1), samples.prediction.concepts.probs.argmax(1))
        with pytest.raises(ValueError, match="did you mean 'largest_probability'"):
            Policy.make("largest_probabilty")
    finally:
        del Policy.registry["largest_probability"]


def test_an_unknown_policy_is_met_with_near_matches() -> None:
    with pytest.raises(ValueError, match="policies: nothing is called 'cop'; did you mean 'coop'"):
        Policy.make("cop")
    with pytest.raises(ValueError, match=r"there are \['cctp'"):
        Policy.make("zzz")


def test_scores_of_another_shape_are_refused() -> None:
    class PerConcept(Policy):
        def score(self, state: State) -> Tensor:
            return state.probs

    model = MODELS["sigmoid"]()
    with pytest.raises(ValueError, match=r"'PerConcept': expected scores \[9, 3\], got \[9, 6\]"):
        planned(engine_of(model, "group"), small_samples(model), PerConcept())


def test_what_was_never_fitted_says_so() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model)
    for policy in (BehaviouralCloning(), GlobalOrder(label="mine"), Policy.make("global_error")):
        with pytest.raises(RuntimeError, match="never fitted"):
            planned(engine, samples, policy)


# ---------------------------------------------------------------- a fixed order


def test_a_fixed_order_by_names_and_the_rest_behind() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model)
    steps = planned(engine, samples, FixedOrder(["wet", "blue"]))
    # red, small, large, huge keep their own order
    assert torch.equal(steps, torch.tensor([3, 2, 4, 5, 6, 1]).expand(len(samples), -1))
    by_group = planned(engine_of(model, "group"), samples, FixedOrder(["size", "wet"]))
    assert torch.equal(by_group, torch.tensor([3, 1, 2]).expand(len(samples), -1))


def test_a_fixed_order_of_unknown_or_repeated_names() -> None:
    model = MODELS["sigmoid"]()
    with pytest.raises(ValueError, match="repeated are \\['wet'\\]"):
        FixedOrder(["wet", "red", "wet"])
    with pytest.raises(ValueError, match="'colour'; did you mean one of"):
        FixedOrder(["colour"]).build(engine_of(model, "concept").units)
    with pytest.raises(ValueError, match="no unit is called 'colur'; did you mean one of \\['colour'"):
        FixedOrder(["colur"]).build(engine_of(model, "group").units)


# ---------------------------------------------------------------- a prior that the model learned


def test_a_learned_prior_is_drawn_from_its_distribution() -> None:
    model = small_model(LinearBottleneck())
    scores = torch.tensor([0.3, 1.2, -0.5])
    model.bottleneck.query_scores = lambda output, mask: scores.expand(len(mask), -1)
    engine, samples = engine_of(model, "group"), small_samples(model, 4000)
    steps = planned(engine, samples, LearnedPrior())
    prior = scores.softmax(-1)
    torch.testing.assert_close((steps == 1).float().mean(0), prior, rtol=0, atol=0.03)
    # the second draw is from what is left
    for first in range(3):
        left = torch.where(torch.arange(3) == first, -torch.inf, scores).softmax(-1)
        second = (steps[steps[:, first] == 1] == 2).float().mean(0)
        torch.testing.assert_close(second, left, rtol=0, atol=0.05)
    assert torch.equal(planned(engine, samples, LearnedPrior()), steps)
    likeliest = planned(engine, samples, LearnedPrior(sample=False))
    assert torch.equal(likeliest, torch.tensor([2, 1, 3]).expand(4000, -1))
    with torch.inference_mode():
        again = engine.plan([samples], LearnedPrior(), trial=1)[0]
    assert not torch.equal(again, steps)


def test_a_learned_prior_needs_a_model_that_learned_one() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model, "group"), small_samples(model)
    with pytest.raises(ValueError, match="this bottleneck has no query_scores"):
        planned(engine, samples, LearnedPrior())
    answering(model, len(CONCEPTS))
    with pytest.raises(ValueError, match="learned to choose among 6 units, the evaluation has 3"):
        planned(engine, samples, LearnedPrior())


# ---------------------------------------------------------------- real-valued concepts, categorical groups


@pytest.mark.parametrize("name", ["ucp", "ectp", "eudtp", "coop"])
def test_real_valued_concepts_have_no_uncertainty(name: str) -> None:
    model = MODELS["mixed"]()
    engine, samples = engine_of(model), small_samples(model)
    with torch.inference_mode():
        scores = Policy.make(name).score(engine.start(samples))
    real = MIXED.is_real()
    assert (scores[:, real] == 0).all()
    assert (scores[:, ~real] != 0).all()


def test_oracles_look_at_real_valued_concepts_too() -> None:
    model = MODELS["mixed"]()
    samples = small_samples(model)
    real = MIXED.index("weight")
    with torch.inference_mode():
        state = engine_of(model).start(samples)
        error, helpful = Policy.make("lcp").score(state), Policy.make("greedy").score(state)
        told = samples.answers.told[:, real]
        torch.testing.assert_close(error[:, real], (samples.prediction.concepts.probs[:, real] - told).square())
        expected = model.intervene(samples.prediction, {"weight": told}).logits.softmax(-1)
    torch.testing.assert_close(helpful[:, real], expected.gather(1, samples.label[:, None])[:, 0])


# ---------------------------------------------------------------- questions in vain


@pytest.mark.parametrize("adaptive", [False, True])
def test_unanswered_questions_are_skipped_or_cost_a_step(adaptive: bool) -> None:
    model = MODELS["sigmoid"]()
    samples = small_samples(model, missing=0.4)
    known = samples.answers.answerable
    assert not known.all()
    skipping, spending = (engine_of(model, unanswered=how) for how in ("skip", "spend"))
    skipped, spent = (planned(engine, samples, UCP(adaptive=adaptive)) for engine in (skipping, spending))
    assert torch.equal(skipped == NEVER, ~known)
    assert (spent <= len(CONCEPTS)).all()
    # both ask about the known ones in the same order
    for row, other, chosen in zip(skipped, spent, known, strict=True):
        assert torch.equal(row[chosen].argsort(), other[chosen].argsort())
    with torch.inference_mode():
        few = spending.rollout(samples, spent, [2])
    asked = (spent <= 2) & known
    assert torch.equal(few.corrected[0], asked.sum(1))
    assert (few.cost == 2).all()
    assert (few.corrected < 2).any()


@pytest.mark.parametrize("name", ["sigmoid", "logits", "mlp"])
def test_a_question_in_vain_promises_nothing_to_the_greedy_oracle(name: str) -> None:
    model = MODELS[name]()
    engine, samples = engine_of(model, unanswered="spend"), small_samples(model, missing=0.4)
    with torch.inference_mode():
        scores = Policy.make("greedy").score(engine.start(samples))
    now = samples.prediction.logits.softmax(-1).gather(1, samples.label[:, None]).expand(-1, len(CONCEPTS))
    unknown = ~samples.answers.answerable
    torch.testing.assert_close(scores[unknown], now[unknown])
