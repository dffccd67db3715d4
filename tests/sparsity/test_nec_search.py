"""Heads with a wanted number of effective concepts, found directly."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sparsity.problems import linear_problem

from cbm_lightning.sparsity import ElasticNetPath, SparseSolution
from cbm_lightning.sparsity.search import find_levels
from cbm_lightning.sparsity.solver import Point

WIDE = linear_problem(n=400, k=30, classes=20, seed=1, useful=20)


class Counted:
    """A solver whose number of effective concepts is a given function of the penalty."""

    def __init__(self, count: Callable[[float], float], columns: int = 1000) -> None:
        self.count, self.columns = count, columns
        self.starts: dict[float, float] = {}

    def __call__(self, lam: float, start: Point) -> tuple[SparseSolution, Point]:
        assert lam not in self.starts
        self.starts[lam] = start.curvature
        weight = torch.zeros(1, self.columns)
        weight[:, : round(self.count(lam))] = 1.0
        column = torch.zeros(self.columns)
        # the point carries its penalty where the solver keeps its curvature
        return SparseSolution(weight, torch.zeros(1), column, column + 1, lam, 0.0, 0.0, 1), Point(weight, column, lam)

    def find(self, levels: list[float], eps: float = 1e-3) -> list[SparseSolution]:
        return find_levels(self, levels, 1.0, eps, Point(torch.zeros(1, 1), torch.zeros(1), 1.0))


def first(path: list[SparseSolution], level: float) -> SparseSolution:
    return max((s for s in path if s.nec >= level), key=lambda s: s.lam)


@pytest.mark.parametrize("power", [0.7, 1.0, 3.0])
def test_every_level_is_met_within_two_percent(power: float) -> None:
    solver = Counted(lambda lam: 1000 * (math.log(1 / lam) / math.log(1e3)) ** power)
    levels = [50, 100, 150, 300, 900]
    found = solver.find(levels)
    for level in levels:
        assert level <= first(found, level).nec <= 1.02 * level
    assert len(found) == len(solver.starts) <= 8 * len(levels)


def test_each_solution_starts_from_the_nearest_one() -> None:
    solver = Counted(lambda lam: 100 * math.log(1 / lam))
    solver.find([50, 200])
    known = [1.0]
    for lam, start in solver.starts.items():
        assert start == min(known, key=lambda other: abs(math.log(other / lam)))
        known.append(lam)


def test_where_the_count_jumps_over_a_level_the_one_above_it_is_found() -> None:
    solver = Counted(lambda lam: 10 if lam > 0.0371 else 500)
    found = solver.find([200])
    above = first(found, 200)
    assert above.nec == 500
    assert 0.0371 / (1 + 2e-3) <= above.lam <= 0.0371
    assert len(found) < 40


def test_a_solution_that_is_there_is_not_looked_for_again() -> None:
    def count(lam: float) -> float:
        return 1000 * math.log(1 / lam) / math.log(1e3)

    alone, once = Counted(count), Counted(count)
    found = first(alone.find([300]), 300).nec
    once.find([300, found, 300])
    assert list(once.starts) == list(alone.starts)


def test_a_level_out_of_reach_is_told_once_with_what_there_is() -> None:
    solver = Counted(lambda lam: min(20, 100 * math.log(1 / lam)))
    with pytest.warns(UserWarning, match=r"nec: the smallest penalty \(0.001\) leaves 20 concepts a class.*50") as said:
        found = solver.find([10, 50])
    assert len(said) == 1
    assert min(s.lam for s in found) == pytest.approx(1e-3)
    assert 10 <= first(found, 10).nec <= 10.2


@pytest.mark.parametrize("penalty", ["l1", "group"])
def test_a_head_with_exactly_as_many(penalty: str) -> None:
    x, y = WIDE
    for level in (5, 12.5):
        ours = ElasticNetPath(nec=level, penalty=penalty).fit(x, y)
        # with a group penalty whole concepts go
        left = level if penalty == "l1" else round(level)
        assert np.count_nonzero(ours.coef_) == 20 * left
        assert ours.solution_.nec == left
        assert penalty == "l1" or np.count_nonzero(ours.coef_.any(0)) == left
        before = ours.at_nec(level, prune=False)
        if penalty == "l1":
            assert level <= before.nec <= 1.02 * level
        else:
            # a concept more is one for every class
            assert level <= before.nec <= level + 1


def test_several_levels_in_one_search() -> None:
    x, y = WIDE
    levels = [3, 20, 5, 10]
    ours = ElasticNetPath(nec=levels).fit(x, y)
    for level in levels:
        assert level <= ours.at_nec(level, prune=False).nec <= 1.02 * level
        assert int((ours.at_nec(level).weight != 0).sum()) == 20 * level
    assert ours.solution_.nec == 20
    lambdas = [s.lam for s in ours.path_]
    assert lambdas == sorted(lambdas, reverse=True)
    assert all(s.kkt <= 1e-5 for s in ours.path_)
    assert ElasticNetPath(nec=np.array([3, 20])).fit(x, y).solution_.nec == 20


def test_the_pruned_weights_are_the_largest_and_otherwise_unchanged() -> None:
    x, y = WIDE
    ours = ElasticNetPath(nec=5).fit(x, y)
    before = ours.at_nec(5, prune=False).weight
    kept = ours.solution_.weight != 0
    assert torch.equal(before[kept], ours.solution_.weight[kept])
    assert before[kept].abs().min() >= before[~kept].abs().max()


def test_all_concepts_may_be_asked_for() -> None:
    x, y = linear_problem(n=400, k=4, useful=4)
    assert ElasticNetPath(nec=4, eps=1e-5, family="ovr").fit(x, y).solution_.nec == 4
    # with a softmax one class can always do without: equal shifts of a concept's weights change no probability
    with pytest.warns(UserWarning, match="fewer than the 4 asked for"):
        assert ElasticNetPath(nec=4, eps=1e-4).fit(x, y).solution_.nec <= 4 * (1 - 1 / len(np.unique(y)))


def test_a_search_that_ends_too_early_warns_and_gives_the_densest() -> None:
    x, y = WIDE
    with pytest.warns(UserWarning, match="fewer than the 25 asked for; lower eps"):
        ours = ElasticNetPath(nec=25, eps=0.5).fit(x, y)
    assert ours.solution_.nec == max(s.nec for s in ours.path_) < 25
    assert ours.solution_.lam == pytest.approx(0.5 * ours.lambda_max_)


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_it_is_a_solution_of_its_penalty(family: str) -> None:
    x, y = WIDE
    ours = ElasticNetPath(nec=5, family=family, dtype="float64", tol=1e-8).fit(x, y)
    alone = ElasticNetPath(ours.solution_.lam, family=family, dtype="float64", tol=1e-8).fit(x, y)
    torch.testing.assert_close(ours.at_nec(5, prune=False).weight, alone.solution_.weight, rtol=0, atol=1e-5)
