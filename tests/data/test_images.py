"""Image files: decoding, reproducible augmentation, transforms by backbone, geometry of points and masks, splits."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from cbm_lightning.backbones.base import Backbone, ImageStats
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import Draw
from cbm_lightning.data.images import (
    ImageDataModule,
    ImageDataset,
    plain_transform,
    probe_geometry,
    read_image,
    seeded,
    stratified_split,
)
from cbm_lightning.types import Features


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Six images of noise, 40 x 30 pixels."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(path)
    return paths


def noisy(image):
    """A transform that draws from all three global generators."""
    jitter = torch.rand(()) + random.random() + np.random.random()  # noqa: NPY002
    return plain_transform(8, train=True)(image) + jitter


def test_plain_transform_keeps_the_centre_in_0_1():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    image = plain_transform(10)(Image.fromarray(pixels))
    assert image.shape == (3, 10, 10)
    assert image.dtype == torch.float32
    assert (image == 1).all()
    normalised = plain_transform(10, stats=ImageStats((0.5,) * 3, (0.25,) * 3))(Image.fromarray(pixels))
    assert (normalised == 2).all()


def test_seeded_draws_by_key_and_restores_the_global_generators():
    def draws():
        return torch.rand(()).item(), random.random(), np.random.random()  # noqa: NPY002

    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    with seeded(1, 2, 3):
        first = draws()
    after = draws()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    assert draws() == after
    with seeded(1, 2, 3):
        assert draws() == first
    with seeded(1, 2, 4):
        assert all(a != b for a, b in zip(draws(), first, strict=True))


def test_augmentation_depends_on_seed_epoch_and_index_alone(files):
    data = ImageDataset(files, {"label": torch.arange(6)}, noisy, augmented=True, seed=5)
    expected = data[Draw(2, 7)]["image"]
    random.seed(1)
    assert torch.equal(data[Draw(2, 7)]["image"], expected)
    assert not torch.equal(data[Draw(2, 8)]["image"], expected)
    other = ImageDataset(files, {"label": torch.arange(6)}, noisy, augmented=True, seed=6)
    assert not torch.equal(other[Draw(2, 7)]["image"], expected)


def test_workers_make_the_same_images_as_the_main_process(files):
    data = ImageDataset(files, {"label": torch.arange(6)}, noisy, augmented=True)
    draws = [Draw(i, 1) for i in range(6)]
    alone = torch.stack([data[draw]["image"] for draw in draws])
    loader = DataLoader(data, batch_size=3, sampler=draws, num_workers=2)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([batch["image"] for batch in loader]), alone)


def test_damaged_image_is_named(files):
    files[1].write_bytes(files[1].read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cannot read the image .*1\.png"):
        read_image(files[1])


def test_rows_must_fit_the_images(files):
    with pytest.raises(ValueError, match=r"expected 6 rows, one an image, got .*5"):
        ImageDataset(files, {"label": torch.arange(5)}, noisy)


@pytest.mark.parametrize("flip", [False, True])
def test_probe_measures_scale_crop_flip_and_normalisation(flip):
    steps = [v2.Resize(64), v2.CenterCrop(64), *([v2.RandomHorizontalFlip(1.0)] if flip else [])]
    transform = v2.Compose(
        [*steps, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.2])]
    )
    geometry = probe_geometry(transform, (160, 128))
    assert geometry.size == (64, 64)
    assert geometry.scale == pytest.approx((-2 if flip else 2, 2), rel=0.01)
    # the crop begins 16 source pixels from the left; its first target pixel covers source pixels 16 and 17
    assert geometry.offset == pytest.approx((142.5 if flip else 16.5, 0.5), abs=0.3)


def test_probe_follows_timm_transforms_that_pad():
    from timm.data import create_transform

    transform = create_transform((3, 64, 64), is_training=False, crop_pct=1.0, crop_mode="border")
    geometry = probe_geometry(transform, (100, 50))
    assert geometry.scale == pytest.approx((100 / 64, 100 / 64), rel=0.02)
    centre = geometry.map_points(torch.tensor([[49.5, 24.5, 1.0], [49.5, 24.5, 0.0]]))
    assert centre[0].tolist() == pytest.approx([31.5, 31.5, 1], abs=0.5)
    assert centre[1].tolist() == [0, 0, 0]


def test_probe_refuses_what_points_cannot_follow():
    rotate = v2.Compose([v2.RandomRotation((40, 40)), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    with pytest.raises(ValueError, match="parts and masks cannot follow this transform"):
        probe_geometry(rotate, (50, 50))


def test_masks_and_points_move_with_the_image(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[20:40, 50:70] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(pixels[..., 0] // 255).save(tmp_path / "mask.png")
    points = torch.tensor([[[50.0, 20.0, 1.0], [5.0, 30.0, 1.0]]])
    data = ImageDataset(
        [tmp_path / "image.png"], {}, plain_transform(30), parts=points, masks=[[tmp_path / "mask.png", None]]
    )
    item = data[0]
    shown = item["image"][0] > 0.5
    assert item["concept_masks"].shape == (2, 30, 30)
    assert (item["concept_masks"][0].bool() != shown).float().mean() < 0.03
    assert item["concept_masks"][0].sum() == 100
    assert item["concept_masks"][1].isnan().all()
    corner = shown.nonzero().min(0).values.flip(0)
    assert item["parts"][0, :2].tolist() == pytest.approx(corner.tolist(), abs=0.6)
    assert item["parts"][1].tolist() == [0, 0, 0]  # cut off
    data.use(plain_transform(30, train=True), augmented=True)
    assert set(data[0]) == {"image", "index"}


def test_mask_of_another_size_is_named(files, tmp_path):
    Image.new("L", (5, 5)).save(tmp_path / "mask.png")
    data = ImageDataset(files[:1], {}, plain_transform(8), masks=[[tmp_path / "mask.png"]])
    with pytest.raises(ValueError, match=r"mask\.png is \(5, 5\) pixels and its image \(40, 30\)"):
        data[0]


class Noise(ImageDataModule):
    """Four images in training, one each in validation and test."""

    def __init__(self, paths: list[str], **options) -> None:
        super().__init__(**options)
        self.paths = [Path(path) for path in paths]

    @property
    def concept_set(self):
        return ConceptSet(["a"])

    @property
    def class_names(self):
        return ["x"]

    def make_split(self, name):
        paths = {"train": self.paths[:4], "val": self.paths[4:5], "test": self.paths[5:]}[name]
        tensors = {"label": torch.zeros(len(paths)).long(), "concepts": torch.full((len(paths), 1), 0.5)}
        return ImageDataset(paths, tensors, self.transform_of(name), augmented=self.is_augmented(name), seed=self.seed)


class Opinionated(Backbone):
    """A backbone with transforms of its own."""

    def encode(self, x):
        return Features(x.mean((2, 3)))

    def eval_transform(self):
        return plain_transform(12)

    def train_transform(self):
        return plain_transform(12, train=True)

    def image_stats(self):
        return ImageStats((0.5,) * 3, (0.5,) * 3)


def joined(data: Noise, backbone: Backbone) -> Noise:
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=SimpleNamespace(backbone=backbone), world_size=1, global_rank=0
    )
    return data


def test_transform_order_user_then_size_then_backbone_then_plain(files):
    paths = [str(path) for path in files]
    image = Image.open(files[0])
    assert Noise(paths).transform_of("val")(image).shape == (3, 224, 224)
    assert joined(Noise(paths), Opinionated()).transform_of("val")(image).shape == (3, 12, 12)
    sized = joined(Noise(paths, image_size=10), Opinionated()).transform_of("val")(image)
    assert sized.shape == (3, 10, 10)
    assert sized.min() < 0
    own = plain_transform(6)
    assert joined(Noise(paths, eval_transform=own), Opinionated()).transform_of("test") is own
    assert joined(Noise(paths, eval_transform=own), Opinionated()).transform_of("train") is own


def test_splits_made_before_training_follow_the_model_that_joins(files):
    data = Noise([str(path) for path in files])
    data.setup()
    before = data.splits["train"]
    joined(data, Opinionated()).setup("fit")
    assert data.splits["train"] is before
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 12, 12)


def test_loader_repeats_an_epoch_exactly_and_changes_with_it(files):
    def epoch(number):
        data = Noise([str(path) for path in files], image_size=9)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return next(iter(loader))["image"]

    assert torch.equal(epoch(3), epoch(3))
    assert not torch.equal(epoch(3).sum(0), epoch(4).sum(0))


def test_no_augmentation_when_features_are_computed_once(files):
    data = Noise([str(path) for path in files], image_size=9)
    data.encoder = Opinionated()
    data.setup("fit")
    assert not data.splits["train"].augmented
    assert torch.equal(data.splits["train"][Draw(0, 1)]["image"], data.splits["train"][Draw(0, 2)]["image"])


def test_annotations_need_no_image(files):
    data = Noise([str(path) for path in files])
    data.setup()
    for path in files:
        path.unlink()
    concepts, labels = data.annotations("train")
    assert concepts.tolist() == [[0.5]] * 4
    assert labels.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size: expected at least 1 pixel"),
        ({"image_size": 8, "eval_transform": noisy}, "image_size has no effect beside an eval_transform"),
        ({"augment": False, "train_transform": noisy}, "augment: false leaves train_transform without effect"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_contradicting_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Noise([], **options)


def test_split_takes_each_class_in_proportion_and_keeps_units_whole():
    labels = torch.arange(4).repeat_interleave(50)
    units = torch.arange(200) // 5
    rows = stratified_split(labels, {"val": 0.1, "test": 0.2}, seed=1, units=units)
    assert {name: len(chosen) for name, chosen in rows.items()} == {"val": 20, "test": 40, "train": 140}
    assert torch.cat(list(rows.values())).sort().values.tolist() == list(range(200))
    assert all(torch.bincount(labels[chosen]).unique().numel() == 1 for chosen in rows.values())
    owners = [set(units[chosen].tolist()) for chosen in rows.values()]
    assert len(set.union(*owners)) == sum(map(len, owners))
    again = stratified_split(labels, {"val": 0.1, "test": 0.2}, seed=1, units=units)
    assert all(torch.equal(rows[name], again[name]) for name in rows)
    other = stratified_split(labels, {"val": 0.1, "test": 0.2}, seed=2, units=units)
    assert not torch.equal(rows["test"], other["test"])


def test_split_gives_small_classes_one_row_everywhere():
    rows = stratified_split(torch.tensor([0, 0, 0, 1]), {"val": 0.1, "test": 0.1}, seed=0)
    assert {name: len(chosen) for name, chosen in rows.items()} == {"val": 1, "test": 1, "train": 2}
    assert 3 in rows["train"]


@pytest.mark.parametrize("fractions", [{"val": -0.1}, {"val": 0.5, "test": 0.5}])
def test_split_refuses_fractions_that_leave_nothing(fractions):
    with pytest.raises(ValueError, match="split fractions: expected each in"):
        stratified_split(torch.zeros(4).long(), fractions, seed=0)
