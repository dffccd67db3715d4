"""Points of CUB's concepts: which part shows an attribute, when a point counts, what saliency metrics make of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from cub_tree import write_miniature_cub_tree
from lightning.pytorch import Trainer
from torch import Tensor
from torchvision.transforms import v2

from cbm_lightning import CBMModule
from cbm_lightning.backbones.base import Backbone
from cbm_lightning.bottlenecks import LinearBottleneck
from cbm_lightning.callbacks import ConceptSaliency
from cbm_lightning.data.cached_features import CachedFeatures
from cbm_lightning.data.cub import CUB200
from cbm_lightning.data.cub_parts import PARTS_OF_GROUP, CubImages, candidate_parts, concept_points
from cbm_lightning.data.images import plain_transform
from cbm_lightning.types import FeatureDims, Features

PARTS = ["beak", "left wing", "right wing", "tail"]
RED, BLUE, NOT_RED, HOOKED, FORKED = range(5)
LEFT, RIGHT = 2, 3  # in the miniature folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a miniature CUB_200_2011 whose birds have wings."""
    write_miniature_cub_tree(tmp_path, wings=True)
    return tmp_path


def data(root: Path, **options) -> CUB200:
    defaults = {"min_classes": 2, "parts": True, "image_size": 40, "augment": False, "batch_size": 40}
    made = CUB200(str(root), **{**defaults, **options})
    made.setup()
    return made


@pytest.mark.parametrize(
    ("attribute", "parts"),
    [
        ("has_bill_shape::dagger", ["beak"]),
        ("has_bill_length::about_the_same_as_head", ["beak"]),
        ("has_wing_shape::rounded-wings", ["left wing", "right wing"]),
        ("has_under_tail_color::buff", ["tail"]),
        ("has_crown_color::blue", []),  # there is no crown among the parts
        ("has_upperparts_color::brown", []),
        ("has_size::small_(5_-_9_in)", []),
        ("has_halo", []),
    ],
)
def test_attributes_are_seen_at_their_parts(attribute, parts):
    (row,) = candidate_parts([attribute], PARTS)
    assert [part for part, seen in zip(PARTS, row, strict=True) if seen] == parts


def test_table_has_every_official_group_and_part(shared):
    import json

    official = json.loads((shared / "data" / "cub10" / "meta.json").read_text())
    assert {name.partition("::")[0] for name in official["attributes_312"]} == set(PARTS_OF_GROUP)
    assert {part for parts in PARTS_OF_GROUP.values() for part in parts} == set(official["parts"])
    assert candidate_parts(official["attributes_112"], official["parts"]).any(1).sum() == 87


def test_a_point_needs_exactly_one_visible_part():
    candidates = candidate_parts(["has_wing_color::red", "has_tail_shape::forked", "has_size::small"], PARTS)
    beak, left, right, tail = torch.tensor([[9.0, 9], [1, 2], [3, 4], [5, 6]])
    visible = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0]])
    parts = torch.cat([torch.stack([beak, left, right, tail]).expand(4, 4, 2), visible[..., None]], 2)
    none = torch.full((2,), torch.nan)
    expected = [[left, tail, none], [right, none, none], [none, tail, none], [none, none, none]]
    found = concept_points(parts, candidates)
    assert torch.equal(found.nan_to_num(-1), torch.stack([torch.stack(row) for row in expected]).nan_to_num(-1))
    assert torch.equal(concept_points(parts[1], candidates).nan_to_num(-1), found[1].nan_to_num(-1))


def test_points_are_where_the_picture_shows_the_part(root):
    made = data(root, image_size=None, eval_transform=plain_transform(80))
    assert made.part_names == ["back", "beak", "left wing", "right wing"]
    counted = 0
    for item in made.splits["train"]:
        both = item["parts"][[LEFT, RIGHT], 2].all()
        shown = ~item["concept_points"].isnan()
        assert torch.equal(shown[:, 0], shown[:, 1])
        # the bill is never visible, and this folder knows no place of tails
        assert not shown[[HOOKED, FORKED]].any()
        present = item["concepts"][: NOT_RED + 1] > 0.5
        assert torch.equal(shown[: NOT_RED + 1, 0], present & ~both)
        for x, y in item["concept_points"][shown[:, 0]].round().long():
            assert item["image"][1, y, x] > 0.9
            assert item["image"][[0, 2], y, x].max() < 0.1
            counted += 1
    assert counted > 10


def test_parts_that_are_cut_off_do_not_count(root):
    upper_half = v2.Compose(
        [v2.Lambda(lambda image: image.crop((0, 0, 40, 20))), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    )
    whole, cut = (
        data(root, image_size=None, eval_transform=transform).splits["train"]
        for transform in (plain_transform(40), upper_half)
    )
    ambiguous = [row for row, item in enumerate(whole) if item["parts"][[LEFT, RIGHT], 2].all()]
    right_only = [row for row, item in enumerate(whole) if not item["parts"][LEFT, 2]]
    for row in ambiguous:
        wing = NOT_RED if whole[row]["concepts"][NOT_RED] else RED
        assert whole[row]["concept_points"].isnan().all()
        assert cut[row]["concept_points"][wing].tolist() == pytest.approx(
            whole[row]["parts"][LEFT, :2].tolist(), abs=0.1
        )
    assert all(cut[row]["concept_points"].isnan().all() for row in right_only)
    assert len(ambiguous) > 5
    assert len(right_only) > 5


def test_only_concepts_above_one_half_have_a_point(root):
    # a half is what soft labels make of a guess, yes or no; NaN is not annotated
    path = root / "CUB_200_2011" / "images" / "001.Painted_Bird_A" / "Painted_0_0.png"
    images = CubImages(
        [path],
        {"concepts": torch.tensor([[1.0, 0.75, 0.5, 0.25, 0.0, torch.nan]])},
        plain_transform(40),
        parts=torch.tensor([[[12.0, 20.0, 1.0]]]),
        candidates=torch.ones(6, 1, dtype=torch.bool),
    )
    points = images[0]["concept_points"]
    assert torch.allclose(points[:2], torch.tensor([12.0, 20.0]), atol=0.1)
    assert points[2:].isnan().all()


def test_only_splits_that_are_not_augmented_have_points(root):
    made = data(root, augment=True)
    assert "concept_points" not in made.splits["train"][0]
    (batch,) = made.test_dataloader()
    assert batch["parts"].shape == (16, 4, 3)
    assert batch["concept_points"].shape == (16, 5, 2)
    without = data(root, parts=False)
    assert not {"parts", "concept_points"} & set(without.splits["test"][0])
    read = set(made.files()) - set(without.files())
    assert {path.name for path in read} == {"parts.txt", "part_locs.txt"}


def test_cached_features_keep_points_and_notice_when_parts_change(root, tmp_path):
    def cached() -> Tensor:
        made = CachedFeatures(data(root), "timm/test_resnet", cache_dir=str(tmp_path / "cache"), batch_size=40)
        made.setup("test")
        (batch,) = made.test_dataloader()
        assert "image" not in batch
        return batch["concept_points"]

    (direct,) = data(root).test_dataloader()
    first = cached()
    assert torch.allclose(first, direct["concept_points"], atol=1e-3, equal_nan=True)
    table = root / "CUB_200_2011" / "parts" / "part_locs.txt"
    lines = table.read_text().splitlines()
    table.write_text(
        "".join(f"{line}\n" if line.split()[1] != "3" else f"{line.split()[0]} 3 0 0 0\n" for line in lines)
    )
    assert not first.isnan().all()
    assert cached().isnan().all()


class Pixels(Backbone):
    """The pixels themselves, so that a linear concept has a map of full resolution."""

    def __init__(self, size: int = 40) -> None:
        super().__init__(frozen=True)
        self.dims = FeatureDims(3, 3, (size, size))

    def encode(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, grid=tuple(x.shape[2:]))


def test_saliency_metrics_read_the_points(root):
    made = data(root)
    model = CBMModule(Pixels(), LinearBottleneck("logits"), data=made)
    bottleneck = model.bottleneck
    assert isinstance(bottleneck, LinearBottleneck)
    with torch.no_grad():
        # green alone: wings, and not the white back
        bottleneck.scores.weight.copy_(torch.tensor([-1.0, 1.0, -1.0]).expand(5, 3))
    saliency = ConceptSaliency("exact", metrics={"keypoint_distance": {}, "concept_location": {"alpha": 1}})
    trainer = Trainer(
        callbacks=[saliency], accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(root),
    )  # fmt: skip
    trainer.test(model, datamodule=made, verbose=False)
    logged = trainer.callback_metrics
    # the dot of three by three pixels is equally green, and its first pixel is one across and one down from its centre
    assert logged["test/saliency/keypoint_distance"] == pytest.approx(math.sqrt(2) / math.hypot(40, 40), abs=1e-3)
    assert logged["test/saliency/keypoint_distance_chance"] > 0.2
    assert logged["test/saliency/concept_location"] == 1
    assert logged["test/saliency/concept_location_chance"] == pytest.approx(1 / 12)
    (batch,) = made.test_dataloader()
    assert saliency.result is not None
    counts = saliency.result.counts["keypoint_distance"]
    assert torch.equal(counts, (~batch["concept_points"].isnan().any(2)).sum(0))
    assert counts[:3].min() > 0
