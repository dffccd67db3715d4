"""Scores read in chunks and standardised on the way."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparsity.problems import linear_problem

from cbm_lightning.sparsity import ElasticNetPath, design
from cbm_lightning.sparsity.design import ConstantConceptWarning, Design


class Watched(np.memmap):
    """A file-backed array that notes how many rows are read at a time."""

    def __array_finalize__(self, source: Any) -> None:
        self.rows_read: list[int] = []
        super().__array_finalize__(source)

    @classmethod
    def of(cls, path: Path) -> Watched:
        # writable, as PyTorch warns of arrays that are not
        opened: Watched = np.load(path, mmap_mode="r+").view(cls)
        opened.rows_read.clear()
        return opened

    def __getitem__(self, index: Any) -> Any:
        part = np.asarray(self).__getitem__(index)
        self.rows_read.append(len(part))
        return part

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        self.rows_read.append(len(self))
        return getattr(ufunc, method)(*(np.asarray(x) if x is self else x for x in inputs), **options)

    def __array_function__(self, function: Any, types: Any, args: Any, options: Any) -> Any:
        self.rows_read.append(len(self))
        return function(*(np.asarray(x) if x is self else x for x in args), **options)


@pytest.fixture(params=["float32", "float16", "float64"])
def stored(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    np.save(tmp_path / "scores.npy", linear_problem(n=150)[0].numpy().astype(request.param))
    return tmp_path / "scores.npy"


def labels() -> torch.Tensor:
    return linear_problem(n=150)[1]


@pytest.mark.parametrize("chunk_size", [11, 32, 149, 150, 1000])
@pytest.mark.parametrize("standardize", [True, False])
def test_chunks_change_nothing(chunk_size: int, standardize: bool) -> None:
    x, y = linear_problem(n=150)
    options = {"lambdas": [0.1, 0.02], "dtype": "float64", "tol": 1e-8, "standardize": standardize}
    whole, chunked = (ElasticNetPath(chunk_size=size, **options).fit(x, y) for size in (None, chunk_size))
    np.testing.assert_allclose(chunked.coef_, whole.coef_, rtol=0, atol=1e-7)
    assert np.array_equal(chunked.coef_ != 0, whole.coef_ != 0)
    np.testing.assert_allclose(chunked.intercept_, whole.intercept_, rtol=0, atol=1e-7)
    for part, all_rows in zip(chunked.path_, whole.path_, strict=True):
        assert part.objective == pytest.approx(all_rows.objective, abs=1e-9)


@pytest.mark.parametrize("options", [{"family": "ovr"}, {"penalty": "group"}, {"nec": 3}, {"refit_ridge": 0.01}])
def test_chunks_change_nothing_of_any_kind(options: dict[str, Any]) -> None:
    x, y = linear_problem(n=150)
    options = {"dtype": "float64", "tol": 1e-8, **({} if "nec" in options else {"lambdas": 0.02}), **options}
    whole, chunked = (ElasticNetPath(chunk_size=size, **options).fit(x, y) for size in (None, 40))
    np.testing.assert_allclose(chunked.coef_, whole.coef_, rtol=0, atol=1e-6)
    assert np.array_equal(chunked.coef_ != 0, whole.coef_ != 0)


def test_a_file_is_the_same_as_what_is_in_it(stored: Path) -> None:
    in_memory = ElasticNetPath(0.02).fit(np.load(stored), labels())
    for chunk_size in (None, 32):
        ours = ElasticNetPath(0.02, chunk_size=chunk_size).fit(np.load(stored, mmap_mode="r+"), labels())
        np.testing.assert_allclose(ours.coef_, in_memory.coef_, rtol=0, atol=2e-4)
        assert np.array_equal(ours.predict(np.load(stored, mmap_mode="r+")), in_memory.predict(np.load(stored)))


def test_a_file_that_is_open_for_reading_only(stored: Path) -> None:
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        opened = np.load(stored, mmap_mode="r")
        for chunk_size in (None, 32):
            ElasticNetPath(0.02, chunk_size=chunk_size).fit(opened, labels()).predict(opened)
    finally:
        torch.set_warn_always(before)


def test_a_file_is_never_read_whole(stored: Path) -> None:
    scores = Watched.of(stored)
    ElasticNetPath([0.1, 0.02], chunk_size=32, refit_ridge=0.01).fit(scores, labels())
    assert max(scores.rows_read) <= 32
    # every look is at all rows
    assert sum(scores.rows_read) % 150 == 0
    assert sum(scores.rows_read) >= 5 * 150
    # and the watch would see more
    scores.rows_read.clear()
    assert np.isfinite(scores).all()
    assert max(scores.rows_read) == 150


def test_a_file_comes_in_chunks_without_being_asked(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(design, "CHUNK_NUMBERS", 12 * 20)
    scores = Watched.of(stored)
    ours = ElasticNetPath(0.02).fit(scores, labels())
    assert max(scores.rows_read) == 20
    np.testing.assert_allclose(ours.coef_, ElasticNetPath(0.02).fit(np.load(stored), labels()).coef_, atol=2e-4)
    # wide rows come one by one
    monkeypatch.setattr(design, "CHUNK_NUMBERS", 5)
    assert Design(Watched.of(stored)).chunk_size == 1
    assert Design(np.load(stored)).chunk_size == 150


@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_scores_are_standardised(chunk_size: int | None) -> None:
    x, _ = linear_problem()
    x = x + 1000.0
    made = Design(x, chunk_size=chunk_size, dtype=torch.float64)
    rows = torch.cat([part for _, part in made.chunks()])
    torch.testing.assert_close(rows, (x.double() - x.double().mean(0)) / x.double().std(0), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(made.gram(), rows.T @ rows / len(rows))
    assert (made.rows, made.columns) == (120, 12)
    covered = [index for part in made.slices() for index in range(120)[part]]
    assert covered == list(range(120))


def test_what_is_not_asked_for_is_left() -> None:
    x, _ = linear_problem()
    plain = Design(x, standardize=False, center=False)
    assert torch.equal(next(plain.chunks())[1], x)
    centred = Design(x, standardize=False, dtype=torch.float64)
    assert (centred.scale == 1).all()
    torch.testing.assert_close(centred.mean, x.double().mean(0))
    scaled = Design(x, center=False, dtype=torch.float64)
    assert (scaled.mean == 0).all()
    torch.testing.assert_close(scaled.scale, x.double().std(0))


def test_means_far_from_zero_lose_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-3]) + 1e4
    found = Design(x, dtype=torch.float64).scale
    torch.testing.assert_close(found, x.std(0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("number", [0.0, 1.0, -0.1, 1e4, 0.3333333])
@pytest.mark.parametrize("standardize", [True, False])
def test_a_constant_concept_gets_no_weight_and_is_named(dtype: str, number: float, standardize: bool) -> None:
    x, y = linear_problem(n=121)
    x = x.to(getattr(torch, dtype))
    # the mean of a number that has no end in base two is not quite this number
    x[:, 3] = number
    names = [f"wing {k}" for k in range(12)]
    with pytest.warns(ConstantConceptWarning, match="'wing 3'.* same score in every sample") as said:
        ours = ElasticNetPath(0.01, dtype=dtype, standardize=standardize).fit(x, y, names)
    assert len(said) == 1
    assert "wing 2" not in str(said[0].message)
    assert (ours.coef_[:, 3] == 0).all()
    assert np.isfinite(ours.coef_).all()
    assert np.isfinite(ours.intercept_).all()
    rest = [k for k in range(12) if k != 3]
    without = ElasticNetPath(0.01, dtype=dtype, standardize=standardize).fit(x[:, rest], y)
    np.testing.assert_allclose(ours.coef_[:, rest], without.coef_, rtol=0, atol=5e-3)
    assert ours.predict_proba(x + 5).isfinite().all()


def test_many_constant_concepts_are_counted() -> None:
    x, y = linear_problem(k=20)
    x[:, 5:] = 1.0
    with pytest.warns(ConstantConceptWarning, match=r"'5', .*'12'\] and 7 more"):
        ElasticNetPath(0.01).fit(x, y)


@pytest.mark.parametrize("options", [{"n_lambdas": 3}, {"nec": 1}, {"lambdas": 0.01}])
def test_nothing_but_constant_concepts(options: dict[str, Any]) -> None:
    y = np.arange(30) % 3 % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = ElasticNetPath(**options).fit(np.ones((30, 4)), y)
    assert not ours.coef_.any()
    np.testing.assert_allclose(ours.predict_proba(np.ones((1, 4))), [[2 / 3, 1 / 3]], rtol=1e-4)
