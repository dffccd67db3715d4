"""The metrics of localisation: means over concepts, their chance levels, and the same on two processes."""

from __future__ import annotations

import copy
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

from cbm_lightning.metrics.localisation import (
    EnergyInMask,
    HalfMaxIoU,
    KeypointDistance,
    LocalisationMetric,
    MassIoU,
    PixelAUROC,
    PixelAveragePrecision,
    PointingGame,
    RankAccuracy,
    TopKIntersection,
)
from cbm_lightning.saliency import visible_pairs
from cbm_lightning.saliency.localisation import (
    energy_in_mask,
    half_max_overlap,
    iou_at_mass,
    keypoint_distance,
    pixel_auroc,
    pixel_average_precision,
    pointing_game,
    rank_accuracy,
    top_k_intersection,
)
from cbm_lightning.saliency.scores import Scores

K, PAIRS = 5, 60
METRICS: dict[str, tuple[Callable[..., LocalisationMetric], Callable[[Tensor, Tensor], Scores]]] = {
    "pointing": (PointingGame, pointing_game),
    "pointing near": (lambda k: PointingGame(k, tolerance=2), lambda s, a: pointing_game(s, a, 2)),
    "energy": (EnergyInMask, energy_in_mask),
    "rank": (RankAccuracy, rank_accuracy),
    "top": (lambda k: TopKIntersection(k, k=7), lambda s, a: top_k_intersection(s, a, 7)),
    "mass": (lambda k: MassIoU(k, mass=0.75), lambda s, a: iou_at_mass(s, a, 0.75)),
    "iou": (HalfMaxIoU, half_max_overlap),
    "soft dice": (lambda k: HalfMaxIoU(k, "dice", soft=True), lambda s, a: half_max_overlap(s, a, "dice", True)),
    "auroc": (PixelAUROC, pixel_auroc),
    "ap": (PixelAveragePrecision, pixel_average_precision),
    "distance": (KeypointDistance, lambda s, p: keypoint_distance(s, p, normalised=True)),
    "distance in pixels": (lambda k: KeypointDistance(k, normalised=False), keypoint_distance),
}
every_metric = pytest.mark.parametrize("name", METRICS)


def pairs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, masks or points, and concepts, of which the last is never seen; some pairs are undefined."""
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(PAIRS, 8, 8, generator=generator)
    concepts = torch.randint(0, K - 1, (PAIRS,), generator=generator)
    masks = torch.rand(PAIRS, 8, 8, generator=generator) < 0.1 + 0.2 * concepts[:, None, None]
    masks[[0, 7, 20]] = False
    points = 8 * torch.rand(PAIRS, 2, generator=generator)
    points[[0, 7, 20]] = torch.nan
    maps[3] = -1.0
    return maps + masks, points if name.startswith("distance") else masks, concepts


def in_batches(metric: LocalisationMetric, data: tuple[Tensor, ...], size: int = 17) -> LocalisationMetric:
    for batch in zip(*(part.split(size) for part in data), strict=True):
        metric.update(*batch)
    return metric


@every_metric
def test_means_over_concepts_of_means_over_pairs(name: str) -> None:
    make, function = METRICS[name]
    data = pairs(name)
    metric = in_batches(make(K), data)
    scores, concepts = function(*data[:2]), data[2]
    means = []
    for numbers, found in ((scores.values, metric.per_concept()), (scores.chance, metric.chance_per_concept())):
        expected = torch.stack([numbers[concepts == k].nanmean() for k in range(K)])
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert found.isnan().tolist() == [False] * (K - 1) + [True]
        means.append(expected.nanmean())
    torch.testing.assert_close(metric.compute(), means[0])
    torch.testing.assert_close(metric.chance(), means[1])
    known = concepts[~scores.values.isnan()]
    assert PAIRS - 4 <= len(known) <= PAIRS - 3
    assert metric.counts().tolist() == known.bincount(minlength=K).tolist()
    # not the mean over pairs, in which a frequent concept weighs more
    assert abs(scores.values.nanmean() - metric.compute()) > 1e-4


@every_metric
def test_the_summary_has_it_all(name: str) -> None:
    metric = in_batches(METRICS[name][0](K), pairs(name))
    summary = metric.summary()
    parts = (metric.compute(), metric.chance(), metric.per_concept(), metric.chance_per_concept(), metric.counts())
    for found, expected in zip(summary, parts, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    assert (summary.value.shape, summary.per_concept.shape) == ((), (K,))
    assert summary.counts.dtype == torch.int64
    with metric.sync_context():
        torch.testing.assert_close(metric.summary().chance, summary.chance)


@every_metric
def test_batches_of_any_size(name: str) -> None:
    metrics = [in_batches(METRICS[name][0](K), pairs(name), size).summary() for size in (1, 17, PAIRS)]
    for other in metrics[1:]:
        for found, expected in zip(other, metrics[0], strict=True):
            torch.testing.assert_close(found, expected, equal_nan=True)


@every_metric
def test_nothing_measured_is_not_a_number(name: str) -> None:
    make, _ = METRICS[name]
    metric = make(K)
    maps, truth, concepts = pairs(name)
    for undefined in (slice(0, 0), [0, 7, 20]):
        metric.update(maps[undefined], truth[undefined], concepts[undefined])
        summary = metric.summary()
        assert metric.compute().isnan()
        assert summary.chance.isnan()
        assert summary.per_concept.isnan().all()
        assert summary.counts.tolist() == [0] * K
    # a process that was given nothing asks all the same
    assert make(K).summary().value.isnan()


def test_chance_counts_the_same_pairs() -> None:
    metric = EnergyInMask(1)
    masks = torch.zeros(2, 2, 2, dtype=torch.bool)
    masks[0, 0, 0], masks[1] = True, True
    # the second map has no energy that could lie anywhere
    metric.update(torch.tensor([1.0, -1.0])[:, None, None].expand(2, 2, 2), masks, torch.tensor([0, 0]))
    assert (metric.compute(), metric.chance(), metric.counts()) == (0.25, 0.25, 1)


@every_metric
def test_forward_reset_and_copies(name: str) -> None:
    make, _ = METRICS[name]
    data = pairs(name)
    metric = make(K)
    first, second = ([part[rows] for part in data] for rows in (slice(0, 30), slice(30, None)))
    torch.testing.assert_close(metric(*first), in_batches(make(K), first).compute())
    torch.testing.assert_close(metric(*second), in_batches(make(K), second).compute())
    expected = in_batches(make(K), data).summary()
    for held in (metric, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        torch.testing.assert_close(held.summary().per_concept, expected.per_concept, equal_nan=True)
    metric.reset()
    assert metric.summary().counts.tolist() == [0] * K
    torch.testing.assert_close(in_batches(metric, data).compute(), expected.value)


@every_metric
def test_inference_mode_and_gradients(name: str) -> None:
    maps, truth, concepts = pairs(name)
    expected = in_batches(METRICS[name][0](K), (maps, truth, concepts)).compute()
    metric = METRICS[name][0](K)
    with torch.inference_mode():
        metric.reset()
        metric.update(maps[:20], truth[:20], concepts[:20])
    metric.update(maps[20:40], truth[20:40], concepts[20:40])
    of_batch = metric(maps[40:].clone().requires_grad_(), truth[40:], concepts[40:])
    assert not of_batch.requires_grad
    torch.testing.assert_close(metric.compute(), expected)
    assert not metric.sums.requires_grad


def test_one_batch_of_pairs_as_the_model_makes_them() -> None:
    maps, masks = torch.randn(4, K, 4, 4), torch.rand(4, K, 8, 8) < 0.2
    masks[:, 2] = False
    found = visible_pairs(maps, masks)
    metric = PointingGame(K)
    metric.update(found.maps, found.masks, found.concepts)
    assert metric.counts().tolist() == [4, 4, 0, 4, 4]
    assert metric.chance() == pytest.approx(masks[:, [0, 1, 3, 4]].float().mean().item())


@pytest.mark.parametrize("compute_groups", [True, False])
def test_a_collection_keeps_its_metrics_apart(compute_groups: bool) -> None:
    """After a first batch without a pair, or with the same scores, torchmetrics takes states for one and the same."""
    data = pairs("energy")
    names = [name for name in METRICS if not name.startswith("distance")]
    collection = MetricCollection({name: METRICS[name][0](K) for name in names}, compute_groups=compute_groups)
    collection.update(*(part[:0] for part in data))
    collection.update(*data)
    found = collection.compute()
    for name in names:
        assert found[name] == in_batches(METRICS[name][0](K), data, PAIRS).compute(), name
    assert len({round(float(value), 6) for value in found.values()}) == len(names)


def test_what_is_better() -> None:
    assert {name for name in METRICS if not METRICS[name][0](K).higher_is_better} == {"distance", "distance in pixels"}


@every_metric
def test_bad_pairs(name: str) -> None:
    metric = METRICS[name][0](K)
    maps, truth, concepts = pairs(name)
    cases: list[tuple[Any, str]] = [
        ((maps[0], truth, concepts), "maps|concepts"),
        ((maps, truth[:4], concepts), "masks|points"),
        ((maps, truth, concepts[:4]), "concepts: expected whole numbers"),
        ((maps, truth, concepts.float()), "concepts: expected whole numbers .* got .* of torch.float32"),
        ((maps, truth, concepts[:, None]), "concepts: expected whole numbers"),
        ((maps, truth, concepts + 2), rf"concepts: expected indices from 0 to {K - 1}, got 2 to {K}"),
        ((maps, truth, concepts - 1), rf"concepts: expected indices from 0 to {K - 1}, got -1 to "),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^({message})"):
            metric.update(*arguments)
    assert metric.summary().counts.sum() == 0


@pytest.mark.parametrize("k", [0, -3])
def test_no_concepts(k: int) -> None:
    for make, _ in METRICS.values():
        with pytest.raises(ValueError, match=f"^num_concepts: expected at least 1, got {k}"):
            make(k)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PointingGame(K, tolerance=-1), "tolerance: expected a number of pixels from 0, got -1"),
        (lambda: TopKIntersection(K, k=0), "k: expected at least 1 pixel, got 0"),
        (lambda: MassIoU(K, mass=0), r"mass: expected a share in \(0, 1\], got 0"),
        (lambda: MassIoU(K, mass=95), r"mass: expected a share in \(0, 1\], got 95"),
        (lambda: HalfMaxIoU(K, kind="union"), "kind: expected 'iou', 'dice' or 'precision', got 'union'"),
        (lambda: EnergyInMask(K, tolerance=3), "Unexpected keyword arguments: `tolerance`"),
    ],
)
def test_options_fail_before_the_first_batch(make: Callable[[], LocalisationMetric], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # processes that wait for each other in different places fail instead of standing still
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    for name, (make, _) in METRICS.items():
        data = pairs(name)
        for case, rows in (("uneven", slice(0, 40) if rank == 0 else slice(40, None)), ("idle", slice(0, PAIRS))):
            metric = make(K)
            if case == "uneven" or rank == 0:
                in_batches(metric, [part[rows] for part in data])
            before = metric.sums.clone()
            summary = metric.summary()
            parts = [metric.per_concept(), metric.chance(), metric.chance_per_concept(), metric.counts()]
            computed = metric.compute() if case == "uneven" else summary.value
            parts.append(metric.chance())
            with metric.sync_context():
                parts.append(metric.per_concept())
            found[f"{name} {case}"] = {
                "summary": list(summary),
                "parts": parts,
                "computed": computed,
                "unsynced": torch.equal(metric.sums, before),
                "own": before,
            }
    torch.save(found, folder / f"rank {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.start_processes(work, (folder,), nprocs=2, start_method="fork")
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("case", ["uneven", "idle"])
@every_metric
def test_two_processes_find_what_one_finds(ranks: list[dict[str, Any]], name: str, case: str) -> None:
    alone = in_batches(METRICS[name][0](K), pairs(name)).summary()
    close = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
    for rank in ranks:
        found = rank[f"{name} {case}"]
        for number, expected in zip(found["summary"], alone, strict=True):
            torch.testing.assert_close(number, expected, **close)
        parts = (
            alone.per_concept,
            alone.chance,
            alone.chance_per_concept,
            alone.counts,
            alone.chance,
            alone.per_concept,
        )
        for number, expected in zip(found["parts"], parts, strict=True):
            torch.testing.assert_close(number, expected, **close)
        torch.testing.assert_close(found["computed"], alone.value, **close)
        # each goes on with what it counted itself
        assert found["unsynced"]
    own = [rank[f"{name} {case}"]["own"][2].sum() for rank in ranks]
    assert own[0] + own[1] == alone.counts.sum()
    assert own[0] != own[1]
    assert (own[1] == 0) == (case == "idle")
