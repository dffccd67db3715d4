"""The path itself: which penalties, what they leave, and what a refit does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.exceptions import ConvergenceWarning
from sparsity.problems import linear_problem, objective, several_labels, violation
from torch import Tensor

from cbm_lightning.sparsity import ElasticNetPath, nec

PRECISE = {"dtype": "float64", "tol": 1e-9}


def standardised(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.double()
    return ((x - x.mean(0)) / x.std(0)).numpy()


@pytest.mark.parametrize("penalty", ["l1", "group"])
@pytest.mark.parametrize("family", ["multinomial", "ovr"])
@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.0])
def test_every_solution_is_an_optimum(penalty: str, family: str, alpha: float) -> None:
    x, y = linear_problem()
    path = ElasticNetPath([0.02, 0.1], alpha=alpha, penalty=penalty, family=family, **PRECISE).fit(x, y)
    targets = np.eye(3)[y.numpy()] if family == "ovr" else y.numpy()
    kind = {"group": penalty == "group", "ovr": family == "ovr"}
    for s in path.path_:
        problem = s.weight.numpy(), s.bias.numpy(), standardised(x), targets, s.lam, alpha
        assert s.kkt <= 1e-9
        assert violation(*problem, **kind) == pytest.approx(s.kkt, abs=1e-12)
        assert s.objective == pytest.approx(objective(*problem, **kind), abs=1e-12)
        assert s.iterations > 0


@pytest.mark.parametrize("penalty", ["l1", "group"])
@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_the_path_starts_without_a_weight_and_ends_at_eps(penalty: str, family: str) -> None:
    x, y = linear_problem()
    path = ElasticNetPath(n_lambdas=12, eps=0.01, penalty=penalty, family=family).fit(x, y)
    lambdas = [s.lam for s in path.path_]
    np.testing.assert_allclose(lambdas, path.lambda_max_ * np.geomspace(1, 0.01, 12))
    assert path.path_[0].nec == 0
    # below the largest penalty there is always a weight
    just_below = ElasticNetPath(0.99 * path.lambda_max_, penalty=penalty, family=family, **PRECISE).fit(x, y)
    assert just_below.solution_.nec > 0
    assert path.path_[-1].nec > 6
    assert path.path_[-1] is path.solution_
    # a weaker penalty never fits worse
    losses = [
        objective(s.weight, s.bias, standardised(x), y_of(y, family), 0, 1, ovr=family == "ovr") for s in path.path_
    ]
    assert all(later < earlier + 1e-5 for earlier, later in pairwise(losses))


def y_of(y: Tensor, family: str) -> np.ndarray[Any, Any]:
    targets = np.eye(int(y.max()) + 1)[y.numpy()] if family == "ovr" else y.numpy()
    return np.asarray(targets)


def test_given_penalties_are_followed_from_the_largest() -> None:
    x, y = linear_problem()
    path = ElasticNetPath(np.array([0.01, 0.2, 0.05])).fit(x, y)
    assert [s.lam for s in path.path_] == [0.2, 0.05, 0.01]
    assert path.solution_.lam == 0.01
    assert [s.lam for s in ElasticNetPath(0.05).fit(x, y).path_] == [0.05]


def test_without_a_penalty_the_fit_is_that_of_maximum_likelihood() -> None:
    # classes that overlap, so that there is a largest likelihood
    x = torch.randn(200, 3)
    y = (x[:, 0] + 2 * torch.randn(200) > 0).long()
    free = ElasticNetPath(0.0, family="ovr", **PRECISE).fit(x, y)
    assert (free.coef_ != 0).all()
    assert violation(free.coef_, free.intercept_, x.numpy(), y.numpy()[:, None], 0.0, 1.0, ovr=True) < 1e-8


def test_the_path_ends_at_a_number_of_effective_concepts() -> None:
    x, y = linear_problem()
    whole = ElasticNetPath(n_lambdas=20).fit(x, y)
    short = ElasticNetPath(n_lambdas=20, max_nec=3).fit(x, y)
    assert 2 < len(short.path_) < 20
    assert [s.nec for s in short.path_] == [s.nec for s in whole.path_[: len(short.path_)]]
    assert short.path_[-1].nec > 3
    assert all(s.nec <= 3 for s in short.path_[:-1])


def test_solutions_of_a_path_at_a_level() -> None:
    x, y = linear_problem()
    path = ElasticNetPath(n_lambdas=20).fit(x, y)
    for level in (1, 2.3333, 5):
        enough = path.at_nec(level, prune=False)
        assert enough.nec >= level
        assert all(s.nec < level for s in path.path_ if s.lam > enough.lam)
        assert path.at_nec(level).nec == pytest.approx(round(3 * level) / 3)
        assert path.at_nec(level).lam == enough.lam
    densest = max(path.path_, key=lambda s: s.nec)
    assert path.at_nec(12.0).nec == densest.nec < 12


def test_a_group_penalty_drops_whole_columns() -> None:
    x, y = linear_problem(k=16)
    ours = ElasticNetPath(0.05, penalty="group").fit(x, y)
    used = (ours.coef_ != 0).any(0)
    assert 0 < used.sum() < 16
    assert ((ours.coef_ != 0).all(0) == used).all()
    single = ElasticNetPath(0.05).fit(x, y)
    assert ((single.coef_ != 0).any(0) != (single.coef_ != 0).all(0)).any()


def test_concepts_of_several_columns() -> None:
    x, y = linear_problem(k=16)
    whole = ElasticNetPath(0.08, penalty="group", group_size=4).fit(x, y)
    blocks = whole.solution_.by_concept
    assert blocks.shape == (3, 4, 4)
    used = (blocks != 0).flatten(2).any(-1)
    assert torch.equal(used, (blocks != 0).flatten(2).all(-1))
    assert 0 < int(used[0].sum()) < 4
    assert torch.equal(used[0].expand_as(used), used)
    assert whole.solution_.nec == nec(blocks) == float(used[0].sum())
    at_two = ElasticNetPath(nec=2, group_size=4).fit(x, y)
    assert at_two.solution_.nec == 2
    assert int((at_two.solution_.by_concept != 0).any(2).sum()) == 6
    # the conditions of the optimum are those of groups
    precise = ElasticNetPath(0.08, penalty="group", group_size=4, alpha=1.0, **PRECISE).fit(x, y).solution_
    logits = torch.from_numpy(standardised(x)) @ precise.weight.T + precise.bias
    off = logits.softmax(-1) - torch.eye(3, dtype=torch.float64)[y]
    slope = (off.T @ torch.from_numpy(standardised(x)) / len(x)).unflatten(1, (4, 4))
    norms = precise.by_concept.norm(dim=(0, 2))
    assert (slope.norm(dim=(0, 2))[norms == 0] <= 0.08 + 1e-9).all()
    unit = precise.by_concept / norms.clamp(min=1e-300)[:, None]
    assert float((slope + 0.08 * unit)[:, norms > 0].abs().max()) < 1e-8


def test_without_an_intercept_nothing_is_centred() -> None:
    x, y = linear_problem()
    ours = ElasticNetPath(0.02, alpha=0.9, fit_intercept=False, **PRECISE).fit(x, y)
    assert (ours.intercept_ == 0).all()
    assert (ours.solution_.mean == 0).all()
    scaled = (x.double() / x.double().std(0)).numpy()
    weight = ours.solution_.weight.numpy()
    off = softmax(scaled @ weight.T, axis=1) - np.eye(3)[y.numpy()]
    slope = off.T @ scaled / len(x) + 0.002 * weight
    assert np.abs(slope + 0.018 * np.sign(weight))[weight != 0].max() < 1e-8
    assert np.abs(slope[weight == 0]).max() <= 0.018 + 1e-8


def test_the_biases_of_a_softmax_sum_to_zero() -> None:
    x, y = linear_problem()
    for s in ElasticNetPath([0.01, 0.1]).fit(x, y).path_:
        assert float(s.bias.sum()) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_a_refit_keeps_the_zeros_and_is_the_optimum_of_a_ridge(family: str) -> None:
    x, y = linear_problem()
    path = ElasticNetPath(0.05, family=family, **PRECISE).fit(x, y)
    before = path.solution_
    after = path.refit(before, x, y, ridge=0.01)
    assert torch.equal(after.weight != 0, before.weight != 0)
    assert after.lam == before.lam
    scores, targets = standardised(x), y_of(y, family)
    kind = {"ovr": family == "ovr"}
    loss = [objective(s.weight, s.bias, scores, targets, 0, 1, **kind) for s in (before, after)]
    assert loss[1] < loss[0] - 0.01
    assert after.objective == pytest.approx(objective(after.weight, after.bias, scores, targets, 0.01, 0, **kind))
    # scaled up or down, or with any kept weight moved, the ridge objective is worse
    for step in (0.99, 1.01):
        assert objective(after.weight * step, after.bias, scores, targets, 0.01, 0, **kind) > after.objective
    for index in after.weight.nonzero():
        for move in (-0.01, 0.01):
            other = after.weight.clone()
            other[tuple(index)] += move
            assert objective(other, after.bias, scores, targets, 0.01, 0, **kind) > after.objective


def test_refit_ridge_refits_what_is_kept() -> None:
    x, y = linear_problem()
    for options in ({"lambdas": 0.05}, {"nec": 2}):
        plain, refitted = (ElasticNetPath(**options, refit_ridge=ridge, **PRECISE).fit(x, y) for ridge in (None, 0.01))
        assert np.array_equal(plain.coef_ != 0, refitted.coef_ != 0)
        by_hand = plain.refit(plain.solution_, x, y, ridge=0.01)
        torch.testing.assert_close(refitted.solution_.weight, by_hand.weight, rtol=0, atol=1e-7)
        np.testing.assert_allclose(refitted.coef_, by_hand.coef, atol=1e-7)
        np.testing.assert_allclose(refitted.intercept_, by_hand.intercept, atol=1e-7)


def test_a_refit_of_no_weight_at_all() -> None:
    x, y = linear_problem()
    empty = ElasticNetPath(10.0, refit_ridge=0.1).fit(x, y)
    assert not empty.coef_.any()
    share = torch.bincount(y).numpy() / len(y)
    np.testing.assert_allclose(empty.predict_proba(x[:2].numpy()), [share, share], atol=1e-4)


def test_steps_that_do_not_suffice_are_told() -> None:
    x, y = linear_problem()
    with pytest.warns(ConvergenceWarning) as caught:
        short = ElasticNetPath(0.003, max_iter=2).fit(x, y)
    [said] = [str(w.message) for w in caught]
    assert short.solution_.iterations == 2
    assert f"missed by {short.solution_.kkt:.1e} after 2 steps, expected 1.0e-05" in said
    assert "lambda 0.003" in said
    assert "raise max_iter" in said
    s = short.solution_
    missed = violation(s.weight.numpy(), s.bias.numpy(), standardised(x), y.numpy(), s.lam, 0.99)
    assert missed == pytest.approx(s.kkt, rel=1e-3)
    assert missed > 1e-5


@pytest.mark.parametrize("make", [linear_problem, several_labels])
def test_the_same_data_give_the_same_weights(make: Callable[..., tuple[Tensor, Tensor]]) -> None:
    x, y = make()
    options = {"family": "ovr", "n_lambdas": 6}
    first, second = (ElasticNetPath(**options).fit(x.clone(), y.clone()) for _ in range(2))
    assert np.array_equal(first.coef_, second.coef_)
    assert np.array_equal(first.intercept_, second.intercept_)
    again = first.fit(x, y)
    assert np.array_equal(again.coef_, second.coef_)


def test_data_are_not_written_to() -> None:
    x, y = linear_problem()
    before = x.clone(), y.clone()
    path = ElasticNetPath(0.02).fit(x, y)
    path.predict(x)
    path.refit(path.solution_, x, y)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    array = x.numpy().copy()
    ElasticNetPath(0.02, dtype="float64").fit(array, y.numpy())
    assert np.array_equal(array, x.numpy())


def test_correlated_concepts_on_very_different_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(150, 3, generator=generator, dtype=torch.float64)
    x = base @ torch.randn(3, 20, generator=generator, dtype=torch.float64)
    x = (x + 0.01 * torch.randn(150, 20, generator=generator, dtype=torch.float64)) * torch.logspace(-4, 4, 20)
    x += 100 * x.std(0)
    y = base.argmax(1)
    path = ElasticNetPath([0.1, 0.01, 0.001], dtype="float64", tol=1e-7).fit(x, y)
    for s in path.path_:
        assert violation(s.weight, s.bias, standardised(x), y.numpy(), s.lam, 0.99) < 2e-7
    assert path.score(x.numpy(), y.numpy()) > 0.9
