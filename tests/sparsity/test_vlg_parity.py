"""Numbers of effective concepts and the accuracy at them, as the official code of VLG-CBM (NeurIPS 2024) finds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sparsity.problems import Array, golden

from cbm_lightning.sparsity import ElasticNetPath, SparseSolution, keep_largest, nec


@pytest.fixture(scope="module")
def data(shared: Path) -> dict[str, Array]:
    return golden(shared, "vlg_nec")


@pytest.fixture(scope="module")
def official(data: dict[str, Array]) -> list[SparseSolution]:
    """The stored path as solutions of ours."""
    zeros, ones = torch.zeros(30), torch.ones(30)
    return [
        SparseSolution(torch.from_numpy(w), torch.from_numpy(b), zeros, ones, float(lam), 0.0, 0.0, 0)
        for lam, w, b in zip(data["path_lambdas"], data["path_W"], data["path_b"], strict=True)
    ]


@pytest.fixture(scope="module")
def ours(data: dict[str, Array]) -> ElasticNetPath:
    path = ElasticNetPath(data["path_lambdas"].tolist(), alpha=0.99, standardize=False, dtype="float64", tol=1e-7)
    return path.fit(data["X_train"], data["y_train"])


def accuracy(solution: SparseSolution, data: dict[str, Array]) -> float:
    x = torch.from_numpy(data["X_test"]).to(solution.weight.dtype)
    return float((solution.logits(x).argmax(1).numpy() == data["y_test"]).mean())


def at_levels(path: list[SparseSolution], data: dict[str, Array]) -> list[SparseSolution]:
    """The protocol: the first solution of the path that has enough, pruned."""
    return [next(s for s in path if s.nec >= level).pruned(int(level)) for level in data["nec_levels"]]


def test_the_numbers_of_effective_concepts(data: dict[str, Array], official: list[SparseSolution]) -> None:
    assert [s.nec for s in official] == pytest.approx(data["path_nec"].tolist(), abs=1e-5)


def test_pruned_weights(data: dict[str, Array], official: list[SparseSolution]) -> None:
    for level, found, weight, bias in zip(
        data["nec_levels"], at_levels(official, data), data["truncated_W"], data["truncated_b"], strict=True
    ):
        assert found.nec == level
        assert np.array_equal(found.weight, weight)
        assert np.array_equal(found.bias, bias)


def test_accuracy_at_a_number_of_effective_concepts(data: dict[str, Array], official: list[SparseSolution]) -> None:
    found = [accuracy(s, data) for s in at_levels(official, data)]
    assert found == pytest.approx(data["acc_at_nec"].tolist(), abs=1e-7)
    assert np.mean(found) == pytest.approx(float(data["anec"]), abs=1e-7)


@pytest.mark.parametrize("level", [2, 4, 6, 8])
def test_a_dense_head_pruned(data: dict[str, Array], level: int) -> None:
    dense = torch.from_numpy(data["dense_W"])
    assert np.array_equal(dense * keep_largest(dense, level), data[f"dense_pruned_to_{level}"])
    assert nec(dense * keep_largest(dense, level)) == level


def test_our_path_has_as_many(data: dict[str, Array], ours: ElasticNetPath) -> None:
    counts = [round(5 * s.nec) for s in ours.path_]
    assert np.abs(np.array(counts) - np.round(5 * data["path_nec"])).max() <= 1


def test_our_accuracy_at_a_number_of_effective_concepts(data: dict[str, Array], ours: ElasticNetPath) -> None:
    found = [ours.at_nec(int(level)) for level in data["nec_levels"]]
    assert [s.nec for s in found] == data["nec_levels"].tolist()
    # one sample of sixty
    assert np.abs(np.array([accuracy(s, data) for s in found]) - data["acc_at_nec"]).max() <= 1 / 60 + 1e-7


def test_a_direct_search_finds_the_same_heads(data: dict[str, Array]) -> None:
    levels = data["nec_levels"].tolist()
    found = ElasticNetPath(nec=levels, alpha=0.99, standardize=False).fit(data["X_train"], data["y_train"])
    scores = [accuracy(found.at_nec(level), data) for level in levels]
    assert [found.at_nec(level).nec for level in levels] == levels
    assert np.abs(np.array(scores) - data["acc_at_nec"]).max() <= 2 / 60 + 1e-7
    assert len(found.path_) <= 30
