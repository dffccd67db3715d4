"""What a person says, rightly or not, and where there is nothing to say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import CONCEPTS, MIXED, true_concepts
from torch import Tensor

from cbm_lightning import ConceptSet
from cbm_lightning.interventions import Person
from cbm_lightning.interventions.person import Answers, class_majority
from cbm_lightning.randomness import Randomness

MANY = 4000
COLOURS = MIXED.categorical_groups()[0]


def ask(person: Person, concepts: Tensor, label: Tensor | None = None, certainty: Tensor | None = None) -> Answers:
    return person.answer(concepts, label, certainty, Randomness(0, "person", torch.arange(len(concepts))))


def drawn(concepts: ConceptSet, n: int = MANY) -> Tensor:
    return true_concepts(concepts, n, torch.Generator().manual_seed(0))


def test_a_competent_person_says_what_is_annotated() -> None:
    truth = drawn(MIXED, 30)
    truth[::3, 1] = torch.nan
    answers = ask(Person(MIXED), truth)
    assert Person(MIXED).reliable
    torch.testing.assert_close(answers.told, truth, equal_nan=True)
    torch.testing.assert_close(answers.truth, truth, equal_nan=True)
    assert torch.equal(answers.answerable, ~truth.isnan())


def test_an_incompetent_person_always_says_the_opposite() -> None:
    truth = drawn(CONCEPTS)
    answers = ask(Person(CONCEPTS, competence=0.0), truth)
    assert torch.equal(answers.told, 1 - truth)
    # what is true stays known to oracles
    assert torch.equal(answers.truth, truth)


@pytest.mark.parametrize(("competence", "right"), [(0.7, 0.7), ("uniform", 0.75), (0.0, 0.0), (1.0, 1.0)])
def test_how_often_an_answer_is_right(competence: Any, right: float) -> None:
    person = Person(CONCEPTS, competence=competence)
    assert person.reliable == (competence == 1.0)
    truth = drawn(CONCEPTS)
    share = (ask(person, truth).told == truth).float().mean(0)
    torch.testing.assert_close(share, torch.full((6,), right), rtol=0, atol=0.03)


def test_competence_by_name() -> None:
    truth = drawn(CONCEPTS)
    told = ask(Person(CONCEPTS, competence={"wet": 0.0, "small": 0.4}), truth).told
    share = (told == truth).float().mean(0)
    expected = torch.tensor([1.0, 1.0, 0.4, 1.0, 1.0, 0.0])
    torch.testing.assert_close(share, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize(("competence", "right"), [(0.0, 0.0), (0.7, 0.7), ("uniform", 2 / 3)])
def test_exactly_one_member_of_a_categorical_group_is_named(competence: Any, right: float) -> None:
    truth = drawn(MIXED)
    told = ask(Person(MIXED, competence=competence), truth).told
    assert (told[:, COLOURS].sum(1) == 1).all()
    assert ((told == 0) | (told == 1))[:, COLOURS].all()
    true, named = truth[:, COLOURS].argmax(1), told[:, COLOURS].argmax(1)
    assert (true == named).float().mean().item() == pytest.approx(right, abs=0.03)
    # a wrong member is any of the others
    wrong = ((named - true) % 3)[named != true]
    torch.testing.assert_close(
        torch.bincount(wrong, minlength=3)[1:] / len(wrong), torch.full((2,), 0.5), rtol=0, atol=0.05
    )
    # real values are always told right
    assert torch.equal(told[:, MIXED.index("weight")], truth[:, MIXED.index("weight")])


@pytest.mark.parametrize("member", ["red", "blue", "green"])
def test_competence_by_name_counts_for_each_member_of_a_group(member: str) -> None:
    truth = drawn(MIXED)
    told = ask(Person(MIXED, competence={member: 0.0}), truth).told
    assert not torch.equal(told, truth)


def test_mistakes_are_drawn_once_a_sample() -> None:
    truth = drawn(MIXED, 50)
    person = Person(MIXED, competence="uniform")
    whole = ask(person, truth).told
    assert torch.equal(ask(person, truth).told, whole)
    index = torch.arange(50).flip(0)
    again = person.answer(truth.flip(0), None, None, Randomness(0, "person", index)).told
    assert torch.equal(again.flip(0), whole)
    other = person.answer(truth, None, None, Randomness(1, "person", torch.arange(50))).told
    assert not torch.equal(other, whole)


def test_unknown_concepts_stay_unknown_whoever_answers() -> None:
    truth = drawn(MIXED, 60)
    truth[:20, COLOURS] = torch.nan
    truth[30:40, MIXED.index("wet")] = torch.nan
    for competence in (0.0, 0.5, "uniform"):
        answers = ask(Person(MIXED, competence=competence), truth)
        assert torch.equal(answers.told.isnan(), truth.isnan())
        assert torch.equal(answers.answerable, ~truth.isnan())


@pytest.mark.parametrize("on_invisible", ["skip", "use_label", "zero"])
def test_what_is_said_of_concepts_that_nobody_can_see(on_invisible: Any) -> None:
    truth = torch.tensor([[1.0, 1.0, 0.0, torch.nan, torch.nan, 1.0]])
    certainty = torch.tensor([[0.0, 0.5, 0.0, 0.0, 1.0, 1.0]])
    answers = ask(Person(CONCEPTS, on_invisible=on_invisible), truth, certainty=certainty)
    can = {"skip": [0, 1, 0, 0, 0, 1], "use_label": [1, 1, 1, 0, 0, 1], "zero": [1, 1, 1, 0, 0, 1]}[on_invisible]
    assert answers.answerable.int().tolist() == [can]
    said = {"skip": [1, 1], "use_label": [1, 1, 0, 1], "zero": [0, 1, 0, 1]}[on_invisible]
    assert answers.told[answers.answerable].tolist() == said
    # without a word on visibility everything is visible
    everything = ask(Person(CONCEPTS, on_invisible=on_invisible), truth)
    assert everything.answerable.int().tolist() == [[1, 1, 1, 0, 0, 1]]


def test_whoever_knows_the_class_tells_the_concepts_of_the_class() -> None:
    person = Person(CONCEPTS, "class")
    truth, label = drawn(CONCEPTS, 5), torch.tensor([0, 1, 1, 0, 2])
    with pytest.raises(RuntimeError, match="needs the concepts of each class; set class_concepts"):
        ask(person, truth, label)
    person.class_concepts = torch.stack([torch.zeros(6), torch.ones(6), torch.full((6,), torch.nan)])
    answers = ask(person, truth, label)
    assert answers.told[:4].tolist() == [[0.0] * 6, [1.0] * 6, [1.0] * 6, [0.0] * 6]
    assert answers.answerable.tolist() == [[True] * 6] * 4 + [[False] * 6]
    with pytest.raises(RuntimeError, match="needs the concepts of each class"):
        ask(person, truth)


def test_the_concepts_of_a_class_are_those_of_most_of_its_samples() -> None:
    nan = math.nan
    concepts = torch.tensor([[1.0, 1.0, nan], [1.0, 0.0, nan], [0.0, nan, nan], [0.0, 0.0, 1.0], [nan, 1.0, 0.0]])
    labels = torch.tensor([0, 0, 0, 2, 2])
    found = class_majority(concepts, labels, 4, ConceptSet(["a", "b", "c"]))
    # a tie is 1, and what nobody annotated is unknown, as is a class without samples
    expected = torch.tensor([[1.0, 1.0, nan], [nan, nan, nan], [0.0, 1.0, 1.0], [nan, nan, nan]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_of_a_categorical_group_a_class_has_the_commonest_member() -> None:
    colours = ConceptSet(["red", "blue", "green"], {"colour": ["red", "blue", "green"]}, kinds="categorical")
    drawn = torch.eye(3)[[0, 0, 1, 1, 2]]
    # neither red nor blue is held by half of the class, and yet it has one colour
    assert class_majority(drawn, torch.zeros(5), 1, colours).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_level": "sample"}, "label_level: expected one of"),
        ({"on_invisible": "ignore"}, "on_invisible: expected one of"),
        ({"competence": 1.2}, "competence: expected probabilities in \\[0, 1\\]"),
        ({"competence": {"wet": -0.1}}, "competence: expected probabilities"),
        ({"competence": math.nan}, "competence: expected probabilities"),
        ({"competence": "often"}, "competence: expected a number, numbers by concept, or 'uniform'"),
        ({"competence": {"wett": 0.5}}, "no concept is called 'wett'; did you mean \\['wet'\\]"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Person(CONCEPTS, **options)
