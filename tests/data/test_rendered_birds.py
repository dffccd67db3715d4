"""`RenderedBirds` as a datamodule: what batches hold, what each option changes, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbm_lightning.backbones.base import Backbone, ImageStats
from cbm_lightning.configurable import build
from cbm_lightning.data.birds.attributes import ATTRIBUTES, EVENTS, Part
from cbm_lightning.data.rendered_birds import RenderedBirds
from cbm_lightning.types import FeatureDims, Features


def birds(number: int = 24, **options: Any) -> RenderedBirds:
    data = RenderedBirds(**{"num_train": number, "num_val": 8, "num_test": number, "batch_size": number, **options})
    data.setup()
    return data


def rows(data: RenderedBirds, split: str) -> dict[str, Any]:
    """A whole split as one batch, in order."""
    dataset = data.splits[split]
    return dataset.__getitems__(list(range(len(dataset))))


def annotated(split: str = "train", number: int = 4000, **options: Any) -> Tensor:
    return RenderedBirds(num_train=number, num_val=number, num_test=number, **options).annotations(split)[0]


def test_default_batch() -> None:
    data = birds()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "concepts", "group", "index"}
    assert batch["image"].shape == (24, 3, 64, 64)
    assert batch["image"].dtype == batch["concepts"].dtype == torch.float32
    assert 0 <= batch["image"].min() < 0.2
    assert 0.8 < batch["image"].max() <= 1
    assert batch["concepts"].shape == (24, 25)
    assert batch["concepts"].unique().tolist() == [0, 1]
    assert batch["label"].dtype == torch.int64
    assert torch.equal(batch["group"] // 2, batch["label"])
    assert sorted(batch["index"].tolist()) == list(range(24))
    assert set(data.splits["train"][3]) == set(batch)


def test_concept_set_has_ten_groups_and_25_concepts() -> None:
    concepts = RenderedBirds().concept_set
    assert len(concepts) == 25
    assert [len(members) for members in concepts.groups.values()] == [4, 4, 4, 3, 3, 3, 1, 1, 1, 1]
    assert concepts.index("body colour: red") == 0
    assert concepts.prompts()[concepts.index("beak: hooked")] == "a bird with a hooked beak"
    assert set(concepts.kinds) == {"binary"}
    categorical = RenderedBirds(kind="categorical").concept_set
    assert [len(group) for group in categorical.categorical_groups()] == [4, 4, 4, 3, 3, 3]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_annotations_are_those_of_the_batches(split: str) -> None:
    data = birds(swap_test=0.5, concept_missing=0.3, annotator_noise=[0.2])
    concepts, labels = data.annotations(split)
    batch = rows(data, split)
    torch.testing.assert_close(concepts, batch["concepts"], equal_nan=True)
    assert torch.equal(labels, batch["label"])


def test_images_depend_on_seed_split_and_index_but_not_on_number() -> None:
    hard = {
        "ambiguity": 0.5,
        "hide_part": 0.5,
        "masks": True,
        "style": {"noise": 0.1},
        "style_splits": ["train", "test"],
    }
    few, many, other = birds(8, **hard), birds(150, **hard), birds(8, seed=1, **hard)
    for name, value in rows(few, "train").items():
        assert torch.equal(value, rows(many, "train")[name][:8]), name
    assert not torch.equal(rows(few, "train")["image"], rows(other, "train")["image"])
    assert not torch.equal(rows(few, "train")["image"], rows(few, "test")["image"])
    before = torch.random.get_rng_state()
    birds(8, **hard)
    assert torch.equal(before, torch.random.get_rng_state())


def test_rule_seed_makes_other_species_of_the_same_look() -> None:
    one, two = RenderedBirds(num_train=4), RenderedBirds(num_train=4, rule_seed=1)
    assert one.class_descriptions != two.class_descriptions
    assert one.concept_set == two.concept_set


def test_ceiling_is_near_the_measured_one_and_is_reached_by_the_exact_posterior() -> None:
    data = RenderedBirds(num_train=0, num_val=0, num_test=20_000)
    ceiling = data.bayes_accuracy()
    assert 0.99 < ceiling < 0.999
    concepts, labels = data.annotations("test")
    assert _naive_bayes(data, concepts, 0.1) == pytest.approx(ceiling, abs=0.003)
    kept = RenderedBirds(num_train=0, num_val=0, num_test=20_000, kept_groups=["body colour", "crest", "legs"])
    assert kept.bayes_accuracy() == pytest.approx(data.bayes_accuracy(kept.concept_set.names))
    assert 0.3 < kept.bayes_accuracy() < 0.9
    assert data.bayes_accuracy([]) == pytest.approx(1 / 12)
    assert data.bayes_accuracy(data.concept_set.names[:7]) < data.bayes_accuracy(data.concept_set.names[:12]) < ceiling
    assert labels.bincount(minlength=12).min() > 1500


def _naive_bayes(data: RenderedBirds, concepts: Tensor, variation: float) -> float:
    """Accuracy of the likeliest class, by the law as the documentation states it and written anew."""
    book = RenderedBirds(num_train=2000, within_class_variation=0.0)
    prototypes, labels = book.annotations("train")
    members = data.concept_set.group_indices().values()
    score = torch.zeros(len(concepts), data.num_classes)
    for label in range(data.num_classes):
        own = prototypes[labels == label][0]
        for group in members:
            values = max(2, len(group))
            same = (concepts[:, group] == own[group]).all(1)
            score[:, label] += torch.where(same, 1 - variation + variation / values, variation / values).log()
    truth = data.annotations("test")[1]
    return float((score.argmax(1) == truth).double().mean())


def test_ceiling_counts_the_background_where_it_is_a_concept() -> None:
    data = RenderedBirds(background_match_train=0.9, background_match_test=0.25, kept_groups=["legs", "background"])
    assert data.bayes_accuracy(split="train") > data.bayes_accuracy(split="test") + 0.05
    assert data.bayes_accuracy(split="test") == pytest.approx(data.bayes_accuracy(["legs: long"]))
    assert RenderedBirds(background_match_train=1.0).bayes_accuracy(["background: sky"], "train") == pytest.approx(
        2 / 12
    )


def test_masks_are_the_pixels_of_the_parts_of_concepts_that_hold() -> None:
    data = birds(60, masks=True, details=True, occlusion=0.5, kept_groups=[g.name for g in ATTRIBUTES] + ["background"])
    batch = rows(data, "test")
    masks, parts, concepts = batch["concept_masks"], batch["part_map"], batch["concepts"]
    assert masks.shape == (60, 29, 64, 64)
    assert masks.dtype == torch.bool
    assert not masks[concepts == 0].any()
    for k, name in enumerate(data.concept_set):
        expected = data.concept_parts[k][parts.long()] & (concepts[:, k] == 1)[:, None, None]
        assert torch.equal(masks[:, k], expected), name
    assert torch.equal(masks[:, 25:].any(1), parts == Part.BACKGROUND)
    assert not (masks.any(1) & (parts == Part.OCCLUDER)).any()
    assert masks.sum(1).max() == 1
    shown = (concepts == 1) & batch["visible"]
    assert (masks.flatten(2).sum(2)[shown] > 0).float().mean() > 0.99


def test_pixels_follow_the_backbone_in_training() -> None:
    class Stub(Backbone):
        def __init__(self, grey: float) -> None:
            super().__init__()
            self.dims = FeatureDims(1)
            self.grey = grey

        def encode(self, x: Tensor) -> Features:
            return Features(x)

        def image_stats(self) -> ImageStats:
            return ImageStats((self.grey,) * 3, (0.5, 0.25, 1.0))

    data = birds()
    plain = rows(data, "train")["image"]
    model = nn.Module()
    data.trainer = SimpleNamespace(lightning_module=model)
    for grey in (0.5, 0.2):
        model.backbone = Stub(grey)
        data.setup("fit")
        expected = (plain - grey) / torch.tensor([0.5, 0.25, 1.0])[:, None, None]
        torch.testing.assert_close(rows(data, "train")["image"], expected)


def test_splits_are_drawn_once() -> None:
    data = RenderedBirds(num_train=4, num_val=4, num_test=4)
    data.setup("fit")
    train = data.splits["train"]
    assert set(data.splits) == {"train", "val"}
    data.setup()
    assert data.splits["train"] is train
    assert set(data.splits) == {"train", "val", "test"}


def test_class_labels_are_the_typical_values_in_every_split() -> None:
    data = RenderedBirds(num_train=500, num_test=500, concept_labels="class", within_class_variation=0.4)
    for split in ("train", "test"):
        concepts, labels = data.annotations(split)
        for label in range(12):
            assert (concepts[labels == label] == concepts[labels == label][0]).all()
    words = data.class_descriptions[int(labels[0])]
    named = [
        name.split(": ") for name, on in zip(data.concept_set, concepts[0], strict=True) if on and "colour" in name
    ]
    assert all(f"{value} {group.split()[0]}" in words for group, value in named)


def test_annotators_err_at_their_rates_and_outvote_one_another() -> None:
    truth = annotated()
    groups = RenderedBirds().concept_set.group_indices()

    def wrong(rates: list[float]) -> Tensor:
        noisy = annotated(annotator_noise=rates)
        return torch.stack([(noisy[:, g] != truth[:, g]).any(1).double().mean() for g in groups.values()])

    torch.testing.assert_close(wrong([0.2]), torch.full((10,), 0.2).double(), atol=0.025, rtol=0)
    assert wrong([0.2] * 5).max() < 0.08
    torch.testing.assert_close(wrong([0.1, 0.4]), torch.full((10,), 0.1).double(), atol=0.02, rtol=0)
    assert wrong([0.0, 0.0, 0.5]).max() == 0
    assert torch.equal(annotated("test", annotator_noise=[0.5]), annotated("test"))


def test_certainty_is_the_share_of_annotators_who_agree() -> None:
    batch = rows(birds(300, annotator_noise=[0.0, 0.0, 0.3]), "train")
    certainty = batch["certainty"]
    assert set(certainty.mul(3).round().unique().tolist()) == {2.0, 3.0}
    legs = certainty[:, 21]
    assert (legs < 0.9).double().mean() == pytest.approx(0.3, abs=0.08)
    assert "certainty" not in rows(birds(4, annotator_noise=[0.3]), "test")


def test_missing_annotations_are_nan_in_training_only() -> None:
    whole = annotated(concept_missing=0.3).isnan()
    assert (whole.all(1) == whole.any(1)).all()
    assert whole.double().mean() == pytest.approx(0.3, abs=0.03)
    single = annotated(concept_missing=0.3, missing_by="concept").isnan()
    assert single.double().mean() == pytest.approx(0.3, abs=0.01)
    assert single.any(1).double().mean() > 0.99
    for split in ("val", "test"):
        assert not annotated(split, concept_missing=0.3).isnan().any()


def test_ambiguous_concepts_are_voted_with_the_odds_of_the_blend() -> None:
    batch = rows(birds(1500, ambiguity=1.0, details=True, size=32), "train")
    soft, concepts = batch["soft_concepts"], batch["concepts"]
    split = (soft > 0) & (soft < 1)
    assert 1 <= split.sum(1).double().mean() <= 2
    assert torch.equal(soft[~split], concepts[~split])
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = split & (soft >= low) & (soft < low + 0.25)
        assert concepts[inside].mean() == pytest.approx(float(soft[inside].mean()), abs=0.08)


def test_swap_changes_one_group_and_names_what_came_and_went() -> None:
    options = {"within_class_variation": 0.0, "details": True, "size": 32}
    plain, swapped = birds(150, **options), birds(150, swap_test=1.0, **options)
    before, after = rows(plain, "test"), rows(swapped, "test")
    assert torch.equal(before["label"], after["label"])
    assert (before["swapped_group"] == -1).all()
    for was, now, group, added, removed in zip(
        before["concepts"],
        after["concepts"],
        after["swapped_group"],
        after["added_concept"],
        after["removed_concept"],
        strict=True,
    ):
        changed = (was != now).nonzero()[:, 0].tolist()
        members = swapped.concept_set.group_indices()[swapped.groups[int(group)].name]
        assert changed == sorted({int(added), int(removed)} - {-1})
        assert set(changed) <= set(members)
        assert added < 0 or (now[added] == 1 and was[added] == 0)
        assert removed < 0 or (now[removed] == 0 and was[removed] == 1)
    assert torch.equal(rows(plain, "train")["image"], rows(swapped, "train")["image"])


def test_backgrounds_and_their_groups() -> None:
    data = birds(600, size=32, background_match_train=0.9, background_match_test=0.0, details=True)
    train, test = rows(data, "train"), rows(data, "test")
    assert (train["group"] % 2).double().mean() == pytest.approx(0.9, abs=0.04)
    assert (test["group"] % 2).sum() == 0
    for label in range(12):
        own = train["background"][(train["label"] == label) & (train["group"] % 2 == 1)]
        assert len(own.unique()) == 1
        assert not (test["background"][test["label"] == label] == own[0]).any()


def test_held_out_combinations_are_tested_only() -> None:
    held = [{"body colour": "red", "beak": "long"}, {"crest": "present", "wing bar": "present", "eye ring": "absent"}]
    for rule in ("codebook", "linear"):
        data = RenderedBirds(500, 500, 500, rule=rule, held_out=held, within_class_variation=0.4, held_out_test=0.8)
        names = data.concept_set
        for split, low, high in (("train", 0, 0), ("val", 0, 0), ("test", 0.75, 0.95)):
            c = data.annotations(split)[0]
            first = (c[:, names.index("body colour: red")] == 1) & (c[:, names.index("beak: long")] == 1)
            second = (c[:, -3] == 1) & (c[:, -2] == 1) & (c[:, -1] == 0)
            assert low <= (first | second).double().mean() <= high


def test_nuisances_become_concepts_on_request() -> None:
    data = birds(200, size=32, kept_groups=["occluder", "legs", "background"], details=True, masks=True, occlusion=0.4)
    assert list(data.concept_set) == [
        "legs: long",
        *(f"background: {b}" for b in ("sky", "forest", "water", "sand")),
        "occluder: present",
    ]
    batch = rows(data, "train")
    assert torch.equal(batch["concepts"][:, 1:5].argmax(1), batch["background"])
    leaf = (batch["part_map"] == Part.OCCLUDER).flatten(1).any(1)
    assert torch.equal(batch["concepts"][:, 5] == 1, leaf)
    assert batch["concepts"][:, 5].mean() == pytest.approx(0.4, abs=0.1)


def test_style_shifts_the_splits_that_it_names() -> None:
    plain = birds(6, details=True)
    for splits, shifted in ((None, {"test"}), (["train"], {"train"}), ([], set())):
        data = birds(6, details=True, style={"hue": 0.6, "scale": 0.8}, style_splits=splits)
        for split in ("train", "val", "test"):
            same = torch.equal(rows(plain, split)["image"], rows(data, split)["image"])
            assert same == (split not in shifted)
            assert (rows(data, split)["domain"] == int(split in shifted)).all()
            assert torch.equal(rows(plain, split)["concepts"], rows(data, split)["concepts"])


def test_clips_begin_with_the_still_and_have_events() -> None:
    data = birds(30, frames=5, masks=True, details=True, size=32)
    batch = rows(data, "train")
    assert batch["video"].shape == (30, 5, 3, 32, 32)
    assert batch["video_masks"].shape == (30, 5, 28, 32, 32)
    assert batch["video_part_map"].shape == (30, 5, 32, 32)
    assert torch.equal(batch["image"], batch["video"][:, 0])
    assert torch.equal(batch["image"], rows(birds(30, size=32), "train")["image"])
    assert list(data.concept_set)[25:] == [f"{event.name}: present" for event in EVENTS]
    frames, concepts = batch["frame_concepts"], batch["concepts"]
    assert torch.equal(frames[:, :, :25], concepts[:, None, :25].expand(-1, 5, -1))
    assert torch.equal(frames[:, :, 25:].amax(1), concepts[:, 25:])
    assert not frames[:, 0, 25:].any()
    flapping = batch["video_masks"][:, :, 25].flatten(2).any(2)
    assert not flapping[frames[:, :, 25] == 0].any()
    leaf = (batch["video_part_map"] == Part.PASSER).flatten(2).any(2)
    assert torch.equal(leaf, frames[:, :, 27] == 1)
    assert data.bayes_accuracy() > RenderedBirds().bayes_accuracy()


def test_captions_are_true() -> None:
    data = birds(80, captions=True, size=32)
    batch = rows(data, "train")
    assert len(batch["caption"]) == 80
    for text, concepts in zip(batch["caption"], batch["concepts"], strict=True):
        for name, holds in zip(data.concept_set, concepts, strict=True):
            group, value = name.split(": ")
            if group.endswith("colour"):
                assert holds or f"a {value} {group.split()[0]}" not in text
            if value == "present":
                assert holds or not re.search(f"an? {group}", text)
    assert isinstance(data.splits["train"][0]["caption"], str)


def test_descriptions_tell_classes_apart() -> None:
    data = RenderedBirds()
    assert data.class_names[0] == "species 1"
    assert len(set(data.class_descriptions)) == data.num_classes == 12
    assert [list(parts) for parts in data.part_descriptions] == [[group.name for group in ATTRIBUTES]] * 12
    assert all(
        words in text
        for parts, text in zip(data.part_descriptions, data.class_descriptions, strict=True)
        for words in parts.values()
    )


def test_made_again_from_its_spec_and_pickled() -> None:
    data = RenderedBirds(
        6, 2, 2, size=32, held_out=[{"beak": "long", "tail": "fan"}], style={"hue": 0.2}, captions=True
    )
    again = build(json.loads(json.dumps(data.spec())))
    for made in (again, pickle.loads(pickle.dumps(data))):
        made.setup()
        data.setup()
        assert torch.equal(rows(made, "test")["image"], rows(data, "test")["image"])


def test_worker_processes_give_the_same_batches() -> None:
    options = {"size": 32, "masks": True, "captions": True, "batch_size": 8}
    one, two = (next(iter(birds(16, num_workers=n, **options).test_dataloader())) for n in (0, 1))
    assert torch.equal(one["image"], two["image"])
    assert one["caption"] == two["caption"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_val": -1}, "num_val: expected at least 0"),
        ({"size": 16}, "size: expected at least 32"),
        ({"frames": 0}, "frames"),
        ({"rule": "lookup"}, "rule"),
        ({"num_classes": 1}, "num_classes"),
        ({"within_class_variation": 2.0}, "within_class_variation"),
        ({"occlusion": -0.1}, r"occlusion: expected a share or probability in \[0, 1\], got -0.1"),
        ({"hide_part": 1.1}, "hide_part"),
        ({"ambiguity": 7.0}, "ambiguity"),
        ({"background_match_train": 1.2}, "background_match_train"),
        ({"background_match_test": -1.0}, "background_match_test"),
        ({"swap_test": 3.0}, "swap_test"),
        ({"held_out_test": 3.0}, "held_out_test"),
        ({"held_out": [{"beek": "long"}]}, r"held_out: no group is called 'beek'; did you mean \['beak'\]"),
        ({"held_out": [{"beak": "blunt"}]}, "held_out: 'beak' has the values"),
        ({"held_out": [{}]}, "held_out"),
        ({"concept_labels": "majority"}, "concept_labels"),
        ({"annotator_noise": []}, "annotator_noise"),
        ({"annotator_noise": [0.1, 1.5]}, "annotator_noise"),
        ({"concept_missing": 1.5}, "concept_missing"),
        ({"missing_by": "row"}, "missing_by"),
        ({"kept_groups": ["body color"]}, "did you mean"),
        ({"kept_groups": ["hop"]}, "kept_groups: no group is called 'hop'"),
        ({"kept_groups": []}, "kept_groups"),
        ({"kind": "real"}, "kind"),
        ({"style": {"sharpness": 1.0}}, "style"),
        ({"style_splits": ["dev"]}, "style_splits"),
        ({"group_correlation": 1.1}, "group_correlation"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RenderedBirds(**options)


def test_unknown_concepts_and_empty_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        RenderedBirds().bayes_accuracy(["body colour: rde"])
    with pytest.raises(ValueError, match="the val split of RenderedBirds is empty"):
        RenderedBirds(num_train=2, num_val=0).setup("fit")
