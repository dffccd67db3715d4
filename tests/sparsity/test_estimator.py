"""The conventions of scikit-learn: kinds and shapes of what goes in and what comes out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sparsity.problems import linear_problem, several_labels

from cbm_lightning.sparsity import ElasticNetPath, nec

NAMES = np.array(["crow", "jay", "magpie"])


@pytest.fixture(autouse=True)
def _every_warning() -> Any:
    """PyTorch tells most things once a process; told each time they fail the test that they belong to."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


def test_arrays_tensors_and_tables_are_the_same() -> None:
    x, y = linear_problem()
    table = pd.DataFrame(x.numpy(), columns=[f"c{k}" for k in range(12)])
    reference = ElasticNetPath(0.02).fit(x, y)
    inputs: list[tuple[Any, Any]] = [
        (x.numpy(), y.numpy()),
        (table, pd.Series(y.numpy())),
        (x.tolist(), y.tolist()),
        (x.clone().requires_grad_(), y),
        (x.double().numpy(), y.numpy().astype(np.int16)),
        (np.asfortranarray(x.numpy()), y.numpy().astype(float)),
    ]
    for scores, labels in inputs:
        made = ElasticNetPath(0.02).fit(scores, labels)
        assert made.n_features_in_ == 12
        assert type(made.coef_) is type(made.intercept_) is np.ndarray
        np.testing.assert_allclose(made.coef_, reference.coef_, rtol=0, atol=1e-6)
        np.testing.assert_allclose(made.decision_function(scores), reference.decision_function(x), rtol=0, atol=1e-4)


def test_arrays_that_must_not_be_written_to() -> None:
    x, y = linear_problem()
    array, labels = x.numpy().copy(), y.numpy().copy()
    array.setflags(write=False)
    labels.setflags(write=False)
    made = ElasticNetPath(0.02).fit(array, labels)
    assert (made.predict(array) == ElasticNetPath(0.02).fit(x, y).predict(x).numpy()).all()
    x, several = several_labels()
    labels = several.numpy().copy()
    labels.setflags(write=False)
    assert ElasticNetPath(0.02, family="ovr").fit(x, labels).coef_.shape == (3, 12)


@pytest.mark.parametrize("scores", ["reversed", "integers", "booleans", "half"])
def test_arrays_of_other_layouts_and_types(scores: str) -> None:
    x, y = linear_problem()
    made: Any = {
        "reversed": lambda: x.numpy()[::-1],
        "integers": lambda: (10 * x).long().numpy(),
        "booleans": lambda: (x > 0.5).numpy(),
        "half": lambda: x.half(),
    }[scores]()
    labels = y.numpy()[::-1] if scores == "reversed" else y.numpy()
    ours = ElasticNetPath(0.02).fit(made, labels)
    plain = np.array(made.tolist(), dtype=np.float32)
    np.testing.assert_allclose(ours.coef_, ElasticNetPath(0.02).fit(plain, labels.copy()).coef_, rtol=0, atol=1e-5)
    assert ours.predict(made).shape == (120,)


@pytest.mark.parametrize("family", ["multinomial", "ovr"])
def test_shapes_and_kinds_of_predictions(family: str) -> None:
    x, y = linear_problem()
    ours = ElasticNetPath(0.02, family=family).fit(x.numpy(), NAMES[y])
    assert ours.classes_.tolist() == NAMES.tolist()
    assert ours.coef_.shape == (3, 12)
    assert ours.intercept_.shape == (3,)
    logits, probs, labels = ours.decision_function(x.numpy()), ours.predict_proba(x.numpy()), ours.predict(x.numpy())
    assert logits.shape == probs.shape == (120, 3)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    assert (labels == NAMES[logits.argmax(1)]).all()
    assert (labels == NAMES[probs.argmax(1)]).all()
    assert ours.score(x.numpy(), NAMES[y]) == (labels == NAMES[y]).mean() > 0.7
    np.testing.assert_allclose(logits, x.numpy() @ ours.coef_.T + ours.intercept_, rtol=1e-4, atol=1e-4)


def test_tensors_give_tensors() -> None:
    x, y = linear_problem()
    ours = ElasticNetPath(0.02).fit(x, y + 5)
    assert ours.classes_.tolist() == [5, 6, 7]
    labels = ours.predict(x)
    assert isinstance(labels, torch.Tensor)
    assert labels.dtype == y.dtype
    assert set(labels.tolist()) <= {5, 6, 7}
    for made in (ours.decision_function(x), ours.predict_proba(x)):
        assert isinstance(made, torch.Tensor)
        assert made.shape == (120, 3)
        assert not made.requires_grad
    assert ours.score(x, y + 5) == float((labels == y + 5).double().mean())
    assert isinstance(ours.predict(x.numpy()), np.ndarray)
    x, several = several_labels()
    assert isinstance(ElasticNetPath(0.02, family="ovr").fit(x, several).predict(x), torch.Tensor)


def test_labels_that_no_tensor_can_hold_come_as_an_array() -> None:
    x, y = linear_problem()
    ours = ElasticNetPath(0.02).fit(x, NAMES[y])
    assert np.array_equal(ours.predict(x), ours.predict(x.numpy()))
    assert ours.score(x, NAMES[y]) > 0.7


def test_two_classes_one_against_the_rest_have_one_row() -> None:
    x, y = linear_problem(classes=2)
    ours = ElasticNetPath(0.02, family="ovr").fit(x.numpy(), NAMES[y])
    assert ours.coef_.shape == (1, 12)
    assert ours.intercept_.shape == (1,)
    logits, probs = ours.decision_function(x.numpy()), ours.predict_proba(x.numpy())
    assert logits.shape == (120,)
    assert probs.shape == (120, 2)
    np.testing.assert_allclose(probs[:, 1], 1 / (1 + np.exp(-logits)), rtol=1e-4)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)
    assert (ours.predict(x.numpy()) == NAMES[(logits > 0).astype(int)]).all()
    assert ours.score(x.numpy(), NAMES[y]) > 0.8
    assert ElasticNetPath(0.02).fit(x.numpy(), y.numpy()).coef_.shape == (2, 12)


def test_several_labels_a_sample() -> None:
    x, y = several_labels()
    ours = ElasticNetPath(0.02, family="ovr").fit(x.numpy(), y.numpy())
    assert ours.coef_.shape == (3, 12)
    assert ours.classes_.tolist() == [0, 1, 2]
    assert ours.predict(x.numpy()).shape == ours.predict_proba(x.numpy()).shape == (120, 3)
    assert np.array_equal(ours.predict(x.numpy()), (ours.decision_function(x.numpy()) > 0).astype(int))
    logits = ours.decision_function(x.numpy())
    np.testing.assert_allclose(ours.predict_proba(x.numpy()), 1 / (1 + np.exp(-logits)), rtol=1e-4)
    assert (ours.predict(x.numpy()) == y.numpy()).mean() > 0.8
    # labels have nothing to do with each other
    alone = ElasticNetPath(0.02, family="ovr", tol=1e-6).fit(x, y[:, 1])
    np.testing.assert_allclose(ours.coef_[1], alone.coef_[0], atol=1e-3)


def test_parameters_and_copies() -> None:
    made = ElasticNetPath(nec=[2, 5], alpha=0.9, penalty="group", tol=1e-4)
    params = made.get_params()
    assert params["nec"] == [2, 5]
    assert params["alpha"] == 0.9
    assert params["lambdas"] is None
    copy = clone(made)
    assert copy is not made
    assert copy.get_params() == params
    assert copy.set_params(alpha=0.5).alpha == 0.5
    assert made.alpha == 0.9
    assert is_classifier(made)
    assert "nec=[2, 5]" in repr(made)
    x, y = linear_problem()
    fitted = made.fit(x, y)
    assert fitted is made
    assert fitted.get_params() == params
    assert not hasattr(clone(fitted), "coef_")


def test_arguments_set_later_are_checked_when_fitting() -> None:
    x, y = linear_problem()
    with pytest.raises(ValueError, match="^alpha: "):
        ElasticNetPath(0.1).set_params(alpha=2.0).fit(x, y)
    with pytest.raises(ValueError, match="^lambdas, nec: "):
        ElasticNetPath(0.1).set_params(nec=3).fit(x, y)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_predictions_need_a_fit_and_the_same_columns(method: str) -> None:
    x, y = linear_problem()
    with pytest.raises(NotFittedError):
        getattr(ElasticNetPath(), method)(x)
    fitted = ElasticNetPath(0.02).fit(x, y)
    for wrong in (x[:, :11], x[0], x.numpy()[:, :11]):
        with pytest.raises(ValueError, match=r"^X: expected \[n, 12\], as in fit"):
            getattr(fitted, method)(wrong)


def test_a_level_needs_a_fit() -> None:
    with pytest.raises(NotFittedError):
        ElasticNetPath().at_nec(3)


def test_in_a_pipeline() -> None:
    x, y = linear_problem()
    steps = make_pipeline(StandardScaler(), ElasticNetPath(nec=2, standardize=False)).fit(x.numpy(), NAMES[y])
    assert steps.score(x.numpy(), NAMES[y]) > 0.65
    assert nec(torch.from_numpy(steps[-1].coef_)) == 2
    assert steps.predict_proba(x.numpy()).shape == (120, 3)
    # the scaler divides by n, we by n - 1
    plain = ElasticNetPath(nec=2).fit(x.numpy(), NAMES[y])
    assert np.array_equal(plain.predict(x.numpy()), steps.predict(x.numpy()))


def test_in_a_search_over_a_grid() -> None:
    x, y = linear_problem()
    grid = {"lambdas": [0.01, 0.5], "penalty": ["l1", "group"]}
    search = GridSearchCV(ElasticNetPath(), grid, cv=2).fit(x.numpy(), NAMES[y])
    assert search.best_params_["lambdas"] == 0.01
    assert search.best_score_ > 0.6
    assert search.predict(x.numpy()).shape == (120,)
    scores = cross_val_score(ElasticNetPath(nec=2), x.numpy(), y.numpy(), cv=2)
    assert scores.shape == (2,)


@pytest.mark.parametrize("scoring", ["neg_log_loss", "roc_auc_ovr"])
def test_scored_by_probabilities(scoring: str) -> None:
    x, y = linear_problem()
    scores = cross_val_score(ElasticNetPath(0.02), x.numpy(), y.numpy(), cv=2, scoring=scoring)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("scoring", ["roc_auc", "neg_log_loss"])
def test_two_classes_in_one_row_are_scored_by_their_ranking(scoring: str) -> None:
    x, y = linear_problem(classes=2)
    scores = cross_val_score(ElasticNetPath(0.02, family="ovr"), x.numpy(), NAMES[y], cv=2, scoring=scoring)
    assert (scores > (-0.6 if scoring == "neg_log_loss" else 0.8)).all()
