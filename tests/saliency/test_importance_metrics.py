"""The metrics of concept importance over batches, over processes and beside chance."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.concept_existence import ConceptExistence
from cbm_lightning.metrics.concept_importance import ConceptGlobalImportance
from cbm_lightning.metrics.concept_location import ConceptLocation
from cbm_lightning.saliency.importance import (
    concept_density,
    concept_existence,
    concept_global_importance,
    concept_location,
    global_importance_chance,
    local_importance,
)

N, K, L = 90, 8, 5


def samples() -> dict[str, Tensor]:
    """Scores and all that belongs to them; the last samples have other classes than the first."""
    generator = torch.Generator().manual_seed(3)
    concepts = (torch.rand(N, K, generator=generator) < 0.4).float()
    labels = (torch.arange(N) * L) // N
    predictions = torch.where(torch.rand(N, generator=generator) < 0.7, labels, (labels + 1) % L)
    predictions[labels == 3] = 0  # no sample of this class is classified correctly
    scores = concepts + torch.randn(N, K, generator=generator)
    weight = torch.randn(L, K, generator=generator)
    points = torch.rand(N, K, 2, generator=generator) * 7
    maps = torch.rand(N, K, 4, 4, generator=generator)
    concepts[torch.rand(N, K, generator=generator) < 0.2] = torch.nan
    points[torch.rand(N, K, generator=generator) < 0.2] = torch.nan
    return {
        "scores": scores,
        "concepts": concepts,
        "labels": labels,
        "predictions": predictions,
        "weight": weight,
        "importance": local_importance(weight, scores, predictions),
        "maps": maps,
        "points": points,
    }


DATA = samples()


def metrics() -> dict[str, Metric]:
    return {
        "existence": ConceptExistence(top=3),
        "location": ConceptLocation(top=2, alpha=3),
        "importance": ConceptGlobalImportance(K, L),
        "centred": ConceptGlobalImportance(K, L, center=True),
    }


def update(metric: Metric, rows: Tensor, call: bool = False) -> None:
    part = {name: value[rows] for name, value in DATA.items() if len(value) == N}
    take = metric if call else metric.update
    if isinstance(metric, ConceptExistence):
        take(part["importance"], part["concepts"], part["labels"] == part["predictions"])
    elif isinstance(metric, ConceptLocation):
        take(part["maps"], part["points"], part["importance"], part["concepts"], size=(8, 8))
    else:
        take(part["scores"], part["concepts"], part["labels"], part["predictions"], DATA["weight"])


def found(metric: Metric) -> dict[str, Any]:
    """All that a metric says."""
    said: dict[str, Any] = {"value": metric.compute(), "chance": metric.chance()}
    if isinstance(metric, ConceptGlobalImportance):
        said |= {"concept": metric.per_concept()._asdict(), "class": metric.per_class()._asdict()}
    return said


def alone(name: str, size: int = N) -> dict[str, Any]:
    metric = metrics()[name]
    for rows in torch.arange(N).split(size):
        update(metric, rows)
    return found(metric)


def test_existence_is_the_mean_over_images_that_count() -> None:
    right = DATA["labels"] == DATA["predictions"]
    each = concept_existence(DATA["importance"], DATA["concepts"], 3)
    kept = right & ~each.isnan()
    assert not kept.all()
    said = alone("existence", size=7)
    torch.testing.assert_close(said["value"], each[kept].mean())
    torch.testing.assert_close(said["chance"], concept_density(DATA["concepts"])[kept].mean())


def test_location_is_the_mean_over_images_with_a_point() -> None:
    each = concept_location(
        *(DATA[name] for name in ("maps", "points", "importance", "concepts")), top=2, alpha=3, size=(8, 8)
    )
    said = alone("location", size=7)
    torch.testing.assert_close(said["value"], each.nanmean())
    assert said["chance"].item() == 0.25
    metric = ConceptLocation(top=2, alpha=3)
    counted = torch.arange(N) % 2 == 0
    metric.update(DATA["maps"], DATA["points"] / 2, DATA["importance"], DATA["concepts"], counted=counted)
    half = concept_location(DATA["maps"], DATA["points"] / 2, DATA["importance"], DATA["concepts"], top=2, alpha=3)
    torch.testing.assert_close(metric.compute(), half[counted].nanmean())


@pytest.mark.parametrize("center", [False, True])
def test_global_importance_is_that_of_means_over_all_samples(center: bool) -> None:
    labels, right = DATA["labels"], DATA["labels"] == DATA["predictions"]
    frequency = torch.stack([DATA["concepts"][labels == c].nanmean(0) for c in range(L)])
    scores = torch.stack([DATA["scores"][(labels == c) & right].mean(0) for c in range(L)])
    assert scores.isnan().all(1).tolist() == [False, False, False, True, False]
    said = alone("centred" if center else "importance", size=7)
    for per in ("concept", "class"):
        expected = concept_global_importance(DATA["weight"], frequency, scores, center, per)
        for name, value in expected._asdict().items():
            torch.testing.assert_close(said[per][name], value, equal_nan=True)
            if per == "concept":
                torch.testing.assert_close(said["value"][name], value.nanmean())
    by_chance = global_importance_chance(DATA["weight"], frequency, scores, center)
    for name, value in by_chance._asdict().items():
        torch.testing.assert_close(said["chance"][name], value.nanmean())
    assert said["class"]["cgim2"].isnan().tolist() == [False, False, False, True, False]
    assert not said["class"]["cgim1"].isnan().any()


def test_global_importance_agrees_with_the_reference(shared: Path) -> None:
    with np.load(shared / "golden" / "dev" / "derived_formula_only.npz", allow_pickle=False) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    metric = ConceptGlobalImportance(9, num_classes=4)
    for rows in torch.arange(14).split(4):
        metric.update(
            *(golden[name][rows] for name in ("concept_scores", "concepts", "class_labels", "predictions")),
            weight=golden["theta"].T,
        )
    torch.testing.assert_close(metric.present / metric.annotated, golden["V"].T.float())
    mean = (metric.score / metric.correct[:, None]).nan_to_num(nan=0.0)
    torch.testing.assert_close(mean, golden["U_star"].T.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(metric.per_concept().cgim1, golden["cgim1"].float(), rtol=0, atol=1e-6)


def test_a_head_that_weighs_what_classes_show_is_far_above_chance() -> None:
    concepts = torch.eye(6).repeat(20, 1)
    labels = torch.arange(6).repeat(20)
    own, other = (ConceptGlobalImportance(6, 6) for _ in range(2))
    own.update(concepts, concepts, labels, labels, torch.eye(6))
    other.update(concepts, concepts, labels, labels, torch.eye(6).roll(1, 0))
    assert {name: value.item() for name, value in own.compute().items()} == {"cgim1": 1, "cgim2": 1, "cgim3": 1}
    assert own.chance()["cgim1"] == 0
    assert other.compute()["cgim1"] == 0
    assert other.chance()["cgim1"] == pytest.approx(1 / 5)


def test_real_concepts_do_not_count() -> None:
    concepts = ConceptSet(["a", "b", "size"], kinds=["binary", "binary", "real"])
    metric = ConceptGlobalImportance(concepts, num_classes=2)
    shown = torch.tensor([[1.0, 0.0, 40.0], [0.0, 1.0, 7.0]])
    labels = torch.arange(2)
    metric.update(shown, shown, labels, labels, torch.eye(2, 3))
    assert metric.per_concept().cgim1.isnan().tolist() == [False, False, True]
    assert metric.compute()["cgim2"] == 1


def test_weights_that_change_are_averaged_over_samples() -> None:
    metric = ConceptGlobalImportance(K, L)
    labels = torch.arange(L)
    for weight, number in ((torch.ones(L, K), 3), (torch.zeros(L, K), 1)):
        metric.update(*torch.rand(2, number, K), labels[:number], labels[:number], weight)
    torch.testing.assert_close(metric.weight / metric.samples, torch.full((L, K), 0.75))


@pytest.mark.parametrize("name", metrics())
def test_nothing_to_count_is_not_a_number_rather_than_a_score(name: str) -> None:
    metric = metrics()[name]
    update(metric, torch.arange(0))
    said = found(metric)
    if name in ("existence", "location"):
        assert said["value"].isnan()
    else:
        assert all(value.isnan() for value in said["value"].values())
        assert all(value.isnan() for value in said["chance"].values())


def test_images_that_count_are_named() -> None:
    metric = ConceptExistence(top=3)
    for counted in (torch.ones(2, dtype=torch.bool), torch.ones(N)):
        with pytest.raises(ValueError, match=r"^counted: expected \[90\] bool"):
            metric.update(DATA["importance"], DATA["concepts"], counted)
    metric.update(DATA["importance"], DATA["concepts"], torch.zeros(N, dtype=torch.bool))
    assert metric.compute().isnan()


@pytest.mark.parametrize("name", metrics())
def test_evaluation_under_inference_mode_and_a_second_epoch(name: str) -> None:
    metric = metrics()[name]
    for _ in range(2):
        with torch.inference_mode():
            for rows in torch.arange(N).split(13):
                update(metric, rows)
            said = found(metric)
        metric.reset()
    torch.testing.assert_close(said, alone(name), equal_nan=True)


def test_a_call_is_the_value_of_the_batch() -> None:
    metric = ConceptGlobalImportance(K, L)
    names = ("scores", "concepts", "labels", "predictions")
    for rows in torch.arange(N).split(45):
        batch = [DATA[name][rows] for name in names]
        other = ConceptGlobalImportance(K, L)
        other.update(*batch, DATA["weight"])
        torch.testing.assert_close(metric(*batch, DATA["weight"]), other.compute())
    torch.testing.assert_close(metric.compute(), alone("importance")["value"])


SCORES = torch.rand(4, K)
CLASSES = torch.zeros(4).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(SCORES[:, 1:], SCORES[:, 1:], CLASSES, CLASSES, torch.ones(L, K)), r"concepts \[B, 8\]"),
        (lambda m: m(SCORES, SCORES, CLASSES + L, CLASSES, torch.ones(L, K)), "^labels: .* from 0 to 4, got 5 to 5"),
        (lambda m: m(SCORES, SCORES, CLASSES, CLASSES.float(), torch.ones(L, K)), r"^predictions: expected \[4\]"),
        (lambda m: m(SCORES, SCORES, CLASSES, CLASSES, torch.ones(K, L)), r"^weight: expected \[5, 8\], got \[8, 5\]"),
        (lambda m: m(SCORES, SCORES, CLASSES, CLASSES, torch.ones(L, K) / 0), "^weight: expected finite"),
        (lambda m: m(SCORES / 0, SCORES, CLASSES, CLASSES, torch.ones(L, K)), "^scores: expected finite"),
    ],
)
def test_bad_batches(call: Any, message: str) -> None:
    metric = ConceptGlobalImportance(K, L)
    with pytest.raises(ValueError, match=message):
        call(metric.update)
    assert metric.samples == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ConceptExistence(top=0), "^top: "),
        (lambda: ConceptLocation(top=0), "^top: "),
        (lambda: ConceptLocation(alpha=13), "^alpha, parts: "),
        (lambda: ConceptGlobalImportance(3, num_classes=1), "^num_classes: "),
    ],
)
def test_bad_options(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    said = {}
    for name, metric in metrics().items():
        # unevenly many, and classes that the other process has not seen; a call waits for nobody
        for rows in (torch.arange(30) if rank == 0 else torch.arange(30, N)).split(20):
            update(metric, rows, call=rank == 0)
        said[name] = found(metric)
        # a second time: what came from the other process was not added to the own samples
        said[name]["again"] = metric.chance()
    torch.save(said, folder / f"rank {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_say_what_one_says(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(work, (tmp_path,), nprocs=2, start_method="fork")
    for rank in (0, 1):
        said = torch.load(tmp_path / f"rank {rank}.pt", weights_only=True)
        for name in metrics():
            again = said[name].pop("again")
            torch.testing.assert_close(said[name], alone(name), equal_nan=True)
            torch.testing.assert_close(again, said[name]["chance"])
