"""What a person is asked about at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from small_models import CONCEPTS

from cbm_lightning import ConceptSet
from cbm_lightning.interventions import Units

GROUPS = {"kept dry": ["red", "wet"], "rest": ["blue", "small", "large", "huge"]}


def test_units_are_concepts_groups_or_what_the_user_says() -> None:
    assert Units.make(CONCEPTS).names == tuple(CONCEPTS)
    assert torch.equal(Units.make(CONCEPTS).membership, torch.eye(6, dtype=torch.bool))
    by_group = Units.make(CONCEPTS, "group")
    assert by_group.names == ("colour", "size", "wet")
    assert by_group.membership.int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    own = Units.make(CONCEPTS, GROUPS)
    assert own.names == ("kept dry", "rest")
    assert own.membership.int().tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 0]]
    assert len(own) == 2
    assert own.index("rest") == 1


def test_units_and_their_concepts() -> None:
    units = Units.make(CONCEPTS, GROUPS)
    generator = torch.Generator().manual_seed(0)
    asked = torch.rand(3, 5, 2, generator=generator) < 0.5
    expanded = units.expand(asked)
    assert expanded.shape == (3, 5, 6)
    for u, members in enumerate(units.membership):
        assert torch.equal(expanded[..., members], asked[..., u : u + 1].expand(-1, -1, int(members.sum())))
    assert torch.equal(units.touched(expanded), asked)
    some = torch.tensor([[False, True, False, False, False, False], [False] * 6])
    assert units.touched(some).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("reduce", ["mean", "max", "sum"])
def test_the_score_of_a_group_is_that_of_its_open_members(reduce: Any) -> None:
    units = Units.make(CONCEPTS, GROUPS, reduce)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(20, 6, generator=generator)
    open_concepts = torch.rand(20, 6, generator=generator) < 0.5
    scores[~open_concepts] = torch.nan  # must not be looked at
    found = units.scores(scores, open_concepts)
    how = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}[reduce]
    for b in range(20):
        for u in range(2):
            members = [k for k in range(6) if units.membership[u, k] and open_concepts[b, k]]
            expected = how([scores[b, k].item() for k in members]) if members else -math.inf
            assert found[b, u].item() == pytest.approx(expected, abs=1e-6)
    assert (found == -torch.inf).any()


def test_costs_are_a_number_or_numbers_by_unit() -> None:
    assert Units.make(CONCEPTS, "group").costs.tolist() == [1, 1, 1]
    assert Units.make(CONCEPTS, "group", costs=0.5).costs.tolist() == [0.5, 0.5, 0.5]
    assert Units.make(CONCEPTS, "group", costs={"size": 3}).costs.tolist() == [1, 3, 1]


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"sise": 2.0}, "costs: expected units such as .*, got also \\['sise'\\]"),
        (-1.0, "costs: expected finite numbers of at least 0"),
        ({"size": math.inf}, "costs: expected finite numbers"),
        ({"size": math.nan}, "costs: expected finite numbers"),
    ],
)
def test_costs_that_are_refused(costs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Units.make(CONCEPTS, "group", costs=costs)


def test_groups_cover_each_concept_once() -> None:
    with pytest.raises(ValueError, match=r"cover each of the 6 concepts once; in no group are \['small', 'large'"):
        Units.make(CONCEPTS, {"colour": ["red", "blue"]})
    with pytest.raises(ValueError, match=r"in several \['red'\]"):
        Units.make(CONCEPTS, {"all": list(CONCEPTS), "more": ["red"]})
    with pytest.raises(ValueError, match=r"no concept is called 'bleu'; did you mean \['blue'"):
        Units.make(CONCEPTS, {"colour": ["red", "bleu"]})


def test_units_and_reductions_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="unit: expected 'concept', 'group' or a mapping"):
        Units.make(CONCEPTS, "groups")
    with pytest.raises(ValueError, match="group_reduce: expected 'mean', 'max' or 'sum', got 'median'"):
        Units.make(CONCEPTS, "group", "median")
    with pytest.raises(ValueError, match=r"no unit is called 'sise'; did you mean one of \['size'\]"):
        Units.make(CONCEPTS, "group").index("sise")


def test_a_concept_set_without_groups_has_groups_of_one() -> None:
    units = Units.make(ConceptSet(["a", "b"]), "group")
    assert units.names == ("a", "b")
