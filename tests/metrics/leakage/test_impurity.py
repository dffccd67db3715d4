"""OIS and NIS: the published matrices and curves, and worlds in which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from metrics.leakage.worlds import rows, world
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics import NicheImpurity, OracleImpurity
from cbm_lightning.metrics.leakage import (
    Evidence,
    cross_splits,
    niche_impurity,
    niche_impurity_score,
    oracle_impurity,
    oracle_impurity_score,
)
from cbm_lightning.metrics.leakage.niche_impurity import BETAS, niche_correlation, niche_curve
from cbm_lightning.metrics.leakage.oracle_impurity import predictability
from cbm_lightning.metrics.leakage.probes import auroc

SPLITS = cross_splits(300, 3, 1)


@pytest.fixture
def golden(shared) -> dict[str, torch.Tensor]:
    stored = np.load(shared / "golden" / "dev" / "concept_quality.npz")
    return {name: torch.from_numpy(stored[name]) for name in stored.files}


def logistic() -> LogisticRegression:
    return LogisticRegression(C=1, max_iter=5000, tol=1e-10)


@pytest.mark.parametrize("name", ["pure", "leaky", "embedding"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_ois_of_the_published_matrices(golden, name: str, diagonal: bool) -> None:
    found = oracle_impurity(golden[f"purity_matrix_{name}"].double(), golden["oracle_matrix"].double(), diagonal)
    assert found.item() == pytest.approx(golden[f"ois_{name}__diag{int(diagonal)}"].item(), abs=1e-6)


@pytest.mark.parametrize("name", ["soft_pure", "soft_leaky", "embedding_nhk"])
def test_areas_of_the_published_matrices(golden, name: str) -> None:
    """What a logistic regression on a concept says of all of them, on the stored split."""
    fit, judge = golden["ois_train_idx"], golden["ois_test_idx"]
    concepts = golden["concepts"]
    values = golden[name] if golden[name].ndim == 3 else golden[name].unsqueeze(1)
    scores = torch.empty(5, 5, len(judge), dtype=torch.float64)
    for i in range(5):
        source = values[:, :, i].numpy()
        for j in range(5):
            model = logistic().fit(source[fit], concepts[fit, j].numpy())
            scores[i, j] = torch.from_numpy(model.decision_function(source[judge]))
    expected = golden[f"purity_matrix_{name.split('_')[-1].replace('nhk', 'embedding')}"].double()
    torch.testing.assert_close(auroc(scores, concepts[judge].T.double()), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["pure", "leaky"])
def test_nis_of_the_published_curves(golden, name: str) -> None:
    fit, judge = golden["nis_train_idx"], golden["nis_test_idx"]
    values, concepts = golden[f"soft_{name}"].unsqueeze(-1), golden["concepts"]
    model = OneVsRestClassifier(logistic()).fit(values[fit, :, 0].numpy(), concepts[fit].numpy())
    correlation = niche_correlation(values[fit], concepts[fit].double())
    torch.testing.assert_close(correlation, golden[f"niching_corr_{name}"].abs(), atol=1e-6, rtol=0)

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(model.decision_function(x[..., 0].numpy()))

    curve = niche_curve(predict, values[judge], concepts[judge].double(), correlation)
    expected = golden[f"nis_curve_{name}__logreg"]
    torch.testing.assert_close(curve.nanmean(1), expected, atol=1e-6, rtol=0)
    assert niche_impurity(curve).item() == pytest.approx(golden[f"nis_{name}__logreg"].item(), abs=1e-6)
    torch.testing.assert_close(torch.tensor(BETAS, dtype=torch.float64), golden["nis_betas"])


def test_truth_in_place_of_predictions_is_pure() -> None:
    concepts, label, _ = rows(300)
    found = oracle_impurity_score(Evidence(concepts.unsqueeze(-1), concepts, label, "multiclass", 8).settled(), SPLITS)
    assert found.value == pytest.approx(0.0, abs=1e-9)
    assert found.details["excess"] == pytest.approx(0.0, abs=1e-9)


def test_a_concept_that_knows_another_is_impure() -> None:
    given = world(n=300).settled()
    clean = oracle_impurity_score(given, SPLITS)
    given.values[:, 0] += 0.8 * given.concepts[:, 1:2]
    found = oracle_impurity_score(given, SPLITS)
    assert found.value > clean.value + 0.1
    assert int(found.per_concept.argmax()) == 0
    assert found.per_concept[0] > 5 * found.concept_error[0]
    purity, oracle = predictability(given, SPLITS)
    assert (purity[:, 0, 1] > oracle[:, 0, 1] + 0.1).all()
    assert (oracle.diagonal(dim1=1, dim2=2) == 1).all()


def test_a_bad_concept_counts_on_the_diagonal_only() -> None:
    given = world(n=300).settled()
    given.values[:, 2] = torch.randn(300, 1, dtype=torch.float64)
    whole = oracle_impurity_score(given, SPLITS)
    off = oracle_impurity_score(given, SPLITS, include_diagonal=False)
    assert whole.value > off.value + 0.15
    assert abs(whole.details["excess"]) < 0.05


def test_concepts_without_two_classes_count_nowhere() -> None:
    given = world(n=300).settled()
    given.concepts[:, 1] = 1.0
    purity, oracle = predictability(given, SPLITS)
    assert purity[:, :, 1].isnan().all()
    assert not purity[:, 1, [0, 2]].isnan().any()
    found = oracle_impurity_score(given, SPLITS)
    assert found.value == pytest.approx(oracle_impurity(purity, oracle).mean().item())
    by_hand = 2 / 2 * (oracle - purity)[:, :, [0, 2]].square().sum((1, 2)).sqrt().mean()
    assert found.value == pytest.approx(by_hand.item())
    assert not np.isnan(niche_impurity_score(given, SPLITS, against_truth=False).value)


def test_real_concepts_are_sources_but_no_targets() -> None:
    concepts = ConceptSet(["a", "b", "size"], kinds=["binary", "binary", "real"])
    given = world(n=300)
    metric = OracleImpurity(concepts, 8)
    metric.update(given.values, given.concepts * 2.5, given.label)
    purity, _ = predictability(metric.evidence(), SPLITS)
    assert purity[:, :, 2].isnan().all()
    assert not purity[:, :, :2].isnan().any()


def test_independent_concepts_are_at_chance_outside_their_niche() -> None:
    found = niche_impurity_score(world(n=300).settled(), SPLITS)
    # in the niche of nothing only at thresholds below the correlation by chance
    assert found.value == pytest.approx(0.475, abs=0.06)
    assert found.details["truth"] == pytest.approx(0.475, abs=0.06)
    assert found.details["excess"] < 3 * found.details["excess_error"]


def test_what_hides_in_another_concept_is_found() -> None:
    """Concept 1 can be read from concept 0 and the sum of both, in none of which it is to be seen alone."""
    given = world(n=300).settled()
    hidden = (given.concepts[:, 1] - given.concepts[:, 2]).abs()
    given.values[:, 0, 0], given.values[:, 2, 0] = hidden, given.concepts[:, 2]
    found = niche_impurity_score(given, SPLITS)
    assert found.per_concept[1] > 0.6
    assert found.details["excess"] > 0.05


def test_a_niche_is_made_of_whole_concepts() -> None:
    """The published code masks columns of other concepts when each has several numbers."""
    given = world(n=300, width=4).settled()
    seen = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        seen.append((x != 0).all(0))
        return x.sum(-1)

    correlation = niche_correlation(given.values, given.concepts)
    assert correlation.shape == (3, 3)
    assert (correlation.diagonal() > 0.9).all()
    curve = niche_curve(predict, given.values, given.concepts, correlation, betas=(0.5,))
    for j, mask in enumerate(seen):
        assert mask.tolist() == [[i != j] * 4 for i in range(3)]
    # the prediction of a concept from its own zeros is a constant
    assert curve.tolist() == [[0.5] * 3]


def test_constant_numbers_are_in_no_niche() -> None:
    values = torch.randn(50, 2, 1)
    values[:, 0] = 3.0
    concepts = torch.stack([torch.arange(50) % 2, torch.ones(50)], 1)
    concepts[:10, 0] = torch.nan
    found = niche_correlation(values, concepts)
    assert found[0].tolist() == [0, 0]
    assert found[1, 1] == 0
    expected = np.corrcoef(values[10:, 1, 0], concepts[10:, 0])[0, 1]
    assert found[1, 0].item() == pytest.approx(abs(expected), abs=1e-6)


def test_zero_is_neutral_where_numbers_are_standardised() -> None:
    given = world(n=300).settled()
    here = niche_impurity_score(given, SPLITS, against_truth=False)
    given.values.add_(20.0)
    moved = niche_impurity_score(given, SPLITS, against_truth=False)
    raw = niche_impurity_score(given, SPLITS, standardise=False, against_truth=False)
    assert moved.value == pytest.approx(here.value, abs=1e-3)
    assert raw.value != pytest.approx(moved.value, abs=1e-3)
    assert here.details == {}


def test_metrics_are_their_functions() -> None:
    given = world(n=60)
    splits = cross_splits(60, 3, 1)
    for metric, function in (
        (OracleImpurity(3, 8, folds=3), oracle_impurity_score),
        (NicheImpurity(3, 8, folds=3), niche_impurity_score),
    ):
        for part in torch.arange(60).split(25):
            metric.update(given.values[part], given.concepts[part], given.label[part])
        assert metric.compute().item() == pytest.approx(function(given.settled(), splits).value)


@pytest.mark.parametrize(("metric", "least"), [(OracleImpurity, 3), (NicheImpurity, 2)])
def test_too_few_folds(metric, least: int) -> None:
    with pytest.raises(ValueError, match=f"folds: expected at least {least}"):
        metric(3, 8, folds=least - 1)
