"""Plans and predictions at every budget: exact at both ends, whatever the blocks and processes."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from golden_models import answered, engine_of, planned
from small_models import CONCEPTS, MIXED, MODELS, rows, small_model, small_samples
from torch import Tensor

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.interventions import InterventionEngine, Policy, Samples, Units
from cbm_lightning.interventions.engine import resolve_budgets
from cbm_lightning.interventions.policies import UCP, CooP, GreedyOracle
from cbm_lightning.interventions.ranking import NEVER
from cbm_lightning.interventions.values import CollapseWarning
from cbm_lightning.types import ConceptOutput, Intervention

POLICIES = ["rand", "ucp", "lcp", "cctp", "ectp", "eudtp", "coop", "greedy"]
ADAPTIVE = {"ucp": UCP(adaptive=True), "coop": CooP(importance_weight=10.0), "greedy": GreedyOracle()}


def predicted(engine: InterventionEngine, samples: Samples, steps: Tensor) -> Tensor:
    """``[R, B, L]`` logits at every budget."""
    with torch.inference_mode():
        return engine.rollout(samples, steps, range(len(engine.units) + 1)).logits


def singly(samples: Samples) -> list[Samples]:
    return [rows(samples, torch.tensor([b])) for b in range(len(samples))]


# ---------------------------------------------------------------- both ends of a curve


@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("kind", MODELS)
def test_budget_0_is_the_plain_prediction(kind: str, unit: str) -> None:
    model = MODELS[kind]()
    engine, samples = engine_of(model, unit), small_samples(model, missing=0.2)
    steps = planned(engine, samples, Policy.make("ucp"))
    assert torch.equal(predicted(engine, samples, steps)[0], samples.prediction.logits)


@pytest.mark.parametrize("name", POLICIES)
def test_all_corrected_is_the_head_on_the_true_concepts(name: str) -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model), small_samples(model)
    logits = predicted(engine, samples, planned(engine, samples, Policy.make(name)))
    truth = model.head.linear(samples.answers.truth)
    assert torch.equal(logits[-1], truth)
    assert not torch.equal(logits[0], truth)


def test_what_a_rollout_counts() -> None:
    model = MODELS["mixed"]()
    engine = engine_of(model, "group", costs={"colour": 2.5, "weight": 0.0})
    samples = small_samples(model, missing=0.3)
    steps = planned(engine, samples, Policy.make("rand"))
    with torch.inference_mode():
        rollout = engine.rollout(samples, steps, [0, 1, 3])
    costs = {"colour": 2.5, "weight": 0.0, "wet": 1.0}
    for at, budget in enumerate([0, 1, 3]):
        for b in range(len(samples)):
            asked = [u for u in range(3) if steps[b, u] <= budget]
            assert rollout.cost[at, b] == sum(costs[engine.units.names[u]] for u in asked)
            members = engine.units.membership[asked].any(0) & samples.answers.answerable[b]
            assert rollout.corrected[at, b] == members.sum()
            free = [k for k in range(5) if not members[k] and MIXED.kinds[k] != "real"]
            known = [k for k in free if not samples.answers.truth[b, k].isnan()]
            probs, truth = samples.prediction.concepts.probs[b], samples.answers.truth[b]
            assert rollout.free_known[at, b] == len(known)
            assert rollout.free_right[at, b] == sum((probs[k] >= 0.5) == (truth[k] >= 0.5) for k in known)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", POLICIES)
def test_blocks_of_one_and_of_all_decide_and_predict_the_same(name: str) -> None:
    model = MODELS["embedding"]()
    engine, samples = engine_of(model), small_samples(model, missing=0.2)
    whole = planned(engine, samples, Policy.make(name))
    with torch.inference_mode():
        blocks = engine.plan(singly(samples), Policy.make(name))
    assert torch.equal(torch.cat(blocks), whole)
    single = [predicted(engine, one, steps) for one, steps in zip(singly(samples), blocks, strict=True)]
    torch.testing.assert_close(torch.cat(single, 1), predicted(engine, samples, whole), rtol=1e-5, atol=1e-5)


def test_random_orders_belong_to_the_sample_the_seed_and_the_trial() -> None:
    model = MODELS["sigmoid"]()
    engine, samples, rand = engine_of(model), small_samples(model), Policy.make("rand")
    whole = planned(engine, samples, rand)
    backwards = rows(samples, torch.arange(len(samples) - 1, -1, -1))
    assert torch.equal(planned(engine, backwards, rand).flip(0), whole)
    assert len({tuple(row) for row in whole.tolist()}) > len(samples) // 2
    trial = engine.plan([samples], rand, trial=1)[0]
    seeded = planned(engine_of(model, seed=1), samples, rand)
    assert not torch.equal(trial, whole)
    assert not torch.equal(seeded, whole)


# ---------------------------------------------------------------- batch scope


def whole_split(
    policy: Policy, unit: str = "concept", missing: float = 0.0
) -> tuple[InterventionEngine, Samples, Tensor]:
    model = MODELS["logits"]()
    engine, samples = engine_of(model, unit, scope="batch"), small_samples(model, 10, missing)
    return engine, samples, planned(engine, samples, policy)


@pytest.mark.parametrize("unit", ["concept", "group"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_split_is_asked_about_as_many_units_as_samples_a_step(name: str, unit: str) -> None:
    engine, samples, steps = whole_split(Policy.make(name), unit)
    for budget in range(len(engine.units) + 1):
        assert (steps <= budget).sum() == budget * len(samples)
    assert not ((steps == 1).sum(1) == 1).all()


@pytest.mark.parametrize("name", ["ucp", "ectp", "rand"])
def test_a_ranking_over_the_split_takes_the_best_pairs(name: str) -> None:
    policy = Policy.make(name)
    engine, samples, steps = whole_split(policy, missing=0.3)
    with torch.inference_mode():
        scores = policy.score(engine.start(samples))
    assert torch.equal(steps == NEVER, ~samples.answers.answerable)
    for budget in range(1, int(steps[steps != NEVER].max())):
        assert (steps <= budget).sum() == budget * len(samples)
        assert scores[steps <= budget].min() >= scores[(steps > budget) & (steps != NEVER)].max()


@pytest.mark.parametrize("policy", [*map(Policy.make, POLICIES), ADAPTIVE["ucp"]], ids=lambda p: p.label)
def test_a_ranking_does_not_depend_on_blocks(policy: Policy) -> None:
    engine, samples, steps = whole_split(policy, missing=0.2)
    parts = [rows(samples, torch.arange(5, 10)), rows(samples, torch.arange(5))]
    with torch.inference_mode():
        later, earlier = engine.plan(parts, policy)
    assert torch.equal(torch.cat([earlier, later]), steps)


def on_two_processes(
    engine: InterventionEngine, first: Samples, second: Samples, policy: Policy
) -> tuple[Tensor, Tensor]:
    """Plans of two processes that see their own samples and join rows."""
    meeting, shown, found = threading.Barrier(2, timeout=60), [None, None], [None, None]

    def gather(process: int) -> Callable[[Tensor], Tensor]:
        def join(own: Tensor) -> Tensor:
            shown[process] = own
            meeting.wait()
            joined = torch.cat(shown)
            meeting.wait()
            return joined

        return join

    def work(process: int, samples: Samples) -> None:
        with torch.inference_mode():
            found[process] = engine.plan([samples], policy, gather=gather(process))[0]

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found[0], found[1]


@pytest.mark.parametrize(
    "policy", [*map(Policy.make, ["rand", "ectp", "coop"]), *ADAPTIVE.values()], ids=lambda p: p.label
)
def test_two_processes_plan_what_one_plans(policy: Policy) -> None:
    engine, samples, steps = whole_split(policy, missing=0.2)
    # interleaved, as a distributed sampler deals them out
    even, odd = on_two_processes(
        engine, rows(samples, torch.arange(0, 10, 2)), rows(samples, torch.arange(1, 10, 2)), policy
    )
    assert torch.equal(torch.stack([even, odd], 1).flatten(0, 1), steps)


@pytest.mark.parametrize("policy", [*map(Policy.make, ["rand", "ectp"]), *ADAPTIVE.values()], ids=lambda p: p.label)
def test_repeated_samples_leave_the_ranking_as_it_is(policy: Policy) -> None:
    engine, samples, steps = whole_split(policy, missing=0.2)
    # nine samples on two processes: the first comes again to fill the last place
    nine = rows(samples, torch.arange(9))
    with torch.inference_mode():
        alone = engine.plan([nine], policy)[0]
    again = rows(samples, torch.tensor([1, 3, 5, 7, 0]))
    again.counted[-1] = False
    even, odd = on_two_processes(engine, rows(samples, torch.arange(0, 9, 2)), again, policy)
    assert torch.equal(even, alone[0::2])
    assert torch.equal(odd[:4], alone[1::2])
    # what is repeated is asked about the same
    assert torch.equal(odd[4], alone[0])
    assert not torch.equal(alone, steps[:9])


def test_an_adaptive_ranking_looks_again_after_each_step() -> None:
    policy = CooP(importance_weight=10.0)
    engine, samples, steps = whole_split(policy)
    state = engine.start(samples)
    taken = torch.zeros_like(steps, dtype=torch.bool)
    with torch.inference_mode():
        for step in range(1, len(CONCEPTS) + 1):
            scores = policy.score(state).masked_fill(taken, -torch.inf)
            best = scores.flatten().topk(len(samples)).indices
            taken.view(-1)[best] = True
            assert torch.equal(steps <= step, taken)
            state = state.corrected(taken, step)


# ---------------------------------------------------------------- readings


def hand_read(model: CBMModule, samples: Samples, concepts: Tensor) -> Tensor:
    """Logits where the head is told every concept."""
    everything = torch.ones_like(concepts, dtype=torch.bool)
    return model.intervene(samples.prediction, Intervention(everything, concepts)).logits


@pytest.mark.parametrize("kind", ["sigmoid", "logits", "embedding", "mixed", "mlp"])
def test_a_hard_reading_rounds_what_nobody_corrected(kind: str) -> None:
    model = MODELS[kind]()
    engine, samples = engine_of(model, reading="hard"), small_samples(model, missing=0.2)
    steps = planned(engine, samples, Policy.make("ucp"))
    logits = predicted(engine, samples, steps)
    for budget in range(len(engine.units) + 1):
        mask = (steps <= budget) & samples.answers.answerable
        probs = samples.prediction.concepts.probs
        rounded = torch.where(model.concept_set.is_real(), probs, (probs >= 0.5).float())
        expected = hand_read(model, samples, torch.where(mask, samples.answers.told, rounded))
        torch.testing.assert_close(logits[budget], expected)
    assert not torch.allclose(logits[0], samples.prediction.logits)


@pytest.mark.parametrize("kind", ["sigmoid", "binary"])
def test_a_sampled_reading_averages_the_label_over_the_concepts(kind: str) -> None:
    model = MODELS[kind]()
    engine, samples = engine_of(model, reading="sample", num_draws=2000), small_samples(model, 4)
    steps = planned(engine, samples, Policy.make("ucp"))
    with torch.inference_mode():
        logits = engine.rollout(samples, steps, [2]).logits[0]
        mask, probs = steps <= 2, samples.prediction.concepts.probs
        expected = torch.zeros_like(logits)
        for state in itertools.product([0.0, 1.0], repeat=len(CONCEPTS)):
            drawn = torch.tensor(state).expand_as(probs)
            likelihood = torch.where(drawn == 1, probs, 1 - probs).masked_fill(mask, 1.0).prod(1)
            # what is corrected is never drawn: count each state of the others once
            likelihood = likelihood / 2 ** mask.sum(1)
            told = hand_read(model, samples, torch.where(mask, samples.answers.told, drawn))
            expected += likelihood.unsqueeze(1) * model.probabilities(told)
    torch.testing.assert_close(model.probabilities(logits), expected, rtol=0, atol=0.05)


def test_draws_belong_to_the_sample_and_the_trial() -> None:
    model = MODELS["sigmoid"]()
    engine, samples = engine_of(model, reading="sample", num_draws=3), small_samples(model)
    steps = planned(engine, samples, Policy.make("ucp"))
    whole = predicted(engine, samples, steps)
    single = [predicted(engine, one, steps[[b]]) for b, one in enumerate(singly(samples))]
    torch.testing.assert_close(torch.cat(single, 1), whole, rtol=1e-5, atol=1e-5)
    other = engine.rollout(samples, steps, [0], trial=1).logits[0]
    assert not torch.allclose(other, whole[0])
    # with everything corrected there is nothing to draw
    torch.testing.assert_close(whole[-1].softmax(-1), hand_read(model, samples, samples.answers.told).softmax(-1))


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_said_of_a_healthy_model(kind: str, inference: bool) -> None:
    model = MODELS[kind]()
    engine = engine_of(model)
    with warnings.catch_warnings(), torch.inference_mode(inference):
        warnings.simplefilter("error")
        engine.check(small_samples(model))
    assert engine.subject.is_linear


def test_concepts_that_correcting_does_not_move_are_named() -> None:
    model = MODELS["logits"]()
    with torch.no_grad():
        model.bottleneck.value_range[1, 3] = model.bottleneck.value_range[0, 3]
    said = "meet for 1 concepts, 'large': correcting them changes nothing"
    with torch.inference_mode(), pytest.warns(CollapseWarning, match=said):
        engine_of(model).check(small_samples(model))


class WrongWay(EmbeddingBottleneck):
    """Claims directions of other concepts."""

    def directions(self, output: ConceptOutput) -> Tensor:
        return super().directions(output).roll(1, 1)


class Spreading(LinearBottleneck):
    """Correcting a concept moves the others, which one line a concept cannot say."""

    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        found = super().intervene(output, intervention)
        moved = found.values + intervention.mask.sum(1, keepdim=True) * (~intervention.mask)
        return found.replace(values=moved)


@pytest.mark.parametrize("bottleneck", [WrongWay, Spreading])
def test_a_look_ahead_that_lies_is_not_used(bottleneck: type) -> None:
    model = small_model(bottleneck())
    engine, exact, samples = engine_of(model), engine_of(model), small_samples(model)
    exact.subject.is_linear = False
    said = "does not move the class logits along the bottleneck's `directions`"
    with torch.inference_mode(), pytest.warns(UserWarning, match=said):
        engine.check(samples)
    assert not engine.subject.is_linear
    ectp = Policy.make("ectp")
    with torch.inference_mode():
        assert torch.equal(ectp.score(engine.start(samples)), ectp.score(exact.start(samples)))


def test_models_and_options_that_are_refused() -> None:
    model = MODELS["sigmoid"]()
    units = Units.make(CONCEPTS)
    with pytest.raises(TypeError, match="Linear has no .*'intervene'.*cannot be corrected"):
        InterventionEngine(torch.nn.Linear(2, 2), units)
    for field in ("scope", "reading", "unanswered"):
        with pytest.raises(ValueError, match=f"{field}: expected one of .*, got 'zzz'"):
            InterventionEngine(model, units, **{field: "zzz"})
    with pytest.raises(ValueError, match="num_draws: expected at least 1, got 0"):
        InterventionEngine(model, units, num_draws=0)


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ([], [0]),
        ([3, 1, 3], [0, 1, 3]),
        ([0.2, 0.5, 1.0], [0, 1, 3, 5]),
        ([0.0, 1, 1.0], [0, 1, 5]),
    ],
)
def test_budgets(budgets: list[int | float] | None, expected: list[int]) -> None:
    assert resolve_budgets(budgets, 5) == expected


def test_fractions_do_not_round_up_a_floating_point_error() -> None:
    assert resolve_budgets([0.1, 0.07], 30) == [0, 3]
    assert resolve_budgets([0.07], 100) == [0, 7]


@pytest.mark.parametrize("budget", [-1, 6, 1.5, -0.5])
def test_budgets_out_of_range(budget: float) -> None:
    with pytest.raises(ValueError, match="budgets: expected numbers of units from 0 to 5"):
        resolve_budgets([budget], 5)


def test_samples_of_several_blocks_join() -> None:
    model = MODELS["embedding"]()
    first, second = small_samples(model, 4), small_samples(model, 3, seed=8)
    joined = Samples.cat([first, second])
    assert len(joined) == 7
    assert joined.group is None
    for name in ("told", "truth", "answerable"):
        expected = torch.cat([getattr(first.answers, name), getattr(second.answers, name)])
        assert torch.equal(getattr(joined.answers, name), expected)
    assert torch.equal(joined.prediction.logits[4:], second.prediction.logits)
    grouped = answered(first.prediction, first.answers, first.label)
    named = Samples(
        *(getattr(grouped, name) for name in ("prediction", "answers", "label", "index", "counted")),
        group=torch.arange(4),
    )
    assert Samples.cat([named, named]).group.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
