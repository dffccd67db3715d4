"""How well maps are placed over several batches: which pairs count, by which numbers, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from toy_images import CLASSES, NAMES, Asked, ToyConv, batch_of, looker, toy_model

from cbm_lightning import CBMModule, EmbeddingBottleneck, MLPHead, SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data import RenderedBirds
from cbm_lightning.saliency import SaliencyMethod, SaliencyResult, SaliencyStudy, concept_maps, visible_pairs
from cbm_lightning.saliency.localisation import energy_in_mask, half_max_overlap, pixel_auroc, pointing_game
from cbm_lightning.saliency.measures import DEFAULT, MEASURES
from cbm_lightning.types import Batch

MASKED, POINTED = DEFAULT["masks"], DEFAULT["points"]
METHODS = sorted(set(SaliencyMethod.registry) - {"attention_rollout"})
EVERYTHING = {name: {"k": 9} if name == "top_k_intersection" else None for name in MEASURES}


def measured(model: CBMModule, *batches: Batch, **options: Any) -> SaliencyResult:
    study = SaliencyStudy(model, **options)
    for batch in batches:
        study.update(batch)
    return study.compute()


def cut(batch: Batch, size: int) -> list[Batch]:
    """The batch in smaller ones."""
    parts = range(0, len(batch["image"]), size)
    return [{name: value[start : start + size] for name, value in batch.items()} for start in parts]


def check_same(found: SaliencyResult, expected: SaliencyResult) -> None:
    assert list(found.values) == list(expected.values)
    for field in ("values", "chance", "per_concept", "chance_per_concept", "counts"):
        for name, value in getattr(expected, field).items():
            assert_close(getattr(found, field)[name], value, equal_nan=True, msg=f"{field} of {name}")


def by_pair(model: CBMModule, batch: Batch, method: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Metric to values, chance and concepts of all pairs."""
    pairs = visible_pairs(concept_maps(model, batch["image"], method), batch["concept_masks"])
    found = {
        "pointing_game": pointing_game(pairs.maps, pairs.masks),
        "energy_in_mask": energy_in_mask(pairs.maps, pairs.masks),
        "pixel_auroc": pixel_auroc(pairs.maps, pairs.masks),
        "iou_at_half_max": half_max_overlap(pairs.maps, pairs.masks),
    }
    return {name: (scores.values, scores.chance, pairs.concepts) for name, scores in found.items()}


# ---------------------------------------------------------------- numbers


def test_a_model_that_looks_at_the_concept_and_one_that_looks_at_another() -> None:
    batch = batch_of(20)
    right, wrong = (measured(looker(order), batch).scalars() for order in ((0, 1, 2), (1, 2, 0)))
    assert right["pointing_game"] == right["pixel_auroc"] == right["iou_at_half_max"] == 1
    assert right["energy_in_mask"] > 0.4
    for name in MASKED:
        assert wrong[name] < right[f"{name}_chance"] < 0.6, name


@pytest.mark.parametrize("method", ["exact", "gradient"])
def test_the_mean_over_concepts_of_the_means_over_pairs(method: str) -> None:
    model, batch = toy_model(), batch_of(9)
    result = measured(model, batch, method=method)
    assert set(result.values) == set(MASKED)
    for name, (values, chance, concepts) in by_pair(model, batch, method).items():
        for column, found, mean in (
            (values, result.per_concept[name], result.values[name]),
            (chance, result.chance_per_concept[name], result.chance[name]),
        ):
            known = ~(values.isnan() | chance.isnan())
            each = [column[known & (concepts == k)].mean() for k in range(len(NAMES))]
            assert_close(found, torch.stack(each), equal_nan=True)
            assert_close(mean, torch.stack(each).nanmean())
        assert result.counts[name].tolist() == [int((known & (concepts == k)).sum()) for k in range(len(NAMES))]
    assert not torch.equal(result.counts["pointing_game"], torch.zeros(3))


@pytest.mark.parametrize("where", ["masks", "masks points"])
def test_the_division_into_batches_changes_nothing(where: str) -> None:
    model, batch = toy_model(), batch_of(9, where)
    whole = measured(model, batch, method="grad_cam")
    for size, at_once in ((1, 16), (4, 3), (9, 1), (9, 2)):
        check_same(measured(model, *cut(batch, size), method="grad_cam", images_at_once=at_once), whole)


def test_everything_that_can_be_measured() -> None:
    birds = RenderedBirds(num_test=2, size=32, num_classes=3, kept_groups=["body colour", "crest"], masks=True)
    model = CBMModule(ToyConv(), data=birds)
    birds.setup("test")
    [batch] = birds.test_dataloader()
    area = batch["concept_masks"].flatten(2).float()
    place = torch.arange(32.0).expand(32, 32)
    centroids = torch.stack([area @ axis.flatten() for axis in (place, place.T)], 2) / area.sum(2, keepdim=True)
    batch["concept_points"] = centroids
    result = measured(model, batch, method="grad_cam", metrics=EVERYTHING)
    once = set(MEASURES) - {"concept_importance"}
    assert set(result.values) == set(result.chance) == once | {"cgim1", "cgim2", "cgim3"}
    unknown = {name for name, value in result.values.items() if value.isnan()}
    assert unknown <= {"cgim2", "cgim3"}, "of a model that gets no class right there is no score"
    bounded = {name: value for name, value in result.values.items() if name not in unknown}
    assert all(-1 <= float(value) <= 1 for value in bounded.values()), bounded
    assert result.per_concept.keys() == result.counts.keys() == once - {"concept_location", "concept_existence"}
    assert all(not value.is_inference() and value.device.type == "cpu" for value in result.values.values())
    table = result.table().set_index("metric")
    assert list(table.index) == list(result.values)
    assert list(table.columns) == ["value", "chance", "concepts", "pairs"]
    shown = area.any(2)
    assert table.loc["pointing_game", "pairs"] == int(shown.sum())
    assert table.loc["pointing_game", "concepts"] == int(shown.any(0).sum())
    assert table.loc[["concept_existence", "cgim1"], "pairs"].isna().all()


def test_options_of_metrics() -> None:
    model, batch = toy_model(), batch_of(9)
    strict = measured(model, batch, metrics={"iou_at_mass": None, "pointing_game": {"tolerance": 0}})
    loose = measured(model, batch, metrics={"pointing_game": {"tolerance": 20}, "iou_at_mass": {"mass": 0.2}})
    assert loose.values["pointing_game"] == 1 > strict.values["pointing_game"]
    assert loose.values["iou_at_mass"] != strict.values["iou_at_mass"]


# ---------------------------------------------------------------- which metrics


@pytest.mark.parametrize(
    ("where", "expected"),
    [("masks", MASKED), ("boxes", MASKED), ("points", POINTED), ("boxes points", (*MASKED, *POINTED)), ("", ())],
)
def test_the_default_is_what_the_batches_know(where: str, expected: tuple[str, ...]) -> None:
    method = Asked()
    result = measured(toy_model(), batch_of(6, where), method=method)
    assert set(result.values) == set(expected)
    assert [name for name in MEASURES if name in result.values] == list(result.values)
    assert len(method.images) == bool(where)


def test_boxes_say_what_their_masks_say() -> None:
    model = toy_model()
    check_same(measured(model, batch_of(6, "boxes")), measured(model, batch_of(6)))


def test_batches_with_and_without_masks() -> None:
    model = toy_model()
    masked, bare, pointed = (batch_of(5, where, seed) for seed, where in enumerate(("masks", "", "points")))
    expected = measured(model, masked)
    for batches in ((masked, bare), (bare, masked)):
        check_same(measured(model, *batches), expected)
    both = measured(model, pointed, masked, bare)
    assert list(both.values) == [name for name in MEASURES if name in (*MASKED, *POINTED)]
    for name, value in (expected.values | measured(model, pointed).values).items():
        assert_close(both.values[name], value)


@pytest.mark.parametrize(
    ("metric", "where", "changes", "needed"),
    [
        ("energy_in_mask", "points", {}, "energy_in_mask needs concept_masks or concept_boxes in the batch"),
        (
            "keypoint_distance",
            "masks",
            {},
            "keypoint_distance needs concept_points in the batch; CBMModule and a batch of ",
        ),
        ("concept_existence", "masks", {"concepts": None}, "concept_existence needs annotated concepts in the batch"),
        ("concept_importance", "masks", {"label": None}, "concept_importance needs labels in the batch"),
        ("concept_location", "", {"concepts": None}, "needs concept_points in the batch and annotated concepts"),
    ],
)
def test_a_metric_that_was_asked_for_needs_what_it_reads(
    metric: str, where: str, changes: dict[str, None], needed: str
) -> None:
    with pytest.raises(ValueError, match=f"metrics: .*{needed}"):
        measured(toy_model(), batch_of(4, where, **changes), metrics=[metric])


@pytest.mark.parametrize(
    ("model", "metric", "needed"),
    [
        (lambda: toy_model(head=MLPHead([4])), "concept_existence", "a head with exact contributions"),
        (lambda: toy_model(EmbeddingBottleneck(2)), "concept_importance", "a linear head over one number a concept"),
        (lambda: toy_model(task="multilabel"), "concept_importance", "one predicted class an image"),
        (lambda: toy_model(task="multilabel"), "concept_existence", "one predicted class an image"),
        (lambda: toy_model(task="binary", num_classes=2, class_names=None), "concept_importance", "a row a class"),
    ],
)
def test_a_metric_needs_a_head_that_it_can_read(model: Any, metric: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"metrics: {metric} needs .*{needed}"):
        measured(model(), batch_of(4), metrics=[metric])


# ---------------------------------------------------------------- which pairs


def pairs_of(batch: Batch, model: CBMModule | None = None, **options: Any) -> set[tuple[int, int]]:
    method = Asked()
    measured(toy_model() if model is None else model, batch, method=method, **options)
    return {pair for call in method.pairs for pair in call}


def where(shown: Tensor) -> set[tuple[int, int]]:
    return {(row, k) for row, k in shown.nonzero().tolist()}


def test_maps_are_made_only_where_a_concept_is_to_be_seen() -> None:
    batch = batch_of(6, "masks points")
    present = batch["concepts"] > 0.5
    assert pairs_of(batch) == where(present)
    batch["concept_masks"][0], batch["concept_points"][1] = False, torch.nan
    assert pairs_of(batch) == where(present), "a point or a pixel is enough"
    batch["concept_points"][0] = torch.nan
    assert pairs_of(batch) == where(present & (torch.arange(6) > 0)[:, None])
    assert pairs_of(batch, concepts=["blue", 0]) == {pair for pair in pairs_of(batch) if pair[1] != 1}
    batch["concepts"][1], batch["concepts"][2] = torch.nan, 0.0
    assert pairs_of(batch) == where(present & ~torch.tensor([1, 0, 1, 0, 0, 0]).bool()[:, None]), "unknown, and denied"


def test_without_masks_the_annotation_says_what_is_there_and_else_the_model() -> None:
    model, batch = looker((0, 2, 1)), batch_of(6, "")
    predicted = batch["concepts"][:, [0, 2, 1]] > 0.5
    batch["concepts"][0] = torch.nan
    present = batch["concepts"] > 0.5
    assert len({frozenset(where(pairs)) for pairs in (present, predicted, present & predicted)}) == 3
    assert pairs_of(batch, model, metrics=["average_drop"]) == where(present)
    assert pairs_of(batch, model, metrics=["average_drop"], counted="predicted") == where(present & predicted)
    del batch["concepts"]
    assert pairs_of(batch, model, metrics=["average_drop"]) == where(predicted)


def test_only_what_the_model_predicts() -> None:
    model, batch = looker((0, 2, 1)), batch_of(8)
    predicted = batch["concepts"][:, [0, 2, 1]] > 0.5
    expected = {**batch, "concept_masks": batch["concept_masks"] & predicted[:, :, None, None]}
    assert 0 < expected["concept_masks"].sum() < batch["concept_masks"].sum()
    check_same(measured(model, batch, counted="predicted"), measured(model, expected))


def test_some_concepts() -> None:
    model, batch = toy_model(), batch_of(9)
    every, one = measured(model, batch), measured(model, batch, concepts=["green"])
    for name in MASKED:
        assert one.values[name] == one.per_concept[name][1] == every.per_concept[name][1]
        assert one.per_concept[name].isnan().tolist() == [True, False, True]
        assert one.counts[name].tolist() == [0, int(every.counts[name][1]), 0]
    assert one.concept_table()["pairs"].tolist() == one.counts["pointing_game"].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_images_that_show_no_concept(method: str) -> None:
    batch = batch_of(4)
    batch["concept_masks"][:] = False
    result = measured(toy_model(), batch, method=method)
    # the keys are there for whoever monitors them
    assert result.scalars().keys() == {*MASKED, *(f"{name}_chance" for name in MASKED)}
    assert all(value.isnan() for value in result.scalars().values())
    assert result.table()["pairs"].tolist() == [0] * len(MASKED)


def test_empty_masks_are_no_misses() -> None:
    model, batch = looker(), batch_of(8)
    some = {**batch, "concept_masks": batch["concept_masks"].clone()}
    some["concept_masks"][::2] = False
    result = measured(model, some)
    assert result.values["pointing_game"] == 1
    assert result.counts["pointing_game"].sum() == (batch["concepts"][1::2] > 0.5).sum()


def test_real_valued_concepts_are_neither_there_nor_not() -> None:
    """Their annotations are no shares: metrics that read presence leave them out, and do not stumble."""
    concepts = ConceptSet(NAMES, kinds=["binary", "real", "binary"])
    model, batch = toy_model(concepts=concepts), batch_of(8)
    batch["concepts"][:, 1] = torch.linspace(-5, 40, 8)
    unknown = {**batch, "concepts": batch["concepts"].clone()}
    unknown["concepts"][:, 1] = torch.nan
    names = ["concept_existence", "concept_importance"]
    check_same(measured(model, batch, metrics=names), measured(model, unknown, metrics=names))
    assert measured(model, batch, metrics=names).scalars()


# ---------------------------------------------------------------- results


def test_results_in_tables() -> None:
    batch = batch_of(6)
    batch["concept_masks"][:, 2] = False
    result = measured(looker(), batch)
    rows = result.concept_table()
    assert list(rows.columns) == ["concept", "pairs", *(c for n in result.values for c in (n, f"{n}_chance"))]
    assert rows["concept"].tolist() == NAMES
    assert rows["pairs"].tolist() == [*(batch["concepts"] > 0.5).sum(0).tolist()[:2], 0]
    assert rows.loc[2, ["pointing_game", "pointing_game_chance"]].isna().all()
    assert rows["pointing_game"].tolist()[:2] == [1, 1]
    table = result.table()
    assert table["metric"].tolist() == [name for name in MEASURES if name in MASKED]
    assert table["concepts"].tolist() == [2] * 4
    assert table["chance"].tolist() == pytest.approx([float(result.chance[name]) for name in table["metric"]])
    assert result.scalars().keys() == {*MASKED, *(f"{name}_chance" for name in MASKED)}


@pytest.mark.parametrize("metrics", [None, [], MASKED])
def test_a_study_of_nothing(metrics: Any) -> None:
    result = measured(toy_model(), metrics=metrics)
    assert all(value.isnan() for value in result.scalars().values())
    assert list(result.table().columns) == ["metric", "value", "chance", "concepts", "pairs"]
    assert result.concept_table()["concept"].tolist() == NAMES


def test_it_starts_anew() -> None:
    model = toy_model()
    study = SaliencyStudy(model, metrics=["energy_in_mask", "concept_existence", "concept_importance"])
    for seed in (1, 0):
        study.reset()
        study.update(batch_of(6, seed=seed))
    check_same(study.compute(), measured(model, batch_of(6), metrics=list(study.metrics)))


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(method: str) -> None:
    model, batch = toy_model(), batch_of(6)
    expected = measured(model, batch, method=method)
    half = measured(model.bfloat16(), {**batch, "image": batch["image"].bfloat16()}, method=method)
    assert half.values["pixel_auroc"].dtype == torch.float32
    assert half.values["pixel_auroc"] == pytest.approx(float(expected.values["pixel_auroc"]), abs=0.1)


def test_the_model_stays_as_it_is() -> None:
    model, batch = toy_model(), batch_of(6, "masks points")
    model.backbone.eval()
    model(batch).logits.sum().backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    state = torch.get_rng_state()
    for method in ("grad_cam", "smooth_grad"):
        measured(model, batch, method=method, metrics=EVERYTHING)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(weight.grad, gradients[name]) for name, weight in model.named_parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    assert (model.training, model.backbone.training, model.head.training) == (True, False, True)
    assert torch.equal(torch.get_rng_state(), state)


def test_inside_inference_mode_and_out() -> None:
    model, batch = toy_model(), batch_of(6, "masks points")
    expected = measured(model, batch, batch, metrics=EVERYTHING)
    study = SaliencyStudy(model, metrics=EVERYTHING)
    with torch.inference_mode():
        study.update(batch)
    study.update(batch)
    check_same(study.compute(), expected)


def test_a_prediction_that_is_known_is_not_made_again() -> None:
    model, batch = toy_model(), batch_of(6)
    prediction = model.eval()(batch)
    for known, images in ((prediction, 6), (None, 12)):
        model.backbone.images = 0
        SaliencyStudy(model, "exact").update(batch, known)
        assert model.backbone.images == images


def test_points_at_the_edge_of_the_image() -> None:
    batch = batch_of(6, "points")
    edges = torch.tensor([[15.5, 3.0], [3.0, -0.5], [15.5, 15.5]])
    batch["concept_points"] = edges.expand(6, 3, 2).clone()
    assert measured(toy_model(), batch, metrics=["concept_location", "keypoint_distance"]).scalars()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "grad_camm"}, "method: nothing is called 'grad_camm'; did you mean 'grad_cam'"),
        ({"metrics": ["energy"]}, "metrics: nothing is called 'energy'; did you mean 'energy_in_mask'"),
        ({"metrics": {"iou_at_mass": {"mas": 1}}}, "metrics: iou_at_mass takes no {'mas': 1}"),
        ({"metrics": {"iou_at_mass": {"mass": 3}}}, r"iou_at_mass .*mass: expected a share in \(0, 1\]"),
        ({"concepts": ["gren"]}, r"no concept is called 'gren'; did you mean \['green'"),
        ({"concepts": [3]}, r"concepts: expected .*positions below 3, got \[3\]"),
        ({"counted": "shown"}, r"counted: expected one of \('present', 'predicted'\), got 'shown'"),
        ({"images_at_once": 0}, "images_at_once: expected at least 1, got 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaliencyStudy(toy_model(), **options)


def test_models_and_batches_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"Linear has no \['concept_set', 'backbone', 'bottleneck', 'encode'\]"):
        SaliencyStudy(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="^image: "):
        measured(toy_model(), batch_of(2, image=None, embedding=torch.rand(2, 8)))
    fixed = SimilarityBottleneck()
    model = toy_model(fixed, concepts=ConceptSet(NAMES, embeddings=torch.randn(3, 8)), class_names=CLASSES)
    with pytest.raises(ValueError, match="SimilarityBottleneck has no weights that could be randomised"):
        measured(model, batch_of(2), metrics=["randomisation"])
