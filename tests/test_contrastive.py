"""ContrastiveModule: the loss, zero-shot accuracy, and towers that others can load."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from recorder import Log
from safetensors.torch import load_file
from tiny_clip import COCA, VIT
from torch import Tensor
from toy import quiet_trainer

from cbm_lightning.backbones import OpenClipBackbone, OpenClipTextEncoder
from cbm_lightning.backbones.clip import make_clip
from cbm_lightning.cli import main
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.contrastive import ContrastiveModule
from cbm_lightning.data.base import ConceptDataModule, TensorDataset

COLOURS = ["red", "green", "blue"]
CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {
        "context_length": 6,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "vocabulary": ["a", "blue", "green", "red", "spot"],
    },
}


class Spots(ConceptDataModule):
    """Images of one colour and captions that name it."""

    def __init__(self, order: tuple[int, ...] = (0, 1, 2), n: int = 48, caption: str = "a {} spot") -> None:
        super().__init__(batch_size=16)
        self.order, self.n, self.caption = list(order), n, caption

    @property
    def concept_set(self) -> ConceptSet:
        return ConceptSet(COLOURS)

    @property
    def class_names(self) -> list[str]:
        return [COLOURS[k] for k in self.order]

    @property
    def class_descriptions(self) -> list[str]:
        return [f"a {name}" for name in self.class_names]

    def make_split(self, name: str) -> TensorDataset:
        draw = torch.Generator().manual_seed(["train", "val", "test"].index(name))
        label = torch.randint(3, (self.n - 3,), generator=draw)
        colour = torch.tensor(self.order)[label]
        image = torch.rand(len(label), 3, 16, 16, generator=draw)
        image[torch.arange(len(label)), colour] += 2.0
        return TensorDataset({"image": image, "label": label, "colour": colour}, self.with_captions)

    def with_captions(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, "caption": [self.caption.format(COLOURS[k]) for k in batch.pop("colour").tolist()]}

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        raise KeyError(split)


class SpotsWithoutTexts(Spots):
    """The same, with nothing known of the classes."""

    class_descriptions = None  # type: ignore[assignment]


def trained(epochs: int = 12, **options: Any) -> tuple[ContrastiveModule, Log]:
    torch.manual_seed(0)
    model, log = ContrastiveModule(CONFIG, lr=0.01, **options), Log()
    quiet_trainer(max_epochs=epochs, logger=log).fit(model, Spots())
    return model, log


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[ContrastiveModule, Log, Path]:
    folder = tmp_path_factory.mktemp("run") / "exported"
    return *trained(export_to=str(folder), lr_scheduler="OneCycleLR"), folder


# ---------------------------------------------------------------- the loss


def test_the_loss_against_a_loop() -> None:
    model = ContrastiveModule(CONFIG).eval()
    batch = {"image": torch.rand(4, 3, 16, 16), "caption": ["red", "a blue spot", "green", "spot"]}
    with torch.no_grad():
        model.text.logit_scale.fill_(1.3)
        pictures, sentences = model.encode_images(batch["image"]), model.encode_texts(batch["caption"])
        found = model.contrast(batch).item()
    assert pictures.norm(dim=1).tolist() == pytest.approx([1.0] * 4)
    scores = [[math.exp(1.3) * float(u @ v) for v in sentences] for u in pictures]
    total = 0.0
    for i in range(4):
        total -= scores[i][i] - math.log(sum(math.exp(s) for s in scores[i]))
        total -= scores[i][i] - math.log(sum(math.exp(row[i]) for row in scores))
    assert found == pytest.approx(total / 8, abs=1e-4)


def test_it_is_the_model_of_open_clip() -> None:
    model = ContrastiveModule(CONFIG).eval()
    whole = make_clip("tiny", model_config=CONFIG).eval()
    own = {f"visual.{name}": weight for name, weight in model.backbone.tower.visual.state_dict().items()}
    whole.load_state_dict({**own, **model.text.state_dict()})
    images, texts = torch.rand(4, 3, 16, 16), ["red", "a blue spot", "green"]
    expected, _ = whole.get_logits(images, model.tokens(texts))
    torch.testing.assert_close(model(images, texts), expected)


def test_half_precision_keeps_the_loss() -> None:
    model = ContrastiveModule(CONFIG).eval()
    batch = {"image": torch.rand(4, 3, 16, 16), "caption": ["red", "blue", "green", "spot"]}
    with torch.no_grad():
        plain = model.contrast(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model.contrast(batch)
            assert model(batch["image"], ["red"]).dtype == torch.float32
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, plain, rtol=0.05, atol=0.05)


def test_every_weight_learns_and_the_temperature_stays_within_bounds() -> None:
    torch.manual_seed(0)
    model = ContrastiveModule(CONFIG, lr=0.01)
    before = copy.deepcopy(dict(model.named_parameters()))
    torch.nn.init.constant_(model.text.logit_scale, 9.0)
    quiet_trainer(max_epochs=1).fit(model, Spots())
    still = {"text.token_embedding.weight"}
    for name, weight in model.named_parameters():
        assert name in still or not torch.equal(weight, before[name]), name
    assert model.text.logit_scale.item() <= math.log(100) + 1e-5
    # padding is read by no sentence that ends before it
    used = [2, 3, 4, 5, 6]
    assert not torch.equal(model.text.token_embedding.weight[used], before["text.token_embedding.weight"][used])


def test_only_matrices_decay() -> None:
    model = ContrastiveModule(CONFIG, weight_decay=0.3)
    matrices, rest = model.configure_optimizers().param_groups
    assert (matrices["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert any(p is model.text.logit_scale for p in rest["params"])
    assert len(matrices["params"]) + len(rest["params"]) == len(list(model.parameters()))


# ---------------------------------------------------------------- accuracy by text


def test_classes_are_told_by_their_sentences(run: tuple[ContrastiveModule, Log, Path]) -> None:
    model, log, _ = run
    validated = [row for row in log.rows if "val/loss" in row]
    assert validated[-1]["val/label_acc"] > 0.9
    assert validated[-1]["val/loss"] < validated[0]["val/loss"]
    assert model.hparams["lr"] == 0.01
    test = Log()
    quiet_trainer(logger=test).test(model, Spots(), verbose=False)
    assert test.rows[-1]["test/label_acc"] > 0.9


def test_other_classes_than_in_training_are_told_too(run: tuple[ContrastiveModule, Log, Path]) -> None:
    model, _, _ = run
    test = Log()
    quiet_trainer(logger=test).test(model, Spots(order=(2, 0, 1)), verbose=False)
    assert test.rows[-1]["test/label_acc"] > 0.9


def test_without_sentences_there_is_a_loss_alone() -> None:
    log = Log()
    quiet_trainer(logger=log).fit(ContrastiveModule(CONFIG), SpotsWithoutTexts())
    logged = {name for row in log.rows for name in row}
    assert "val/loss" in logged
    assert "val/label_acc" not in logged


# ---------------------------------------------------------------- export and checkpoints


def test_the_export_is_read_by_backbone_and_text_encoder(run: tuple[ContrastiveModule, Log, Path]) -> None:
    model, _, folder = run
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "model_config.json"]
    source = {"checkpoint_path": str(folder / "model.safetensors"), "model_config": str(folder / "model_config.json")}
    backbone = OpenClipBackbone("tiny", frozen=True, **source)
    encoder = OpenClipTextEncoder("tiny", templates=["{}"], **source)
    images, texts = torch.rand(5, 3, 16, 16), ["a red spot", "blue"]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.nn.functional.normalize(backbone(images).pooled), model.encode_images(images))
        torch.testing.assert_close(encoder.encode(texts), model.encode_texts(texts))
        whole = make_clip("tiny", **source).eval()
        torch.testing.assert_close(whole.get_logits(images, model.tokens(texts))[0], model(images, texts))
    # pixels as they were in training
    assert backbone.image_stats() == model.backbone.image_stats()
    assert json.loads((folder / "model_config.json").read_text())["text_cfg"]["vocabulary"] == COLOURS_AND_MORE


COLOURS_AND_MORE = CONFIG["text_cfg"]["vocabulary"]


def test_an_export_replaces_and_a_dry_run_does_not_write(tmp_path: Path) -> None:
    model = ContrastiveModule(CONFIG, export_to=str(tmp_path / "a" / "b"))
    quiet_trainer(fast_dev_run=True).fit(model, Spots())
    assert not (tmp_path / "a").exists()
    model.export(tmp_path / "c")
    with torch.no_grad():
        model.text.logit_scale.fill_(0.5)
    model.export(tmp_path / "c")
    weights = load_file(tmp_path / "c" / "model.safetensors")
    assert weights["logit_scale"].item() == 0.5
    assert not list((tmp_path / "c").glob(".*"))


def test_checkpoints_hold_plain_data(run: tuple[ContrastiveModule, Log, Path], tmp_path: Path) -> None:
    model, _, _ = run
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = ContrastiveModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    images = torch.rand(3, 3, 16, 16)
    torch.testing.assert_close(restored(images, ["red"]), model.eval()(images, ["red"]))
    assert restored.lr == 0.01


def test_a_configuration_from_a_file_and_the_usual_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(VIT))
    model = ContrastiveModule(str(path))
    assert model.hparams["model_config"] == VIT
    assert torch.equal(model.tokens(["a red bird"]), open_clip.SimpleTokenizer(context_length=12)(["a red bird"]))


def test_recipes_read_what_the_first_of_them_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])
    small = ["--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
    fit = [*small, *quiet, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]
    with pytest.raises(FileNotFoundError, match=r"no file at runs/tiny_clip/model_config.json; .*--config tiny_clip"):
        main(["test", "--config", "concept_matrix_search", *small, *quiet])

    clip = main(["fit", "--config", "tiny_clip", *fit])
    assert sum(weight.numel() for weight in clip.model.parameters()) < 1_000_000
    assert 0 <= clip.trainer.callback_metrics["test/label_acc"] <= 1
    sparse = main(["fit", "--config", "sparse_cbm", *fit])
    assert {"test/loss_gumbel", "test/effective_concepts"} <= sparse.trainer.callback_metrics.keys()
    search = main(["test", "--config", "concept_matrix_search", *small, *quiet])
    assert 0 <= search.trainer.callback_metrics["test/label_acc"] <= 1
    # one clip, and species that it has not seen
    assert torch.equal(search.model.bottleneck.texts, sparse.model.bottleneck.texts)
    assert search.datamodule.class_descriptions != clip.datamodule.class_descriptions
    with pytest.raises(ValueError, match="nothing to train"):
        main(["fit", "--config", "concept_matrix_search", *fit])


# ---------------------------------------------------------------- what is refused


def test_captions_are_needed_and_must_be_of_known_words() -> None:
    model = ContrastiveModule(CONFIG)
    images = torch.rand(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no 'caption', only \['image'\]: yield a sentence an image"):
        model.read_batch({"image": images})
    with pytest.raises(ValueError, match="caption: expected 2 sentences, one an image, got"):
        model.read_batch({"image": images, "caption": ["red"]})
    with pytest.raises(ValueError, match=r"text_cfg: the vocabulary of 5 words lacks \['dot'\].*add them"):
        quiet_trainer().fit(model, Spots(caption="a {} dot"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: expected a positive"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"optimizer": "Adamw2"}, "optimizer: no Optimizer is called"),
        ({"lr_scheduler": "None"}, "lr_scheduler: no LRScheduler is called"),
        ({"model_config": {"embed_dim": 8}}, "model_config: .'vision_cfg', 'text_cfg'. missing"),
        ({"model_config": COCA | {"multimodal_cfg": {}}}, "model_config: CoCa"),
    ],
)
def test_bad_options_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContrastiveModule(**{"model_config": CONFIG, **options})
