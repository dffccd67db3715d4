"""What one more correction would do to the label: formulas and fast paths against plain predictions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from golden_models import engine_of
from small_models import CLASSES, LINEAR, MIXED, MODELS, small_model, small_samples
from torch import Tensor

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.heads import MLPHead, ResidualHead
from cbm_lightning.interventions import InterventionEngine, InterventionValues, Policy, State
from cbm_lightning.interventions.policies import CCTP, CooP
from cbm_lightning.interventions.policies.coop import bernoulli_entropy
from cbm_lightning.interventions.values import ConstantValues
from cbm_lightning.types import Intervention

HYPOTHETICAL = ["ectp", "eudtp", "coop"]


def corrected_half(state: State) -> Tensor:
    """A mask that differs between samples."""
    mask = torch.arange(state.mask.numel()).view(state.mask.shape) % 3 == 0
    return mask & state.open


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> CBMModule:
    return MODELS[request.param]()


@pytest.fixture(params=[False, True], ids=["at the start", "after corrections"])
def later(request: pytest.FixtureRequest) -> bool:
    return request.param


def state_of(engine: InterventionEngine, later: bool, missing: float = 0.0) -> State:
    state = engine.start(small_samples(engine.subject.model, missing=missing))
    return state.corrected(corrected_half(state)) if later else state


# ---------------------------------------------------------------- formulas, one sample and concept at a time


def outcomes(logits: Tensor, task: str) -> list[list[float]]:
    """Probabilities of the outcomes of each label variable of one sample."""
    if task == "multiclass":
        return [logits.softmax(-1).tolist()]
    return [[1 - p, p] for p in logits.sigmoid().tolist()]


def divergence(new: list[list[float]], old: list[list[float]]) -> float:
    return sum(p * math.log(p / q) for ps, qs in zip(new, old, strict=True) for p, q in zip(ps, qs, strict=True) if p)


def entropy(probs: list[list[float]]) -> float:
    return -sum(p * math.log(p) for variable in probs for p in variable if p)


def confidence_change(p: float, now: list[list[float]], after: list[list[list[float]]]) -> float:
    total = 0.0
    for m, variable in enumerate(now):
        best = variable.index(max(variable))
        total += abs((1 - p) * after[0][m][best] + p * after[1][m][best] - variable[best])
    return total


FORMULAS: dict[str, Callable[[float, list[list[float]], list[list[list[float]]]], float]] = {
    "ectp": lambda p, now, after: (1 - p) * divergence(after[0], now) + p * divergence(after[1], now),
    "eudtp": lambda p, now, after: entropy(now) - (1 - p) * entropy(after[0]) - p * entropy(after[1]),
    "coop": lambda p, now, after: -p * math.log2(p) - (1 - p) * math.log2(1 - p) + confidence_change(p, now, after),
}


def by_hand(state: State, name: str, b: int, k: int) -> float:
    """A score from what the model itself predicts for both values of a concept."""
    model, task = state.subject.model, state.subject.task
    after = []
    for value in (0.0, 1.0):
        mask, told = state.mask.clone(), state.told.clone()
        mask[:, k], told[:, k] = True, value
        prediction = model.intervene(state.start, Intervention(mask, told))
        after.append(outcomes(prediction.logits[b].double(), task))
    return FORMULAS[name](state.probs[b, k].item(), outcomes(state.prediction.logits[b].double(), task), after)


@pytest.mark.parametrize("name", HYPOTHETICAL)
def test_scores_from_predictions_for_both_answers(model: CBMModule, name: str, later: bool) -> None:
    with torch.inference_mode():
        state = state_of(engine_of(model), later)
        scores = Policy.make(name).score(state)
        free = (state.open & ~model.concept_set.is_real()).nonzero().tolist()
        ours = torch.tensor([scores[b, k].item() for b, k in free])
        expected = torch.tensor([by_hand(state, name, b, k) for b, k in free])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
    assert (scores[state.mask] == -torch.inf).all()


def test_the_greedy_oracle_from_predictions_for_the_truth(model: CBMModule, later: bool) -> None:
    with torch.inference_mode():
        state = state_of(engine_of(model), later)
        scores = Policy.make("greedy").score(state)
        for k in range(state.mask.shape[1]):
            mask = state.mask.clone()
            mask[:, k] = True
            logits = model.intervene(state.start, Intervention(mask, state.told)).logits
            for b in state.open[:, k].nonzero().flatten().tolist():
                probs = outcomes(logits[b], model.task)
                true = [variable[y] for variable, y in zip(probs, state.label[b].tolist(), strict=True)]
                assert scores[b, k].item() == pytest.approx(sum(true) / len(true), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("unit", ["concept", "group"])
def test_what_coop_weighs(unit: str) -> None:
    model = MODELS["sigmoid"]()
    engine = engine_of(model, unit, costs={"wet": 3.0})
    with torch.inference_mode():
        state = state_of(engine, later=True)
        plain, sure, moved, dear, proxy = (
            CooP(*weights).score(state) for weights in ((1, 1), (2, 0), (0, 5), (1, 1, 0.5), (1, 0, 0, "distance"))
        )
        uncertain = state.by_unit(bernoulli_entropy(state.probs))
        distance = state.by_unit(1 / (state.probs - 0.5).abs())
    torch.testing.assert_close(sure, 2 * uncertain)
    torch.testing.assert_close(moved, 5 * (plain - uncertain).masked_fill(plain == -torch.inf, -torch.inf))
    torch.testing.assert_close(dear, plain - 0.5 * engine.units.costs)
    torch.testing.assert_close(proxy, distance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uncertainty_weight": -1}, "uncertainty_weight: expected a finite number of at least 0, got -1"),
        ({"importance_weight": math.nan}, "importance_weight"),
        ({"cost_weight": math.inf}, "cost_weight"),
        ({"uncertainty": "variance"}, "uncertainty: expected one of .*'entropy'"),
    ],
)
def test_weights_that_coop_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CooP(**options)


# ---------------------------------------------------------------- rank-one updates


@pytest.mark.parametrize("missing", [0.0, 0.4])
@pytest.mark.parametrize("name", [*HYPOTHETICAL, "greedy"])
@pytest.mark.parametrize("kind", LINEAR)
def test_rank_one_updates_equal_predicting_anew(kind: str, name: str, missing: float, later: bool) -> None:
    model, policy = MODELS[kind](), Policy.make(name)
    fast, slow = engine_of(model), engine_of(model)
    slow.subject.is_linear = False
    with torch.inference_mode():
        state = state_of(fast, later, missing)
        assert fast.subject.linear_effects(state.output) is not None
        assert slow.subject.linear_effects(state.output) is None
        scores = [policy.score(state_of(engine, later, missing)) for engine in (fast, slow)]
    torch.testing.assert_close(*scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("head", [MLPHead([9]), ResidualHead(MLPHead([9]))], ids=["mlp", "residual mlp"])
def test_heads_that_are_not_linear_predict_anew(head: MLPHead) -> None:
    model = small_model(EmbeddingBottleneck(3), head)
    samples = small_samples(model)
    assert engine_of(model).subject.linear_effects(samples.prediction.concepts) is None


def test_values_that_couple_the_members_of_a_group_predict_anew(later: bool) -> None:
    """On the logit scale the probability of a member depends on the logits of the others."""
    model = small_model(EmbeddingBottleneck(3), concepts=MIXED.select(["red", "blue", "green", "wet"]))
    values: InterventionValues = ConstantValues()
    values.build(model.concept_set)
    assert values.couples_groups
    quick, slow = (engine_of(model, values=values) for _ in range(2))
    slow.subject.is_linear = False
    with torch.inference_mode():
        scores = [Policy.make("ectp").score(state_of(engine, later)) for engine in (quick, slow)]
        state = state_of(quick, later)
        b, k = state.open.nonzero()[0].tolist()
        mask, after = state.mask.clone(), []
        mask[:, k] = True
        for value in (0.0, 1.0):
            told = state.told.clone()
            told[:, k] = value
            prediction = model.intervene(state.start, values.correction(state.start.concepts, told, mask))
            after.append(outcomes(prediction.logits[b], model.task))
        expected = FORMULAS["ectp"](state.probs[b, k].item(), outcomes(state.prediction.logits[b], model.task), after)
    assert torch.equal(*scores)
    assert scores[0][b, k].item() == pytest.approx(expected, rel=1e-3)


# ---------------------------------------------------------------- contributions


@pytest.mark.parametrize("weighting", ["activation", "prob"])
@pytest.mark.parametrize("kind", LINEAR)
def test_contributions_in_closed_form_equal_those_by_gradients(kind: str, weighting: str, later: bool) -> None:
    model = MODELS[kind]()
    with torch.inference_mode():
        closed = CCTP(weighting).score(state_of(engine_of(model), later))
        model.head.concept_weight = lambda: None
        by_gradient = CCTP(weighting).score(state_of(engine_of(model), later))
    torch.testing.assert_close(closed, by_gradient, rtol=1e-4, atol=1e-6)


def test_contributions_of_a_linear_head() -> None:
    model = MODELS["logits"]()
    weight = model.head.linear.weight.detach()
    with torch.inference_mode():
        state = engine_of(model).start(small_samples(model))
        read, probs = state.output.values, state.output.probs
        scores = {weighting: CCTP(weighting).score(state) for weighting in ("activation", "prob")}
    torch.testing.assert_close(scores["activation"], weight.abs().sum(0) * read.abs())
    torch.testing.assert_close(scores["prob"], weight.abs().sum(0) * probs)
    with pytest.raises(ValueError, match="weighting: expected one of"):
        CCTP("weight")


@pytest.mark.parametrize("head", ["mlp", "residual"])
def test_contributions_in_inference_mode_leave_no_gradients(head: str) -> None:
    inner = MLPHead([9])
    model = small_model(LinearBottleneck("logits"), inner if head == "mlp" else ResidualHead(inner))
    with torch.inference_mode():
        samples = small_samples(model)
        state = engine_of(model).start(samples)
        scores = CCTP().score(state)
        again = CCTP().score(state)
    assert torch.equal(scores, again)
    assert not scores.requires_grad
    assert not samples.prediction.concepts.values.requires_grad
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    # the side channel shifts the logits by what no concept touches
    read = samples.prediction.concepts.values.clone()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: inner.classify(x, samples.prediction.concepts)))(read)
    assert jacobian.shape == (len(samples), CLASSES, read.shape[1])
    torch.testing.assert_close(scores, (jacobian * read.unsqueeze(1)).abs().sum(1).detach(), rtol=1e-4, atol=1e-6)
