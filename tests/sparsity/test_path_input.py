"""Bad input is refused in words that say what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sparsity.problems import linear_problem, several_labels

from cbm_lightning.sparsity import ElasticNetPath

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lambdas": -0.1}, "^lambdas: .*at least 0, got -0.1"),
        ({"lambdas": [0.1, -0.1]}, "^lambdas: .*at least 0"),
        ({"lambdas": NAN}, "^lambdas: "),
        ({"lambdas": float("inf")}, "^lambdas: "),
        ({"lambdas": []}, "^lambdas: .*got none"),
        ({"lambdas": 0.1, "nec": 3}, "^lambdas, nec: .*got both"),
        ({"nec": 0}, "^nec: .*positive.*got 0"),
        ({"nec": [5, -1]}, "^nec: .*positive"),
        ({"nec": NAN}, "^nec: "),
        ({"nec": []}, "^nec: .*got none"),
        ({"alpha": -0.01}, r"^alpha: .*\[0, 1\], got -0.01"),
        ({"alpha": 1.5}, r"^alpha: .*\[0, 1\], got 1.5"),
        ({"alpha": 1.5, "penalty": "group"}, r"^alpha: .*\[0, 1\]"),
        ({"penalty": "l0"}, "^penalty: .*'l1', 'group'.*got 'l0'"),
        ({"family": "probit"}, "^family: .*'multinomial', 'ovr'.*got 'probit'"),
        ({"dtype": "bfloat16"}, "^dtype: .*'float32', 'float64'.*got 'bfloat16'"),
        ({"n_lambdas": 0}, "n_lambdas.*at least 1"),
        ({"max_iter": 0}, "max_iter.*at least 1"),
        ({"group_size": 0}, "group_size.*at least 1"),
        ({"eps": 0.0}, r"^eps: .*\(0, 1\)"),
        ({"eps": 1.0}, r"^eps: .*\(0, 1\)"),
        ({"tol": 0.0}, "^tol: .*positive"),
        ({"tol": NAN}, "^tol: .*positive"),
        ({"refit_ridge": 0.0}, "^refit_ridge: .*positive"),
    ],
)
def test_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ElasticNetPath(**options)


@pytest.mark.parametrize("number", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_scores_that_are_no_numbers_name_their_concepts(number: float, chunk_size: int | None) -> None:
    x, y = linear_problem()
    x[7, 2], x[110, 9] = number, number
    names = [f"wing {k}" for k in range(12)]
    with pytest.raises(ValueError, match=r"^X: expected finite.*\['wing 2', 'wing 9'\]$"):
        ElasticNetPath(0.01, chunk_size=chunk_size).fit(x, y, names)
    with pytest.raises(ValueError, match=r"\['2', '9'\]$"):
        ElasticNetPath(0.01).fit(x, y)
    with pytest.raises(ValueError, match=r"\['wing 2', 'wing 9'\]$"):
        ElasticNetPath(0.01).fit(pd.DataFrame(x.numpy(), columns=names), y)


def test_scores_of_opposite_infinities() -> None:
    x, y = linear_problem()
    x[0, 4], x[1, 4] = float("inf"), -float("inf")
    with pytest.raises(ValueError, match=r"\['4'\]$"):
        ElasticNetPath(0.01).fit(x, y)


def test_of_many_bad_concepts_the_first_are_named() -> None:
    x, y = linear_problem(k=20)
    x[0] = NAN
    with pytest.raises(ValueError, match=r"'0', .*'7'\] and 12 more"):
        ElasticNetPath(0.01).fit(x, y)


@pytest.mark.parametrize("shape", [(0, 12), (120, 0), (120,), (120, 12, 2), ()])
@pytest.mark.parametrize("kind", [torch.ones, np.ones])
def test_scores_that_are_no_matrix(shape: tuple[int, ...], kind: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"^X: expected a matrix \[n, K\]") as said:
        ElasticNetPath(0.01).fit(kind(shape), linear_problem()[1])
    assert str(list(shape)) in str(said.value)


def test_an_empty_list() -> None:
    with pytest.raises(ValueError, match="^X: expected a matrix"):
        ElasticNetPath(0.01).fit([], [])


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
@pytest.mark.parametrize("label", [1, "crow", True])
def test_one_class_only(family: str, label: Any) -> None:
    x, _ = linear_problem()
    with pytest.raises(ValueError, match=rf"^y: expected two classes or more, got only \[{label!r}\]"):
        ElasticNetPath(0.01, family=family).fit(x, np.full(120, label))


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_another_number_of_labels(family: str) -> None:
    x, y = linear_problem()
    with pytest.raises(ValueError, match="^y: expected 120 labels, one a row of X, got 119"):
        ElasticNetPath(0.01, family=family).fit(x, y[1:])
    with pytest.raises(ValueError, match="^y: expected 119 labels"):
        ElasticNetPath(0.01, family=family).fit(x[1:].numpy(), y.numpy())


@pytest.mark.parametrize(
    "missing",
    [
        lambda y: y.double().masked_fill(torch.arange(120) == 5, NAN),
        lambda y: np.where(np.arange(120) == 5, np.inf, y.numpy()),
        lambda y: np.array([None, *y.tolist()[1:]], dtype=object),
        lambda y: np.array([NAN, *map(str, y.tolist()[1:])], dtype=object),
        lambda y: pd.Series([None, *map(str, y.tolist()[1:])]),
        lambda y: pd.Series([pd.NA, *y.tolist()[1:]], dtype="Int64"),
    ],
    ids=["NaN", "infinity", "None", "NaN beside text", "missing text", "missing integer"],
)
def test_missing_labels(missing: Callable[[torch.Tensor], Any]) -> None:
    x, y = linear_problem()
    with pytest.raises(ValueError, match="^y: expected a label for each sample"):
        ElasticNetPath(0.01).fit(x, missing(y))


def test_labels_of_another_shape() -> None:
    x, y = several_labels()
    with pytest.raises(ValueError, match=r"^y: several labels a sample \(\[120, 3\]\) need family='ovr'"):
        ElasticNetPath(0.01).fit(x, y)
    with pytest.raises(ValueError, match="^y: expected 0 or 1 for each label"):
        ElasticNetPath(0.01, family="ovr").fit(x, 2 * y)
    with pytest.raises(ValueError, match="^y: expected a label for each sample"):
        ElasticNetPath(0.01, family="ovr").fit(x, y.float().masked_fill(y == 1, NAN))
    with pytest.raises(ValueError, match=r"^y: expected \[n\] or \[n, L\], got \[120, 3, 1\]"):
        ElasticNetPath(0.01, family="ovr").fit(x, y[..., None])
    y[:, 1] = 1
    y[:, 2] = 0
    with pytest.warns(UserWarning, match=r"the labels \[1, 2\] are the same for all samples; they get no weights"):
        ours = ElasticNetPath(0.01, family="ovr").fit(x, y)
    assert ours.coef_[0].any()
    assert not ours.coef_[1:].any()
    assert ours.predict(x)[:, 1:].tolist() == [[1, 0]] * len(x)


def test_more_concepts_than_there_are() -> None:
    x, y = linear_problem()
    with pytest.raises(ValueError, match="^nec: expected at most the 12 concepts of X, got 13"):
        ElasticNetPath(nec=[5, 13]).fit(x, y)
    with pytest.raises(ValueError, match="^nec: expected at most the 4 concepts of X, got 5"):
        ElasticNetPath(nec=5, group_size=3).fit(x, y)
    with pytest.raises(ValueError, match=r"^nec: .*\[0, 12\]"):
        ElasticNetPath(nec=5).fit(x, y).solution_.pruned(13)


def test_arguments_that_do_not_fit_the_scores() -> None:
    x, y = linear_problem()
    with pytest.raises(ValueError, match="^group_size: 5 columns a concept do not divide the 12 of X"):
        ElasticNetPath(0.01, group_size=5).fit(x, y)
    with pytest.raises(ValueError, match="^names: expected 12, one a column of X, got 2"):
        ElasticNetPath(0.01).fit(x, y, ["a", "b"])
    with pytest.raises(ValueError, match="^chunk_size: expected at least 1 row, got 0"):
        ElasticNetPath(0.01, chunk_size=0).fit(x, y)


def test_a_failed_fit_changes_nothing() -> None:
    x, y = linear_problem()
    fitted = ElasticNetPath(nec=3).fit(x, y)
    before = fitted.predict(x)
    wider, _ = linear_problem(k=15)
    with pytest.raises(ValueError, match="^y: "):
        fitted.fit(wider, y[1:])
    with pytest.raises(ValueError, match="^nec: "):
        fitted.set_params(nec=16).fit(wider, y)
    assert torch.equal(fitted.predict(x), before)


def test_a_failed_fit_is_none() -> None:
    x, y = linear_problem()
    made = ElasticNetPath(nec=13)
    with pytest.raises(ValueError, match="^nec: "):
        made.fit(x, y)
    with pytest.raises(NotFittedError):
        made.predict(x)


def test_a_refit_wants_the_classes_and_the_columns_of_the_fit() -> None:
    x, y = linear_problem()
    fitted = ElasticNetPath(0.05).fit(x, y)
    with pytest.raises(ValueError, match="^y: "):
        fitted.refit(fitted.solution_, x[y != 1], y[y != 1])
    assert fitted.classes_.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="^X: "):
        fitted.refit(fitted.solution_, x[:, :5], y)
    assert fitted.n_features_in_ == 12
    with pytest.raises(ValueError, match="^refit_ridge: |^ridge: "):
        fitted.refit(fitted.solution_, x, y, ridge=-0.1)
