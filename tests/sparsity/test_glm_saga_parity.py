"""Optima of the official GLM-SAGA (Wong et al., ICML 2021), and of the reference solver of the fixture."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sparsity.problems import Array, golden, objective, violation

from cbm_lightning.sparsity import ElasticNetPath

# alpha and penalty of each stored path
PATHS = {"path_alpha0.99": (0.99, "l1"), "path_alpha0.5": (0.5, "l1"), "path_group_alpha0.99": (0.99, "group")}
PRECISE = {"dtype": "float64", "tol": 1e-9, "max_iter": 2000}


class Case(NamedTuple):
    """A stored path, and ours for the same penalties."""

    name: str
    alpha: float
    group: bool
    data: dict[str, Array]
    ours: ElasticNetPath

    def of(self, what: str, reference: bool = False) -> Array:
        return self.data[f"{'REFERENCE_' if reference else ''}{self.name}__{what}"]


def fitted(data: dict[str, Array], name: str, **options: object) -> Case:
    alpha, penalty = PATHS[name]
    lambdas = data[f"{name}__lambdas"].tolist()
    path = ElasticNetPath(lambdas, alpha=alpha, penalty=penalty, standardize=False, **options)
    return Case(name, alpha, penalty == "group", data, path.fit(data["X_train"], data["y_train"]))


@pytest.fixture(scope="module")
def data(shared: Path) -> dict[str, Array]:
    return golden(shared, "glm_saga_paths")


@pytest.fixture(scope="module", params=PATHS)
def case(data: dict[str, Array], request: pytest.FixtureRequest) -> Case:
    return fitted(data, request.param, **PRECISE)


@pytest.fixture(scope="module", params=PATHS)
def default(data: dict[str, Array], request: pytest.FixtureRequest) -> Case:
    """In single precision and to the tolerance that is the default."""
    return fitted(data, request.param)


def objectives(case: Case) -> Array:
    """Of our solutions, on the scores as they came."""
    x, y = case.data["X_train"], case.data["y_train"]
    return np.array(
        [
            objective(s.coef.numpy(), s.intercept.numpy(), x, y, s.lam, case.alpha, group=case.group)
            for s in case.ours.path_
        ]
    )


def test_the_formula_is_that_of_the_fixture(case: Case) -> None:
    x, y = case.data["X_train"], case.data["y_train"]
    for i, lam in enumerate(case.of("lambdas")):
        said = objective(case.of("W")[i], case.of("b")[i], x, y, lam, case.alpha, group=case.group)
        assert said == pytest.approx(case.of("objective")[i], abs=1e-12)


def test_the_objective_is_the_reference_and_at_most_the_official_one(case: Case) -> None:
    ours = objectives(case)
    assert (ours <= case.of("objective") * (1 + 1e-3)).all()
    np.testing.assert_allclose(ours, case.of("objective", reference=True), rtol=0, atol=1e-6)
    np.testing.assert_allclose([s.objective for s in case.ours.path_], ours, rtol=0, atol=1e-12)


def test_the_weights_are_those_of_the_reference(case: Case) -> None:
    for found, expected in zip(case.ours.path_, case.of("W", reference=True), strict=True):
        np.testing.assert_allclose(found.coef, expected, rtol=0, atol=1e-4)
        assert np.array_equal(found.coef != 0, expected != 0)


def test_the_weights_are_the_official_ones_where_these_are_optimal(case: Case) -> None:
    gap = case.of("objective") / case.of("objective", reference=True) - 1
    close = np.flatnonzero(gap < 1e-6)
    assert len(close) >= 4
    for i in close:
        np.testing.assert_allclose(case.ours.path_[i].coef, case.of("W")[i], rtol=0, atol=1e-2)


def test_the_largest_penalty_is_the_official_one(case: Case) -> None:
    official = case.data[f"maximum_reg_{'grouped' if case.group else 'nongrouped'}"]
    assert case.ours.lambda_max_ == pytest.approx(float(official) / case.alpha, rel=1e-6)
    assert [s.lam for s in case.ours.path_] == case.of("lambdas").tolist()
    alone = ElasticNetPath(n_lambdas=1, eps=0.5, alpha=case.alpha, standardize=False, **PRECISE)
    alone.set_params(penalty="group" if case.group else "l1", lambdas=case.ours.lambda_max_ * (1 + 1e-9))
    assert not alone.fit(case.data["X_train"], case.data["y_train"]).coef_.any()


def test_what_is_said_to_be_missed_is_missed(case: Case) -> None:
    x, y = case.data["X_train"], case.data["y_train"]
    for s in case.ours.path_:
        missed = violation(s.coef.numpy(), s.intercept.numpy(), x, y, s.lam, case.alpha, group=case.group)
        assert s.kkt <= 1e-9
        assert missed == pytest.approx(s.kkt, abs=1e-10)


def test_single_precision_comes_close(default: Case) -> None:
    x, y = default.data["X_train"], default.data["y_train"]
    ours = objectives(default)
    assert (ours <= default.of("objective") * (1 + 1e-3)).all()
    np.testing.assert_allclose(ours, default.of("objective", reference=True), rtol=0, atol=1e-5)
    for s, said in zip(default.ours.path_, ours, strict=True):
        assert s.coef.dtype == s.bias.dtype == torch.float32
        assert s.objective == pytest.approx(said, abs=1e-6)
        missed = violation(s.coef.numpy(), s.intercept.numpy(), x, y, s.lam, default.alpha, group=default.group)
        assert s.kkt <= 1e-5
        assert missed == pytest.approx(s.kkt, abs=2e-6)


@pytest.mark.parametrize("lam", [0.0007, 0.01])
def test_a_single_penalty(data: dict[str, Array], lam: float) -> None:
    x, y = data["X_train"], data["y_train"]
    ours = ElasticNetPath(lam / 0.99, alpha=0.99, standardize=False, **PRECISE).fit(x, y)
    official = float(data[f"single_lam{lam}__objective"])
    found = objective(ours.coef_, ours.intercept_, x, y, lam / 0.99, 0.99)
    assert found <= official * (1 + 1e-6)
    assert violation(ours.coef_, ours.intercept_, x, y, lam / 0.99, 0.99) <= 1.1e-9
    stored = objective(data[f"single_lam{lam}__W"], data[f"single_lam{lam}__b"], x, y, lam / 0.99, 0.99)
    assert stored == pytest.approx(official, abs=1e-9)
    if lam == 0.01:
        # at the smaller one the official solver is 6 % above the optimum
        np.testing.assert_allclose(ours.coef_, data["single_lam0.01__W"], rtol=0, atol=1e-2)
        assert found == pytest.approx(official, abs=1e-6)


def test_a_path_ends_where_each_of_its_penalties_does(case: Case) -> None:
    x, y = case.data["X_train"], case.data["y_train"]
    middle = case.ours.path_[4]
    alone = ElasticNetPath(middle.lam, alpha=case.alpha, standardize=False, **PRECISE)
    alone.set_params(penalty="group" if case.group else "l1").fit(x, y)
    np.testing.assert_allclose(alone.coef_, middle.coef, rtol=0, atol=1e-6)
    assert alone.path_[0].objective == pytest.approx(middle.objective, abs=1e-12)
