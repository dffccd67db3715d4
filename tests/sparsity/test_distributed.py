"""Two processes with samples of their own, and unevenly many, find what one finds with all samples."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparsity.problems import linear_problem, several_labels

from cbm_lightning.sparsity import ElasticNetPath

pytestmark = [
    pytest.mark.skipif(
        sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo"
    ),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

# the first process has these many of the 150 samples, and none of the last class
FIRST = 40
RUNS: dict[str, dict[str, Any]] = {
    "path": {"lambdas": [0.1, 0.03, 0.01]},
    "default path": {"n_lambdas": 6},
    "search": {"nec": [2, 4]},
    "group": {"lambdas": 0.05, "penalty": "group", "group_size": 2},
    "one against the rest": {"lambdas": 0.02, "family": "ovr"},
    "several labels": {"lambdas": 0.02, "family": "ovr"},
    "refit": {"lambdas": 0.05, "refit_ridge": 0.01},
    "chunks": {"lambdas": 0.02, "chunk_size": 32},
    "single precision": {"lambdas": 0.02, "dtype": "float32", "tol": 1e-6},
}


def estimator(name: str, **options: Any) -> ElasticNetPath:
    return ElasticNetPath(**{"dtype": "float64", "tol": 1e-8, **RUNS[name], **options})


def samples(name: str) -> tuple[torch.Tensor, Any]:
    """Scores and labels; samples of the last class come last."""
    x, y = several_labels(150) if name == "several labels" else linear_problem(150)
    if name == "several labels":
        return x, y
    order = y.argsort(stable=True)
    return x[order], np.array(["crow", "jay", "magpie"])[y[order]]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # processes that wait for each other in different places fail instead of standing still
    patience = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=patience
    )
    rows = slice(0, FIRST) if rank == 0 else slice(FIRST, None)
    found = {}
    for name in RUNS:
        x, y = samples(name)
        made = estimator(name, distributed=True).fit(x[rows], y[rows])
        found[name] = {
            "weights": [s.weight for s in made.path_],
            "lambdas": [s.lam for s in made.path_],
            "objectives": [s.objective for s in made.path_],
            "coef": torch.from_numpy(made.coef_),
            "intercept": torch.from_numpy(made.intercept_),
            "classes": made.classes_.tolist(),
        }
    said = {}
    x, _ = samples("path")
    for case, scores, labels in (
        # only the second process has a bad score, or another class
        ("NaN", torch.where(torch.arange(150)[:, None] == 149, torch.nan, x), samples("path")[1]),
        ("one class", x, np.full(150, "crow")),
    ):
        try:
            estimator("path", distributed=True).fit(scores[rows], labels[rows])
        except ValueError as error:
            said[case] = str(error)
    torch.save({"found": found, "said": said}, folder / f"rank {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(work, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_find_what_one_finds(ranks: list[dict[str, Any]], name: str) -> None:
    alone = estimator(name).fit(*samples(name))
    tolerance = {"rtol": 0, "atol": 1e-3 if name == "single precision" else 1e-5}
    for rank in ranks:
        found = rank["found"][name]
        assert found["classes"] == alone.classes_.tolist()
        assert found["lambdas"] == pytest.approx([s.lam for s in alone.path_], rel=1e-6)
        assert found["objectives"] == pytest.approx([s.objective for s in alone.path_], abs=1e-6)
        for weight, solution in zip(found["weights"], alone.path_, strict=True):
            torch.testing.assert_close(weight, solution.weight, **tolerance)
            assert torch.equal(weight != 0, solution.weight != 0)
        np.testing.assert_allclose(found["coef"], alone.coef_, **tolerance)
        np.testing.assert_allclose(found["intercept"], alone.intercept_, **tolerance)
        assert np.array_equal(found["coef"] != 0, alone.coef_ != 0)


@pytest.mark.parametrize("name", RUNS)
def test_both_processes_hold_the_same_weights(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["found"][name] for rank in ranks)
    assert torch.equal(first["coef"], second["coef"])
    assert torch.equal(first["intercept"], second["intercept"])


def test_the_shards_differ(ranks: list[dict[str, Any]]) -> None:
    _, y = samples("path")
    assert "magpie" not in y[:FIRST]
    alone = estimator("single precision").fit(*(part[FIRST:] for part in samples("single precision")))
    assert np.abs(ranks[0]["found"]["single precision"]["coef"].numpy()[-2:] - alone.coef_[-2:]).max() > 0.01


def test_bad_input_of_one_process_stops_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "got NaN or infinity in the concepts" in rank["said"]["NaN"]
        assert rank["said"]["one class"] == "y: expected two classes or more, got only ['crow']"
