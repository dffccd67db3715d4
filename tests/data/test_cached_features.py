"""Features computed once: the same as the backbone's, made again only when something they depend on changes."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from torch.utils.data import TensorDataset as TupleDataset
from torchmetrics import MeanMetric

from cbm_lightning.backbones.base import Backbone, ImageStats
from cbm_lightning.backbones.identity import Identity
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.data.cached_features import CachedFeatures
from cbm_lightning.types import FeatureDims, Features

SIZES = {"train": 21, "val": 10, "test": 7}


class Cells(Backbone):
    """A convolution whose cells are the tokens; counts the images that it sees."""

    def __init__(self, width: int = 5, seed: int = 0, frozen: bool = True) -> None:
        super().__init__(frozen=frozen)
        self.convolution = nn.Conv2d(3, width, 4, 4)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.convolution.weight.normal_(generator=generator)
            self.convolution.bias.normal_(generator=generator)
        self.dims = FeatureDims(width, width, (2, 2))
        self.seen = 0
        self.freeze()

    def encode(self, x):
        self.seen += len(x)
        tokens = self.convolution(x).flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, grid=(2, 2))

    def image_stats(self):
        return ImageStats((0.5,) * 3, (0.25,) * 3)


class Noise(ConceptDataModule):
    """Images of noise, normalised as the backbone wants; flipped at random in training if they are augmented."""

    def __init__(self, shift: float = 0.0, augment: bool = True, stubborn: bool = False, batch_size: int = 4) -> None:
        super().__init__(batch_size=batch_size)
        self.shift, self.augment, self.stubborn = shift, augment, stubborn
        self.kept_files = []

    concept_set = ConceptSet(["red", "round"])
    class_names: ClassVar = ["a", "b", "c"]
    ceiling = 0.9

    def files(self):
        return self.kept_files

    def make_split(self, name):
        n = SIZES[name]
        generator = torch.Generator().manual_seed(n)
        tensors = {
            "image": torch.rand(n, 3, 8, 8, generator=generator) + self.shift,
            "concepts": torch.rand(n, 2, generator=generator),
            "label": torch.arange(n) % 3,
            "certainty": torch.rand(n, 2, generator=generator),
            "concept_masks": torch.rand(n, 2, 8, 8, generator=generator) > 0.5,
        }
        augmented = name == "train" and self.augment and (self.stubborn or self.encoder is None)
        return Pictures(tensors, self.backbone().image_stats(), augmented)

    def annotations(self, split):
        tensors = self.splits[split].tensors
        return tensors["concepts"], tensors["label"]


class Pictures(TensorDataset):
    def __init__(self, tensors, stats, augmented):
        super().__init__(tensors)
        self.stats, self.augmented = stats, augmented

    def __getitems__(self, indices):
        batch = super().__getitems__(indices)
        batch["image"] = (batch["image"] - self.stats.mean[0]) / self.stats.std[0]
        if self.augmented:
            flipped = torch.tensor([(index + getattr(index, "epoch", 0)) % 2 == 0 for index in indices])
            batch["image"] = torch.where(flipped[:, None, None, None], batch["image"].flip(3), batch["image"])
        return batch


@pytest.fixture
def cached(tmp_path):
    def make(data=None, backbone=None, **options):
        made = CachedFeatures(data or Noise(), backbone or Cells(), cache_dir=str(tmp_path / "cache"), **options)
        made.setup()
        return made

    return make


def features(data, name):
    return data.make_split(name).tensors["embedding"]


def expected(name, shift=0.0, backbone=None):
    data = Noise(shift)
    data.encoder = backbone or Cells()
    data.setup()
    return data.encoder(data.splits[name].__getitems__(list(range(SIZES[name])))["image"])


@pytest.mark.parametrize("name", SIZES)
def test_features_are_those_of_the_backbone_in_evaluation(cached, name):
    data = cached(tokens=True)
    found = data.make_split(name).tensors
    assert torch.allclose(found["embedding"], expected(name).pooled, atol=1e-6)
    assert torch.allclose(found["tokens"], expected(name).tokens, atol=1e-6)
    assert set(found) == {"embedding", "tokens", "concepts", "label", "certainty", "concept_masks"}
    concepts, labels = data.annotations(name)
    assert torch.equal(found["concepts"], concepts)
    assert torch.equal(found["label"], labels)


def test_pooled_features_come_without_pixels(cached):
    batch = next(iter(cached().val_dataloader()))
    assert set(batch) == {"embedding", "concepts", "label", "certainty", "index"}
    assert batch["embedding"].shape == (10, 5)


def test_each_sample_is_encoded_once_over_epochs_and_runs(cached, tmp_path):
    backbone = Cells()
    data = cached(backbone=backbone)
    for _ in range(2):
        assert sum(len(batch["label"]) for batch in data.train_dataloader()) == 21
    assert backbone.seen == 21
    again = Cells()
    list(cached(Noise(batch_size=7), again, batch_size=3).train_dataloader())
    assert again.seen == 0
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize(
    ("data", "backbone", "options"),
    [
        (Noise(), Cells(seed=1), {}),
        (Noise(), Cells(width=6), {}),
        (Noise(shift=0.1), Cells(), {}),
        (Noise(), Cells(), {"dtype": "float16"}),
        (Noise(), Cells(), {"tokens": True}),
    ],
)
def test_whatever_changes_features_changes_the_file(cached, tmp_path, data, backbone, options):
    features(cached(), "val")
    shift = data.shift
    found = features(cached(data, backbone, **options), "val")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert torch.allclose(found.float(), expected("val", shift, backbone).pooled, atol=1e-2)


def test_a_changed_file_of_the_data_is_noticed(cached, tmp_path):
    data = Noise()
    data.kept_files = [tmp_path / "table.csv"]
    for moment in (1, 1, 2):
        data.kept_files[0].write_text("same size")
        os.utime(data.kept_files[0], (moment, moment))
        features(cached(data), "val")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:-2] + b"\x01\x01", lambda b: b"", lambda b: b[:30]])
def test_a_corrupt_file_is_made_again(cached, tmp_path, damage):
    before = features(cached(), "val").clone()
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match="encoding again"):
        found = features(cached(), "val")
    assert torch.equal(found, before)
    assert path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features(cached(), "val")


def test_an_interrupted_encoding_leaves_nothing(cached, tmp_path):
    class Tired(Cells):
        def encode(self, x):
            if self.seen > 5:
                raise KeyboardInterrupt
            return super().encode(x)

    with pytest.raises(KeyboardInterrupt):
        features(cached(backbone=Tired()), "val")
    assert list((tmp_path / "cache").iterdir()) == []


def test_half_precision_is_given_as_single(cached):
    batch = next(iter(cached(dtype="float16", tokens=True).val_dataloader()))
    assert batch["embedding"].dtype == batch["tokens"].dtype == torch.float32
    assert torch.allclose(batch["embedding"], expected("val").pooled, rtol=1e-3, atol=1e-3)


def test_it_knows_what_the_wrapped_datamodule_knows(cached):
    data = cached()
    assert data.concept_set is Noise.concept_set
    assert (data.class_names, data.num_classes, data.ceiling, data.feature_dim) == (["a", "b", "c"], 3, 0.9, 5)
    with pytest.raises(AttributeError, match="'Noise' object has no attribute 'colour'"):
        _ = data.colour
    spec = data.spec()["init_args"]
    assert spec["data"]["class_path"].endswith("Noise")
    assert spec["backbone"]["init_args"] == {"width": 5, "seed": 0, "frozen": True}


def test_global_random_numbers_and_training_mode_are_untouched(cached):
    backbone = Cells(frozen=False).train()
    data = cached(backbone=backbone)
    state = torch.get_rng_state()
    found = features(data, "train")
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training
    assert not found.requires_grad


class Model(LightningModule):
    """Reads features from the batch, or from its backbone where there are none."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(5, 3)
        self.loss = MeanMetric()
        self.names = []

    def forward(self, batch):
        pooled = batch["embedding"] if "embedding" in batch else self.backbone(batch["image"]).pooled
        self.names.append(tuple(batch))
        return self.head(pooled)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch), batch["label"])

    def validation_step(self, batch, _):
        # a metric, because the mean that self.log takes over processes is wrong for uneven batches under gloo
        self.loss.update(nn.functional.cross_entropy(self(batch), batch["label"], reduction="none"))
        self.log("loss", self.loss)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), 0.1)


def trainer(**options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", **{"devices": 1} | quiet | options)


def expected_of_lightning(test):
    """Lightning suggests more workers, and remarks that a frozen backbone is in evaluation mode."""
    for message in ("does not have many workers", "in eval mode at the start of training"):
        test = pytest.mark.filterwarnings(f"ignore:.*{message}:UserWarning")(test)
    return test


@expected_of_lightning
def test_the_same_model_works_on_images_afterwards(tmp_path):
    model = Model(Cells())
    trainer(max_epochs=2).fit(model, CachedFeatures(Noise(), cache_dir=str(tmp_path)))
    assert model.backbone.seen == 31
    assert all("image" not in names for names in model.names)
    on_features = trainer().test(model, CachedFeatures(Noise(), cache_dir=str(tmp_path)), verbose=False)
    on_images = trainer().test(model, Noise(), verbose=False)
    assert on_features[0]["loss"] == pytest.approx(on_images[0]["loss"], abs=1e-6)


@expected_of_lightning
def test_features_are_those_of_the_restored_weights(tmp_path):
    first = trainer(max_epochs=1)
    first.fit(Model(Cells(seed=1)), CachedFeatures(Noise(), cache_dir=str(tmp_path / "a")))
    first.save_checkpoint(tmp_path / "model.ckpt")
    data = CachedFeatures(Noise(), cache_dir=str(tmp_path / "b"))
    trainer().test(Model(Cells(seed=2)), data, ckpt_path=tmp_path / "model.ckpt", weights_only=True, verbose=False)
    assert torch.allclose(
        data.splits["test"].tensors["embedding"], expected("test", backbone=Cells(seed=1)).pooled, atol=1e-6
    )


class Counting(Cells):
    """Leaves a file for each image batch that any process encodes."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def encode(self, x):
        (self.folder / f"{os.getpid()}-{self.seen}").touch()
        return super().encode(x)


@expected_of_lightning
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_of_two_processes_one_encodes_and_both_read(tmp_path):
    (tmp_path / "seen").mkdir()
    data = CachedFeatures(Noise(), Counting(tmp_path / "seen"), cache_dir=str(tmp_path / "cache"))
    model = Model(Cells())
    together = trainer(devices=2, strategy="ddp_fork").test(model, data, verbose=False)
    assert len({path.name.split("-")[0] for path in (tmp_path / "seen").iterdir()}) == 1
    alone = trainer().test(model, Noise(), verbose=False)
    assert together[0]["loss"] == pytest.approx(alone[0]["loss"], abs=1e-6)


@expected_of_lightning
def test_another_model_gets_features_of_its_own(tmp_path):
    data = CachedFeatures(Noise(), cache_dir=str(tmp_path))
    for seed in (0, 1):
        trainer().test(Model(Cells(seed=seed)), data, verbose=False)
        found = data.splits["test"].tensors["embedding"]
        assert torch.allclose(found, expected("test", backbone=Cells(seed=seed)).pooled, atol=1e-6)


def test_padding_of_tokens_is_kept(cached):
    class Padded(Cells):
        def encode(self, x):
            features = super().encode(x)
            return replace(features, mask=torch.arange(4).expand(len(x), 4) < 3)

    batch = next(iter(cached(backbone=Padded(), tokens=True).val_dataloader()))
    assert batch["token_mask"].tolist() == [[True, True, True, False]] * 10


@expected_of_lightning
def test_a_model_that_reads_batches_its_own_way_is_heard(tmp_path):
    class Reader(Model):
        def read_batch(self, batch):
            return {"image": batch[0]["pixels"], "label": batch[1]}

    class Nested(Noisy):
        def __getitem__(self, index):
            return {"pixels": self.images[index]}, index % 3

    foreign = Foreign(torch.rand(8, 3, 8, 8))
    foreign.dataset = Nested(foreign.dataset.tensors[0])
    data = CachedFeatures(foreign, cache_dir=str(tmp_path))
    trainer().test(Reader(Cells()), data, verbose=False)
    assert torch.allclose(data.splits["test"].tensors["embedding"], Cells()(foreign.dataset.images).pooled, atol=1e-6)


@expected_of_lightning
def test_a_trained_backbone_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Cells is trained.*frozen=True"):
        trainer(max_epochs=1).fit(
            Model(Cells(frozen=False)), CachedFeatures(Noise(), cache_dir=str(tmp_path / "cache"))
        )
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_encoded_is_said(cached, tmp_path):
    with pytest.raises(ValueError, match="CachedFeatures found none"):
        CachedFeatures(Noise(), cache_dir=str(tmp_path)).setup()
    with pytest.raises(ValueError, match="dtype: expected"):
        CachedFeatures(Noise(), dtype="int8")
    with pytest.raises(ValueError, match="train split is augmented"):
        features(cached(Noise(stubborn=True)), "train")
    assert len(features(cached(Noise(stubborn=True, augment=False)), "train")) == 21
    overflowing = Cells()
    with torch.no_grad():
        overflowing.convolution.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"not finite in float16.*use dtype='float32'"):
        features(cached(backbone=overflowing, dtype="float16"), "val")
    flat = Cells()
    flat.dims = FeatureDims(5)
    with pytest.raises(ValueError, match="Cells has no tokens"):
        cached(backbone=flat, tokens=True)
    with pytest.raises(ValueError, match="found Identity, which encodes nothing"):
        trainer().test(Model(Identity(5)), CachedFeatures(Noise(), cache_dir=str(tmp_path)), verbose=False)
    flat.encode = lambda x: Features(x)
    with pytest.raises(ValueError, match=r"pooled vector of shape \[4, 3, 8, 8\]"):
        features(cached(backbone=flat), "val")


class Foreign(LightningDataModule):
    """Somebody's datamodule of tuples, without any of our attributes."""

    def __init__(self, images, *others, noisy=False):
        super().__init__()
        self.dataset = Noisy(images) if noisy else TupleDataset(images, *others)

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=4, shuffle=True)

    def val_dataloader(self):
        return [DataLoader(self.dataset), DataLoader(self.dataset)]

    def test_dataloader(self):
        return DataLoader(self.dataset)

    def predict_dataloader(self):
        return DataLoader(self.dataset, sampler=SubsetRandomSampler([0, 1]))


class Noisy(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index] + torch.rand(()), index


def test_a_foreign_datamodule_is_encoded_too(cached, tmp_path):
    images, concepts, labels = torch.rand(30, 3, 8, 8), torch.rand(30, 2), torch.arange(30) % 3
    data = cached(Foreign(images, concepts, labels))
    assert torch.allclose(features(data, "train"), Cells()(images).pooled, atol=1e-6)
    assert all(
        torch.equal(found, given) for found, given in zip(data.annotations("train"), (concepts, labels), strict=True)
    )
    assert sorted(torch.cat([batch["index"] for batch in data.train_dataloader()]).tolist()) == list(range(30))
    with pytest.raises(AttributeError, match="'Foreign' object has no attribute 'concept_set'"):
        _ = data.concept_set
    # a sample that is in no probe: every image counts, since nothing else says what the data is
    images[1] += 1
    assert torch.allclose(features(data, "train"), Cells()(images).pooled, atol=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_foreign_datamodule_that_cannot_be_encoded_is_told_why(cached):
    images = torch.rand(30, 3, 8, 8)
    with pytest.raises(ValueError, match="train split is augmented"):
        features(cached(Foreign(images, noisy=True)), "train")
    with pytest.raises(ValueError, match=r"has to be one DataLoader over all samples.*, got list"):
        features(cached(Foreign(images)), "val")
    with pytest.raises(ValueError, match=r"has to be one DataLoader over all samples.*Subset"):
        features(cached(Foreign(images)), "predict")
    with pytest.raises(TypeError, match=r"expected a batch \(x, y\)"):
        features(cached(Foreign(images)), "train")
    with pytest.raises(ValueError, match="test split is empty"):
        features(cached(Foreign(images[:0], torch.zeros(0))), "test")
    with pytest.raises(KeyError, match="hold no concepts"):
        cached(Foreign(images, torch.zeros(30))).annotations("train")
