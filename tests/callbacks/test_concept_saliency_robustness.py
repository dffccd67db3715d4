"""Concept saliency moves nothing, and works with models, batches and options of all kinds, or says what is wrong."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from recorder import same, states
from saliency.models import TinyViT, smooth_net
from torch import Tensor, nn
from toy import quiet_trainer
from toy_images import NAMES, ForeignImages, Rows, ToyConv, ToyImages, batch_of, toy_model

from cbm_lightning import CBMModule, ConceptSet, EmbeddingBottleneck, LinearBottleneck, SimilarityBottleneck
from cbm_lightning.callbacks import ConceptSaliency
from cbm_lightning.callbacks import concept_saliency as module
from cbm_lightning.data import CachedFeatures, PrecomputedFeatures
from cbm_lightning.saliency import SaliencyStudy, SmoothGrad
from cbm_lightning.saliency.measures import MEASURES
from cbm_lightning.types import ConceptOutput, Features, Prediction

EVERYTHING = {name: {"k": 9} if name == "top_k_intersection" else None for name in MEASURES}


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Files go to a folder of their own, and pictures into this list."""
    drawn: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "log_figure", lambda trainer, name, figure: drawn.append(figure))
    return drawn


def run(made: LightningModule, data: Any = None, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """What a test logs under short names, and the callback; without a picture unless one is asked for."""
    watcher = ConceptSaliency(**{"max_images": 0, **options})
    tester = quiet_trainer(callbacks=[watcher], **(trainer or {}))
    tester.test(made, ForeignImages() if data is None else data, verbose=False)
    logged = {name: float(value) for name, value in tester.callback_metrics.items() if "/saliency/" in name}
    return {name.removeprefix("test/saliency/"): value for name, value in logged.items()}, watcher


def refused(made: LightningModule, error: type[Exception], message: str, data: Any = None, **options: Any) -> None:
    """A fit fails before it trains."""
    trainer = quiet_trainer(callbacks=[ConceptSaliency(**options)], num_sanity_val_steps=1)
    with pytest.raises(error, match=message):
        trainer.fit(made, ForeignImages() if data is None else data)
    assert trainer.global_step == 0


def by_hand(made: CBMModule, **options: Any) -> dict[str, float]:
    study = SaliencyStudy(made, **options)
    study.update(batch_of(9, seed=2))
    return {name: float(value) for name, value in study.compute().scalars().items()}


# ---------------------------------------------------------------- nothing is moved


class Drawing(ToyConv):
    """Draws random numbers, in evaluation too."""

    def encode(self, x: Tensor) -> Features:
        random.random()
        np.random.rand()  # noqa: NPY002  the global state is what is looked at
        return super().encode(x + 1e-3 * torch.rand(len(x), 1, 1, 1))


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("backbone", [ToyConv, Drawing])
@pytest.mark.parametrize(
    "options",
    [{"method": "grad_cam"}, {"method": SmoothGrad(samples=2), "metrics": EVERYTHING, "max_samples": 1}],
    ids=["grad_cam", "everything"],
)
def test_training_is_the_same_with_and_without_it(backbone: Any, sanity: int, options: dict[str, Any]) -> None:
    ends = []
    for watchers in ([], [ConceptSaliency(max_images=1, **options)]):
        made = toy_model(LinearBottleneck("logits", randint=0.3), partial(backbone, dropout=0.4), lr=0.02)
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        trainer = quiet_trainer(max_epochs=2, callbacks=watchers, num_sanity_val_steps=sanity)
        trainer.fit(made, ToyImages(where="masks points"))
        drawn = (torch.rand(9).tolist(), random.random(), np.random.rand())  # noqa: NPY002
        ends.append((states(made), drawn))
        assert made.training
    (weights, drawn), (others, drawn_then) = ends
    assert same(weights, others)
    assert drawn == drawn_then


class Look(Callback):
    """Remembers the state of everything after a batch."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_validation_batch_end(self, trainer: Any, model: Any, *args: Any) -> None:
        flags = [part.training for part in model.modules()], [weight.requires_grad for weight in model.parameters()]
        grads = [None if weight.grad is None else float(weight.grad.sum()) for weight in model.parameters()]
        modes = (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        self.seen.append((flags, grads, modes, torch.get_rng_state().tolist(), states(model)))

    on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize("how", ["fit", "validate", "test"])
@pytest.mark.parametrize("method", ["exact", "gradient", "grad_cam"])
def test_it_leaves_modes_gradients_statistics_and_randomness(how: str, method: str) -> None:
    before, after = list[Any](), list[Any]()
    made = toy_model(backbone=ToyConv(freeze_norm=True))
    made.bottleneck.scores.bias.requires_grad_(False)
    watchers = [Look(before), ConceptSaliency(method, max_images=1), Look(after)]
    getattr(quiet_trainer(callbacks=watchers, num_sanity_val_steps=0), how)(made, ToyImages())
    assert len(before) == len(after) == 3
    inside = (how != "fit", False)
    for then, now in zip(before, after, strict=True):
        assert then[:4] == now[:4]
        assert now[2] == inside
        assert same(then[4], now[4])
    assert how == "fit" or all(weight.grad is None for weight in made.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in made.modules())


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("method", ["auto", "exact", "grad_cam", "gradient"])
def test_frozen_backbones(method: str) -> None:
    made, free = (toy_model(backbone=partial(ToyConv, frozen=frozen)) for frozen in (True, False))
    assert run(made, method=method)[0] == pytest.approx(run(free, method=method)[0], abs=1e-6)


def test_the_best_method_that_a_model_allows() -> None:
    for made, method in (
        (toy_model(), "exact"),
        (toy_model(EmbeddingBottleneck(3)), "grad_cam"),
        (toy_model(backbone=TinyViT("class")), "grad_cam"),
        (toy_model(backbone=TinyViT("mean")), "exact"),
        (toy_model(backbone=smooth_net()), "grad_cam"),
    ):
        found = run(made)[0]
        assert len(found) >= 4
        assert found == pytest.approx(by_hand(made, method=method), abs=1e-6)
    texts = ConceptSet(NAMES, embeddings=torch.randn(3, 8))
    assert run(toy_model(SimilarityBottleneck(), concepts=texts), method="grad_cam")[0]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("method", ["auto", "grad_cam", "integrated_gradients", "smooth_grad", "occlusion"])
def test_other_precisions(precision: str, method: str, pictures: list[Any]) -> None:
    options = {"method": method, "max_samples": 4}
    expected = run(toy_model(), **options)[0]
    found = run(toy_model(), trainer={"precision": precision}, max_images=1, **options)[0]
    assert len(pictures) == 1
    assert found["pixel_auroc"] == pytest.approx(expected["pixel_auroc"], abs=0.1)


class Unmapped(nn.Module):
    """Has no feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("shown", ["masks", "nothing", "a picture"])
@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("auto", "grad_cam: the backbone has no feature map .* Use a method that needs none, such as gradient"),
        ("exact", "exact maps need patch tokens on a grid, and this backbone returns none; .* such as grad_cam"),
        ("activation_mapping", "activation_mapping needs patch tokens on a grid, and this backbone returns none"),
        ("attention_rollout", "attention_rollout needs a vision transformer"),
    ],
    ids=["auto", "exact", "activation_mapping", "attention_rollout"],
)
def test_a_method_that_the_model_does_not_allow_fails_before_training(method: str, message: str, shown: str) -> None:
    """Also where the first image shows no concept, or only a picture is to be drawn."""
    empty = ForeignImages(change=lambda rows: rows | {"concept_masks": rows["concept_masks"] & False})
    data = {"masks": ForeignImages(), "nothing": empty, "a picture": ForeignImages("tuple")}[shown]
    options = {"method": method, "max_images": 6 if shown == "a picture" else 0}
    refused(toy_model(backbone=Unmapped()), ValueError, message, data, **options)
    assert run(toy_model(backbone=Unmapped()), method="gradient")[0]


class Scores(nn.Linear):
    """A bottleneck that knows of no other members."""

    def forward(self, features: Features) -> ConceptOutput:
        logits = super().forward(features.pooled)
        return ConceptOutput(features, logits, logits.sigmoid(), logits)


class Own(LightningModule):
    """A user's model with the members that saliency needs, and no more."""

    concept_set = ConceptSet(NAMES)

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.bottleneck, self.top = smooth_net(), Scores(12, 3), nn.Linear(3, 3)

    def encode(self, batch: Any) -> Features:
        return Features(self.backbone(batch["image"]))

    def forward(self, batch: Any) -> Prediction:
        output = self.bottleneck(self.encode(batch))
        return Prediction(self.top(output.values), output)

    def read_batch(self, batch: Any) -> Any:
        return batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).logits.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def test_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_users_own_module(pictures: list[Any]) -> None:
    torch.manual_seed(0)
    made = Own()
    assert run(made, max_images=2)[0] == pytest.approx(by_hand(made), abs=1e-6)
    names = ["deletion", "average_drop", "randomisation", "pixel_ap"]
    assert {name for name in run(made, metrics=names)[0] if "chance" not in name} == set(names)
    trainer = quiet_trainer(callbacks=[ConceptSaliency(max_images=2)])
    trainer.fit(made, ForeignImages())
    assert "val/saliency/energy_in_mask" in trainer.callback_metrics
    assert len(pictures) == 2
    refused(made, ValueError, "concept_existence needs a head with exact contributions", metrics=["concept_existence"])


def test_modules_that_lack_something() -> None:
    refused(BoringModel(), TypeError, "BoringModel has no ")

    class Unread(Own):
        read_batch = property()  # type: ignore[assignment]  as if it were not there

    refused(Unread(), TypeError, "Unread has no .*read_batch")

    class Bare(Own):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch).logits

    refused(Bare(), TypeError, r"Bare returned Tensor; .* a Prediction\(logits, concepts\) for a batch")


def test_a_model_that_diverged(pictures: list[Any]) -> None:
    for value in (torch.nan, 1e38):
        made = toy_model()
        with torch.no_grad():
            made.backbone.layers[0].weight.fill_(value)
        run(made, method="grad_cam", max_images=2)
    assert len(pictures) == 2


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("task", ["binary", "binary column", "multilabel"])
def test_other_labels(task: str, pictures: list[Any]) -> None:
    def change(rows: Rows) -> Rows:
        yes = (rows["label"] > 1).float()
        label = {"binary": yes, "binary column": yes[:, None], "multilabel": rows["concepts"].long()}[task]
        return {**rows, "label": label}

    kind = task.split()[0]
    names = ["no", "yes", "maybe"][: 2 if kind == "binary" else 3]
    made = toy_model(task=kind, num_classes=len(names), class_names=names)
    found, watcher = run(made, ForeignImages(change=change), max_images=2)
    assert found == pytest.approx(by_hand(made), abs=1e-6)
    assert len(pictures) == 1
    assert watcher.co_occurrence.known.tolist() == [9] * 3


def test_batches_without_masks_make_a_picture_alone(pictures: list[Any]) -> None:
    found, watcher = run(toy_model(), ForeignImages("tuple"), max_images=2)
    assert found == {}
    assert len(pictures) == 1
    assert watcher.result.table().empty
    assert {path.name for path in Path("media/test/saliency").iterdir()} == {"co_occurrence-step=0.csv"}


def unknown(rows: Rows) -> Rows:
    return {**rows, "concepts": rows["concepts"].where(torch.arange(len(rows["concepts"]))[:, None] % 2 > 0, torch.nan)}


def test_annotations_that_are_missing(pictures: list[Any]) -> None:
    found = run(toy_model(), ForeignImages(change=unknown), max_images=3)[0]
    assert found == pytest.approx(run(toy_model())[0]), "the masks say where concepts are"
    assert len(pictures) == 1
    options = {"metrics": ["average_drop"], "max_samples": 9}
    counts = run(toy_model(), ForeignImages(change=unknown, where=""), **options)[1].result.counts["average_drop"]
    assert counts.sum() == batch_of(9, seed=2)["concepts"][1::2].sum()


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_any_number_of_channels(channels: int, pictures: list[Any]) -> None:
    backbone = ToyConv()
    backbone.layers[0] = nn.Conv2d(channels, 8, 4, stride=2, padding=1)
    data = ForeignImages(change=lambda rows: rows | {"image": rows["image"][:, :1].repeat(1, channels, 1, 1)})
    assert run(toy_model(backbone=backbone), data, max_images=2)[0]
    assert len(pictures) == (channels == 1), "others cannot be shown"


def test_one_image_and_one_concept(pictures: list[Any]) -> None:
    def first(rows: Rows) -> Rows:
        return {name: value[:, :1] if name.startswith("concept") else value for name, value in rows.items()}

    made = toy_model(concepts=NAMES[:1])
    found, watcher = run(made, ForeignImages(change=first, n_eval=1), max_images=1)
    assert len(pictures) == 1
    assert watcher.result.names == ("red",)
    assert set(found) <= {f"{name}{end}" for name in watcher.result.values for end in ("", "_chance")}
    assert run(made, ForeignImages(change=first, n_eval=5))[0]


def test_masks_of_another_size() -> None:
    small = ForeignImages(change=lambda rows: rows | {"concept_masks": rows["concept_masks"][:, :, ::2, ::2]})
    with pytest.warns(UserWarning, match=r"concept_masks are \[8, 8\] pixels and images \[16, 16\]: .* are resized"):
        found = run(toy_model(), small)[0]
    # spots begin at even pixels
    assert found == pytest.approx(run(toy_model())[0], abs=1e-6)


def test_boxes_points_and_what_is_not_to_be_seen() -> None:
    assert run(toy_model(), ForeignImages(where="boxes"))[0] == pytest.approx(run(toy_model())[0], abs=1e-6)
    distance, chance = run(toy_model(), ForeignImages(where="points"))[0].values()
    assert 0 < min(distance, chance) <= max(distance, chance) < 1

    outside = ForeignImages(where="points", change=lambda rows: rows | {"concept_points": rows["concept_points"] + 99})
    empty = ForeignImages(change=lambda rows: rows | {"concept_masks": rows["concept_masks"] & False})
    for data in (outside, empty):
        found = run(toy_model(), data, method="gradient")[0]
        assert found
        assert all(value != value for value in found.values())


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("masks", lambda masks: masks[:, :2], r"concept_masks: expected a tensor \[1, 3, H, W\], got \[1, 2, 16, 16\]"),
        ("boxes", lambda boxes: boxes[:, :, :3], r"concept_boxes: expected a tensor \[1, 3, 4\], got \[1, 3, 3\]"),
        ("masks boxes", lambda masks: masks, "concept_masks, concept_boxes: expected one of them, got both"),
        ("points", lambda points: points, "energy_in_mask needs concept_masks or concept_boxes in the batch"),
    ],
)
def test_batches_that_do_not_fit(where: str, change: Any, message: str) -> None:
    key = f"concept_{where.split()[0]}"
    data = ForeignImages(where=where, change=lambda rows: {**rows, key: change(rows[key])})
    refused(toy_model(), ValueError, message, data, metrics=["energy_in_mask"])


def test_features_without_images(tmp_path: Path) -> None:
    message = "^image: "
    cached = CachedFeatures(ToyImages(), cache_dir=str(tmp_path / "cache"), batch_size=4)
    refused(toy_model(backbone=ToyConv(frozen=True)), ValueError, message, cached)
    rows = {"embedding": np.ones((20, 3), np.float32), "label": np.arange(20) % 2, "concepts": np.ones((20, 2))}
    np.savez(tmp_path / "rows.npz", **rows)
    data = PrecomputedFeatures(path=str(tmp_path / "rows.npz"), batch_size=4)
    refused(CBMModule("identity", data=data), ValueError, message, data)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "gradcam"}, ValueError, "method: nothing is called 'gradcam'; did you mean 'grad_cam'"),
        ({"method": SmoothGrad}, TypeError, "method: expected short names .* or instances of SaliencyMethod"),
        ({"max_images": -1}, ValueError, "max_images: expected at least 0, got -1"),
        ({"max_samples": 0}, ValueError, "max_samples: expected at least 1, got 0"),
        ({"concepts": 0}, ValueError, "concepts: expected at least 1, got 0"),
        ({"concepts": []}, ValueError, "concepts: expected at least 1, got 0"),
        ({"images_at_once": 0}, ValueError, "images_at_once: expected at least 1, got 0"),
        ({"every_n_epochs": 0}, ValueError, "every_n_epochs: expected at least 1, got 0"),
        ({"stages": ["train"]}, ValueError, r"stages: expected 'val', 'test' or both, got \['train'\]"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ConceptSaliency(**options)
