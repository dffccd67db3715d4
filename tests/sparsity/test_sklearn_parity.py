"""The same optimum as scikit-learn's saga, whose ``C`` weighs the summed loss: ``lambda = 1 / (C n)``."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sparsity.problems import Array, linear_problem, objective

from cbm_lightning.sparsity import ElasticNetPath


def standardised(n: int, k: int, classes: int, seed: int) -> tuple[Array, Array]:
    """Scores on one scale, on which saga converges fast."""
    x, y = linear_problem(n, k, classes, seed)
    return ((x - x.mean(0)) / x.std(0)).double().numpy(), y.numpy()


def by_saga(x: Array, y: Array, lam: float, alpha: float) -> LogisticRegression:
    found = LogisticRegression(
        C=1 / (lam * len(x)), l1_ratio=alpha, solver="saga", tol=1e-7, max_iter=20000, random_state=0
    )
    return found.fit(x, y)


# classes, seed, penalty, share of the l1 norm
PROBLEMS = {
    "three classes, lasso": (3, 1, 0.01, 1.0),
    "five classes, elastic net": (5, 2, 0.02, 0.5),
    "two classes, lasso": (2, 3, 0.01, 1.0),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_objective_is_that_of_saga(name: str) -> None:
    classes, seed, lam, alpha = PROBLEMS[name]
    x, y = standardised(200, 10, classes, seed)
    # of two classes scikit-learn fits one row, as we do one against the rest
    ovr = classes == 2
    theirs = by_saga(x, y, lam, alpha)
    ours = ElasticNetPath(
        lam, alpha=alpha, family="ovr" if ovr else "multinomial", standardize=False, dtype="float64", tol=1e-7
    ).fit(x, y)
    assert ours.coef_.shape == theirs.coef_.shape
    targets = y[:, None] if ovr else y
    found, expected = (
        objective(head.coef_, head.intercept_, x, targets, lam, alpha, ovr=ovr) for head in (ours, theirs)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert found <= expected * (1 + 1e-8)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-2)
    assert np.count_nonzero(ours.coef_ == 0) > 0
    np.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-2)
    assert (ours.predict(x) == theirs.predict(x)).mean() >= 0.99


def test_a_class_against_the_rest_is_a_fit_of_its_own() -> None:
    x, y = standardised(200, 10, 3, 4)
    ours = ElasticNetPath(0.01, alpha=1.0, family="ovr", standardize=False, dtype="float64", tol=1e-7).fit(x, y)
    for row in range(3):
        theirs = by_saga(x, (y == row).astype(int), 0.01, 1.0)
        np.testing.assert_allclose(ours.coef_[row], theirs.coef_[0], atol=1e-2)
        found, expected = (
            objective(w[None], b[None], x, (y == row)[:, None], 0.01, 1.0, ovr=True)
            for w, b in ((ours.coef_[row], ours.intercept_[row]), (theirs.coef_[0], theirs.intercept_[0]))
        )
        assert found == pytest.approx(expected, rel=1e-4)


def test_standardising_is_that_of_scores_beforehand() -> None:
    x, y = linear_problem(150, 8, 3, 5)
    beforehand = ((x - x.mean(0)) / x.std(0)).double()
    options = {"lambdas": 0.02, "dtype": "float64", "tol": 1e-9}
    ours = ElasticNetPath(**options).fit(x.double(), y)
    plain = ElasticNetPath(**options, standardize=False).fit(beforehand, y)
    np.testing.assert_allclose(ours.solution_.weight, plain.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.coef_, plain.coef_ / x.std(0).numpy(), atol=1e-6)
    np.testing.assert_allclose(ours.decision_function(x.double()), plain.decision_function(beforehand), atol=1e-6)
