from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MetricCollection

from cbm_lightning.metrics.faithfulness import (
    AverageDrop,
    AverageGain,
    AverageIncrease,
    DeletionAUC,
    FaithfulnessMetric,
    InsertionAUC,
    RandomisationSimilarity,
)
from cbm_lightning.randomness import step_generator
from cbm_lightning.saliency.faithfulness import average_drop, deletion, insertion, shifted
from cbm_lightning.saliency.randomisation import map_similarity

CONCEPTS = 4
Pairs = tuple[Tensor, Tensor, Tensor]

METRICS: dict[str, Callable[..., FaithfulnessMetric]] = {
    "deletion": lambda **options: DeletionAUC(CONCEPTS, step=9, **options),
    "insertion": lambda **options: InsertionAUC(CONCEPTS, step=9, substrate="zero", **options),
    "drop": lambda **options: AverageDrop(CONCEPTS, **options),
    "increase": lambda **options: AverageIncrease(CONCEPTS, **options),
    "gain": lambda **options: AverageGain(CONCEPTS, **options),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "deletion": lambda *args: deletion(*args, step=9).auc,
    "insertion": lambda *args: insertion(*args, step=9, substrate="zero").auc,
    "drop": lambda *args: average_drop(*args).drop,
    "increase": lambda *args: average_drop(*args).increase,
    "gain": lambda *args: average_drop(*args).gain,
}


def score(images: Tensor) -> Tensor:
    """Each of the first concepts reads a quarter of the image; the last reads how dark a corner is."""
    quarters = images.unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean((1, 3, 5)).flatten(1)
    return torch.cat([8 * quarters[:, :3] - 4, -quarters[:, 3:]], 1)


def images_of(n: int = 5) -> Tensor:
    """Normalised images: what a map hides may speak for a concept or against it."""
    return 0.2 + torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def right_map(concept: int) -> Tensor:
    """A smooth hill on the quarter that a concept reads."""
    down, across = 2 + 4 * (concept // 2), 2 + 4 * (concept % 2)
    place = torch.arange(8) + 0.5
    return torch.exp(-((place[:, None] - down) ** 2 + (place - across) ** 2) / 8)


def pairs_of(n: int = 5) -> Pairs:
    """Right maps of two concepts of every image, and one map that says nothing; concept 2 is never shown."""
    rows = torch.arange(n).repeat_interleave(2)
    concepts = torch.tensor([0, 1, 0, 3] * n)[: 2 * n]
    maps = torch.stack([right_map(k) for k in concepts.tolist()])
    maps[3] = 0.25
    return maps, rows, concepts


@pytest.mark.parametrize("name", METRICS)
def test_means_of_concepts_and_of_their_means(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    metric = METRICS[name]()
    metric.update(score, images, maps, rows, concepts)
    values = FUNCTIONS[name](score, images, maps, rows, concepts)
    means = torch.stack([values[concepts == k].nanmean() for k in range(CONCEPTS)])
    torch.testing.assert_close(metric.per_concept(), means, equal_nan=True)
    torch.testing.assert_close(metric.compute(), means.nanmean())
    assert metric.per_concept().isnan().tolist() == [False, False, True, False]
    # the map that says nothing is of concept 3
    assert metric.counts().tolist() == [5, 3, 0, 1]


@pytest.mark.parametrize("name", METRICS)
def test_chance_is_what_the_metric_says_of_shifted_maps(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    metric = METRICS[name](seed=5)
    metric.update(score, images, maps, rows, concepts)
    moved = shifted(maps, step_generator(5, 1))
    values = FUNCTIONS[name](score, images, moved, rows, concepts)
    means = torch.stack([values[concepts == k].nanmean() for k in range(CONCEPTS)])
    torch.testing.assert_close(metric.chance_per_concept(), means, equal_nan=True)
    torch.testing.assert_close(metric.chance(), means.nanmean())


@pytest.mark.parametrize("name", METRICS)
def test_right_maps_beat_chance_and_maps_of_the_opposite_corner_do_not(name: str) -> None:
    images = 0.5 + torch.rand(20, 3, 8, 8)
    rows, concepts = torch.arange(20), torch.arange(20) % 3
    maps = torch.stack([right_map(k) for k in concepts.tolist()])
    if name in ("increase", "gain"):
        # what a map hides can only help where it speaks against a concept
        images[:, :, 4:] = -images[:, :, 4:]
        concepts = torch.zeros(20, dtype=torch.int64)
        maps = right_map(0).expand(20, -1, -1)
        ask: Callable[[Tensor], Tensor] = lambda x: 8 * x.mean((1, 2, 3))[:, None].expand(-1, CONCEPTS)  # noqa: E731
        wrong = right_map(3).expand(20, -1, -1)
    else:
        ask, wrong = score, torch.roll(maps, (4, 4), (1, 2))
    good, bad = METRICS[name](), METRICS[name]()
    good.update(ask, images, maps, rows, concepts)
    bad.update(ask, images, wrong, rows, concepts)
    sign = 1 if good.higher_is_better else -1
    assert sign * good.compute() > sign * good.chance() + 0.05
    assert sign * bad.compute() < sign * bad.chance() - 0.05
    assert good.higher_is_better == (name in ("insertion", "increase", "gain"))


@pytest.mark.parametrize("name", METRICS)
def test_batches_add_up(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    whole, parts = METRICS[name](), METRICS[name](batch_size=3)
    whole.update(score, images, maps, rows, concepts)
    parts.update(score, images[:2], maps[:4], rows[:4], concepts[:4])
    parts.update(score, images[2:3], maps[:0], rows[:0], concepts[:0])
    parts.update(score, images[2:], maps[4:], rows[4:] - 2, concepts[4:])
    torch.testing.assert_close(parts.per_concept(), whole.per_concept(), equal_nan=True)
    assert parts.counts().equal(whole.counts())


@pytest.mark.parametrize("name", METRICS)
def test_the_seed_alone_decides_where_maps_are_shifted_to(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    metric, other = METRICS[name](seed=3), METRICS[name](seed=4)
    state = torch.get_rng_state()
    for _ in range(2):
        metric.update(score, images, maps, rows, concepts)
        other.update(score, images, maps, rows, concepts)
    assert torch.get_rng_state().equal(state)
    first = metric.chance_per_concept()
    assert not torch.equal(first.nan_to_num(), other.chance_per_concept().nan_to_num())

    torch.rand(100)
    metric.reset()
    again = METRICS[name](seed=3)
    for _ in range(2):
        metric.update(score, images, maps, rows, concepts)
        again.update(score, images, maps, rows, concepts)
    torch.testing.assert_close(metric.chance_per_concept(), first, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(again.chance_per_concept(), first, equal_nan=True, rtol=0, atol=0)


def test_every_update_shifts_anew() -> None:
    images, maps = images_of(1), torch.rand(1, 8, 8)
    seen = []

    class Watched(AverageDrop):
        def measure(self, score: Any, images: Tensor, maps: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
            seen.append(maps[1])
            return super().measure(score, images, maps, rows, concepts)

    metric = Watched(CONCEPTS)
    for _ in range(4):
        metric.update(score, images, maps, torch.tensor([0]), torch.tensor([0]))
    assert len({tuple(x.flatten().tolist()) for x in seen}) > 1


@pytest.mark.parametrize("name", METRICS)
def test_nothing_measured_is_not_a_number(name: str) -> None:
    metric = METRICS[name]()
    none = torch.zeros(0, dtype=torch.int64)
    metric.update(score, images_of(), torch.zeros(0, 8, 8), none, none)
    metric.update(score, images_of(), torch.ones(2, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert metric.compute().isnan()
    assert metric.chance().isnan()
    assert metric.counts().tolist() == [0, 0, 0, 0]


def test_pairs_without_room_to_gain_do_not_count_in_the_gain() -> None:
    images = images_of(3)
    images[0] = 50.0
    maps = torch.rand(3, 8, 8)
    gain, drop = METRICS["gain"](), METRICS["drop"]()
    for metric in (gain, drop):
        metric.update(score, images, maps, torch.arange(3), torch.zeros(3, dtype=torch.int64))
    assert gain.counts().tolist() == [2, 0, 0, 0]
    assert drop.counts().tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize("name", METRICS)
def test_inference_mode(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    metric, plain = METRICS[name](), METRICS[name]()
    with torch.inference_mode():
        metric.update(score, images, maps, rows, concepts)
    metric.update(score, images, maps, rows, concepts)
    for _ in range(2):
        plain.update(score, images, maps, rows, concepts)
    assert metric.compute() == plain.compute()
    assert metric.chance() == plain.chance()
    with torch.inference_mode():
        metric.reset()
    for _ in range(2):
        metric.update(score, images, maps, rows, concepts)
    assert metric.chance() == plain.chance()


@pytest.mark.parametrize("name", METRICS)
def test_the_value_of_a_batch_and_of_all(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    metric, batch = METRICS[name](), METRICS[name]()
    metric.update(score, images, maps, rows, concepts)
    value = metric(score, images[:1], maps[:2], rows[:2], concepts[:2])
    batch.update(score, images[:1], maps[:2], rows[:2], concepts[:2])
    assert value == batch.compute()
    assert metric.counts().tolist() == [6, 4, 0, 1]


def test_a_collection_keeps_metrics_apart_after_a_batch_without_pairs() -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    together = MetricCollection({name: make() for name, make in METRICS.items()})
    together.update(score, images, maps[:0], rows[:0], concepts[:0])
    together.update(score, images, maps, rows, concepts)
    for name, value in together.compute().items():
        alone = METRICS[name]()
        alone.update(score, images, maps, rows, concepts)
        assert value == alone.compute(), name


@pytest.mark.parametrize("name", METRICS)
def test_metrics_can_be_copied_and_stored(name: str) -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    # an activation of the module, since lambdas cannot be stored
    metric = METRICS[name](activation=torch.sigmoid, seed=2)
    metric.update(score, images, maps, rows, concepts)
    for copy in (metric.clone(), pickle.loads(pickle.dumps(metric))):
        assert copy.compute() == metric.compute()
        copy.update(score, images, maps, rows, concepts)
    metric.update(score, images, maps, rows, concepts)
    assert copy.chance() == metric.chance()


def test_settings_reach_the_functions() -> None:
    images, (maps, rows, concepts) = images_of(), pairs_of()
    softmax = lambda z: z.softmax(1)  # noqa: E731
    for metric, reference in (
        (
            DeletionAUC(CONCEPTS, substrate=0.3, activation=softmax),
            deletion(score, images, maps, rows, concepts, substrate=0.3, activation=softmax).auc,
        ),
        (
            InsertionAUC(CONCEPTS, activation=softmax),
            insertion(score, images, maps, rows, concepts, activation=softmax).auc,
        ),
        (
            AverageDrop(CONCEPTS, activation=softmax),
            average_drop(score, images, maps, rows, concepts, activation=softmax).drop,
        ),
    ):
        metric.update(score, images, maps, rows, concepts)
        means = torch.stack([reference[concepts == k].nanmean() for k in range(CONCEPTS)])
        torch.testing.assert_close(metric.per_concept(), means, equal_nan=True)


@pytest.mark.parametrize("kind", ["cosine", "spearman"])
def test_similarity_of_maps_before_and_after(kind: str) -> None:
    maps, _, concepts = pairs_of()
    after = torch.rand(maps.shape)
    metric = RandomisationSimilarity(CONCEPTS, kind, seed=6)
    metric.update(maps, after, concepts)
    for found, other in (
        (metric.per_concept(), after),
        (metric.chance_per_concept(), shifted(maps, step_generator(6, 1))),
    ):
        values = map_similarity(maps, other, kind).abs()
        means = torch.stack([values[concepts == k].nanmean() for k in range(CONCEPTS)])
        torch.testing.assert_close(found, means, equal_nan=True)
    assert metric.counts().tolist() == [5, 3, 0, 1]
    assert not metric.higher_is_better


def test_no_graph_is_kept() -> None:
    maps, _, concepts = pairs_of()
    maps, after = maps.requires_grad_(), torch.rand(maps.shape, requires_grad=True)
    metric = RandomisationSimilarity(CONCEPTS)
    assert not metric(maps, after, concepts).requires_grad
    assert not metric.sums.requires_grad


def test_a_picture_of_the_other_sign_is_the_same_picture() -> None:
    maps, _, concepts = pairs_of()
    metric = RandomisationSimilarity(CONCEPTS)
    metric.update(maps, maps * torch.tensor([-2.0, 1.0])[torch.arange(len(maps)) % 2, None, None], concepts)
    torch.testing.assert_close(metric.compute(), torch.tensor(1.0))


def test_an_edge_detector_is_as_similar_as_can_be() -> None:
    maps, _, concepts = pairs_of()
    metric = RandomisationSimilarity(CONCEPTS)
    metric.update(maps, maps, concepts)
    assert metric.compute().item() == pytest.approx(1.0)
    assert metric.chance() < 0.9


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": torch.rand(2, 8, 7)}, r"^maps: expected \[P, 8, 8\], got \[2, 8, 7\]"),
        ({"rows": torch.tensor([0])}, r"^rows: expected \[2\], one a map, got \[1\]"),
        ({"rows": torch.tensor([0, 5])}, "^rows: expected indices below 5, got 5"),
        ({"concepts": torch.tensor([0, 4])}, "^concepts: expected indices from 0 to 3, got 0 to 4"),
        ({"concepts": torch.tensor([0.0, 1.0])}, r"^concepts: expected whole numbers \[2\]"),
        ({"score": lambda x: x.mean((1, 2, 3))}, "^score: expected logits"),
    ],
)
def test_bad_input(name: str, changes: dict[str, Any], message: str) -> None:
    good = {"maps": torch.rand(2, 8, 8), "rows": torch.tensor([0, 1]), "concepts": torch.tensor([0, 3])}
    with pytest.raises(ValueError, match=message):
        METRICS[name]().update(**{"score": score, "images": images_of(), **good, **changes})


def test_bad_settings() -> None:
    for make in METRICS.values():
        with pytest.raises(ValueError, match="^batch_size: expected a positive number, got 0"):
            make(batch_size=0)
    for curve in (DeletionAUC, InsertionAUC):
        with pytest.raises(ValueError, match="^step: expected a positive number, got 0"):
            curve(CONCEPTS, step=0)
    with pytest.raises(ValueError, match="^num_concepts: expected at least 1, got 0"):
        AverageDrop(0)
    with pytest.raises(ValueError, match="^kind: expected 'cosine' or 'spearman', got 'ssim'"):
        RandomisationSimilarity(CONCEPTS, "ssim")
    with pytest.raises(ValueError, match="^a, b: expected maps"):
        RandomisationSimilarity(CONCEPTS).update(torch.rand(2, 8, 8), torch.rand(2, 4, 4), torch.tensor([0, 1]))


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # processes that wait for each other in different places fail instead of standing still
    patience = timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=patience
    )
    images, (maps, rows, concepts) = images_of(), pairs_of()
    # the first process sees three pairs, the second seven
    own = slice(0, 3) if rank == 0 else slice(3, None)
    found = {}
    for name, make in METRICS.items():
        metric = make()
        metric.update(score, images, maps[own], rows[own], concepts[own])
        found[name] = {"value": metric.compute(), "per_concept": metric.per_concept(), "counts": metric.counts()}
        found[name]["chance"] = metric.chance()
    torch.save(found, folder / f"rank {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(work, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"rank {rank}.pt", weights_only=True) for rank in (0, 1))
    images, (maps, rows, concepts) = images_of(), pairs_of()
    for name, make in METRICS.items():
        alone = make()
        alone.update(score, images, maps, rows, concepts)
        for found in (first[name], second[name]):
            torch.testing.assert_close(found["value"], alone.compute())
            torch.testing.assert_close(found["per_concept"], alone.per_concept(), equal_nan=True)
            assert found["counts"].equal(alone.counts())
        # one draw of the chance level, though not the one that a single process makes
        assert first[name]["chance"] == second[name]["chance"]
