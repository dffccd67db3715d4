"""Numbers of the official code of Shin et al. (ICML 2023)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from golden_models import (
    accuracies,
    answered,
    engine_of,
    linear_model,
    load,
    planned,
    samples_of,
    steps_along,
)
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.interventions import Person, Policy, Samples
from cbm_lightning.interventions.policies import CCTP, UCP
from cbm_lightning.randomness import Randomness
from cbm_lightning.types import Prediction

LINKS = ("sigmoid", "logits", "relu")
POLICIES = ("ucp", "lcp", "cctp", "ectp", "eudtp")
# what the fixtures call individual or group, single or batch
GRANULARITIES = {
    "is": ("concept", "single"),
    "ib": ("concept", "batch"),
    "gs": ("group", "single"),
    "gb": ("group", "batch"),
}


class Case:
    """A fixture with the model that it came from."""

    def __init__(self, shared: Path, link: str) -> None:
        self.data = load(shared, f"shin_interventions_{link}")
        bounds = None if link == "sigmoid" else (self.data["ptl_5"], self.data["ptl_95"])
        self.model: CBMModule
        self.prediction: Prediction
        self.model, self.prediction = linear_model(self.data, link, bounds)
        self.label = self.data["class_labels"]
        # the official policies and curves use the concepts of the class unless said otherwise
        self.samples = samples_of(self.prediction, self.data["class_level_concepts"], self.label)

    def ask(self, label_level: str, on_invisible: str) -> Samples:
        """Samples whose answers come from a `Person`; "not visible" is certainty 1 in the official coding."""
        person = Person(self.model.concept_set, label_level, on_invisible)
        person.class_concepts = torch.full((self.model.num_classes, len(self.model.concept_set)), torch.nan)
        person.class_concepts[self.label] = self.data["class_level_concepts"].float()
        certainty = (self.data["certainty"] != 1).float()
        index = torch.arange(len(self.label))
        concepts = self.data["instance_level_concepts"].float()
        answers = person.answer(concepts, self.label, certainty, Randomness(0, "person", index))
        return answered(self.prediction, answers, self.label)

    def error(self, unit: str, samples: Samples, steps: Tensor, **options: str) -> Tensor:
        return 1 - accuracies(engine_of(self.model, unit, **options), samples, steps)

    def read_after_all(self, samples: Samples) -> Tensor:
        """``[B, K]`` what the head reads once everything is corrected that can be."""
        with torch.inference_mode():
            return engine_of(self.model).start(samples).corrected(samples.answers.answerable).output.values


@pytest.fixture(params=LINKS)
def case(shared: Path, request: pytest.FixtureRequest) -> Case:
    return Case(shared, request.param)


def policy_of(name: str) -> Policy:
    return CCTP(weighting="prob") if name == "cctp" else Policy.make(name)


def assert_descending(scores: Tensor) -> None:
    """Along the last axis, near-ties in single precision aside."""
    before, after = scores[..., :-1], scores[..., 1:]
    worst = ((after - before) / before.abs().clamp(min=1e-6)).max()
    assert worst <= 1e-3, f"a score rises by {worst:.2e} of its size along the order"


def same(ours: Tensor, official: Tensor) -> None:
    """Curves equal to the last sample."""
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-6)


def test_predictions_are_those_of_the_fixture(case: Case) -> None:
    same(case.prediction.logits, case.data["class_logits"])
    same(case.prediction.concepts.values, case.data["bottleneck"])
    same(case.prediction.concepts.probs, case.data["concept_probs"])


@pytest.mark.parametrize("name", POLICIES)
def test_scores(case: Case, name: str) -> None:
    with torch.inference_mode():
        scores = policy_of(name).score(engine_of(case.model).start(case.samples))
    torch.testing.assert_close(scores, case.data[f"score_desc__{name}"], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", POLICIES)
def test_orders_and_curves(case: Case, name: str, granularity: str) -> None:
    unit, scope = GRANULARITIES[granularity]
    engine = engine_of(case.model, unit, scope=scope)
    steps = planned(engine, case.samples, policy_of(name))
    everything = torch.ones_like(case.samples.answers.answerable)
    official = engine.units.scores(case.data[f"score_desc__{name}"], everything)
    if scope == "single":
        assert_descending(official.gather(1, steps.argsort(1)))
    else:
        # within a step the order is nobody's business: compare the least of a step with the best of the next
        groups = [official[steps == step] for step in range(1, len(engine.units) + 1)]
        assert [len(group) for group in groups] == [len(case.label)] * len(engine.units)
        for before, after in pairwise(groups):
            assert_descending(torch.stack([before.min(), after.max()]))
    same(case.error(unit, case.samples, steps, scope=scope), case.data[f"task_error__{name}__{granularity}"])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", POLICIES)
def test_curves_along_the_stored_orders(case: Case, name: str, granularity: str) -> None:
    steps = steps_along(case.data[f"order__{name}__{granularity}"], len(case.label))
    error = case.error(GRANULARITIES[granularity][0], case.samples, steps)
    same(error, case.data[f"task_error__{name}__{granularity}"])


def test_a_given_order(case: Case) -> None:
    steps = steps_along(case.data["order__given__is"], len(case.label))
    same(case.error("concept", case.samples, steps), case.data["task_error__given__is"])
    after = case.read_after_all(case.samples)
    torch.testing.assert_close(after, case.data["bottleneck_after_all__given__is"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "label_level", "on_invisible"),
    [
        ("instance", "instance", "use_label"),
        ("instance_invisible0", "instance", "zero"),
        ("class_invisible0", "class", "zero"),
    ],
)
def test_whose_labels_and_what_of_invisible_concepts(
    case: Case, variant: str, label_level: str, on_invisible: str
) -> None:
    samples = case.ask(label_level, on_invisible)
    assert samples.answers.answerable.all()
    steps = planned(engine_of(case.model), samples, UCP())
    same(case.error("concept", samples, steps), case.data[f"task_error__ucp__is__{variant}"])
    along = steps_along(case.data["order__ucp__is"], len(case.label))
    same(case.error("concept", samples, along), case.data[f"task_error__ucp__is__{variant}"])
    official = case.data[f"bottleneck_after_all__ucp__is__{variant}"]
    torch.testing.assert_close(case.read_after_all(samples), official, rtol=1e-5, atol=1e-6)


def test_the_concepts_of_the_class_are_the_usual_answers(case: Case) -> None:
    told = case.ask("class", "use_label").answers.told
    assert torch.equal(told, case.samples.answers.told)


def test_skipped_invisible_concepts_keep_their_prediction(case: Case) -> None:
    """The official code gives them the label from the second step on."""
    samples = case.ask("class", "skip")
    invisible = case.data["certainty"] == 1
    assert torch.equal(samples.answers.answerable, ~invisible)
    everything = case.read_after_all(case.samples)
    expected = torch.where(invisible, case.data["bottleneck"], everything)
    torch.testing.assert_close(case.read_after_all(samples), expected, rtol=1e-5, atol=1e-6)
    defective = case.data["OFFICIAL_BUG_bottleneck_after_all__ucp__is__nointinvisible"]
    assert not torch.isclose(expected, defective, rtol=1e-3, atol=1e-3)[invisible].all()
    # and a sample is never asked about them
    steps = planned(engine_of(case.model), samples, UCP())
    assert (steps[invisible] > len(case.model.concept_set)).all()
    assert (steps[~invisible] <= len(case.model.concept_set)).all()


def test_hard_reading(shared: Path) -> None:
    # only with probabilities: the official code rounds scores, too, as if they were probabilities
    case = Case(shared, "sigmoid")
    steps = planned(engine_of(case.model), case.samples, UCP())
    error = case.error("concept", case.samples, steps, reading="hard")
    same(error, case.data["task_error__ucp__is__hardmode"])
    soft = case.error("concept", case.samples, steps)
    assert not torch.equal(error, soft)


def test_groups_over_the_split_by_the_average_number_of_concepts(case: Case) -> None:
    """The official checkpoints leave out the unit that reaches the average; with it, the last one is everything."""
    order, official = case.data["order__ucp__gb"], case.data["groupbatch_checkpoints__ucp"]
    engine, samples = engine_of(case.model, "group", scope="batch"), len(case.label)
    sizes = engine.units.membership.sum(1)[order % len(engine.units)]
    wanted = torch.arange(len(case.model.concept_set) + 1) * samples
    # the unit with which the average is reached, which the official slice leaves out
    reached = torch.searchsorted(sizes.cumsum(0), wanted)
    assert torch.equal(reached, official)
    cuts = {"official": reached, "inclusive": reached + (wanted > 0)}
    error = {}
    for name, cut in cuts.items():
        steps = torch.empty_like(order)
        steps[order] = torch.searchsorted(cut, torch.arange(len(order)), right=True)
        steps = steps.view(samples, -1)
        error[name] = 1 - accuracies(engine, case.samples, steps, len(wanted))
    same(error["official"], case.data["task_error_by_avg_concepts__ucp__gb"])
    assert cuts["inclusive"][-1] == len(order)
    same(error["inclusive"][-1], case.data["task_error__ucp__gb"][-1])
