from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from tiny_clip import VIT
from torch import nn
from toy import CLASSES, WIDTH, ToyBackbone, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import (
    CBMModule,
    ConceptLoss,
    EmbeddingBottleneck,
    LinearBottleneck,
    MLPHead,
    Phase,
    ResidualHead,
    SimilarityBottleneck,
)
from cbm_lightning.backbones import OpenClipTextEncoder, TimmBackbone
from cbm_lightning.concepts import ConceptSet

NAMES = list(ToyData().concept_set.names)
CATEGORICAL = ConceptSet(NAMES, {"look": NAMES[:2], "feel": NAMES[2:]}, "categorical", texts=["a", "b", "c", "d"])
MIXED = ConceptSet(NAMES, kinds=["binary", "binary", "real", "binary"])


def make(**options: Any) -> CBMModule:
    torch.manual_seed(0)
    made: dict[str, Any] = {"backbone": ToyBackbone(dropout=0.2), "concepts": ToyData().concept_set}
    return CBMModule(**{**made, "num_classes": CLASSES, "lr": 0.02, **options})


def trained(model: CBMModule, folder: Path, data: ToyData | None = None, **options: Any) -> Path:
    """Train a little; the path of the checkpoint."""
    trainer = quiet_trainer(**{"max_epochs": 2, "limit_val_batches": 1, **options})
    trainer.fit(model, data or ToyData())
    path = folder / "model.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return path


def texts(width: int) -> ConceptSet:
    return ConceptSet(NAMES, embeddings=torch.randn(len(NAMES), width, generator=torch.Generator().manual_seed(0)))


CASES: dict[str, Any] = {
    "defaults": lambda: {},
    "logits and a hybrid": lambda: {"bottleneck": LinearBottleneck("logits", extra_dims=3)},
    "relu": lambda: {"bottleneck": LinearBottleneck("relu", randint=0.5, randint_scope="batch")},
    "hard, categorical": lambda: {"bottleneck": LinearBottleneck("hard"), "concepts": CATEGORICAL},
    "real concepts": lambda: {"concepts": MIXED},
    "embedding": lambda: {"bottleneck": EmbeddingBottleneck(3, shared_scorer=False), "head": MLPHead([5, 4])},
    "given texts": lambda: {"bottleneck": SimilarityBottleneck(), "concepts": texts(8)},
    "encoded texts": lambda: {
        "bottleneck": SimilarityBottleneck(OpenClipTextEncoder("tiny", model_config=VIT), link="relu"),
        "backbone": ToyBackbone(16),
    },
    "residual": lambda: {"head": ResidualHead(MLPHead([4]), dropout=0.3)},
    "options": lambda: {
        "phases": [
            Phase("a", ["backbone", "bottleneck"], 1, loss_weights={"label": 0.0}),
            Phase("b", ["head"], lr=0.1),
        ],
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        "lr_scheduler": {"class_path": "StepLR", "init_args": {"step_size": 1}},
        "concept_loss": ConceptLoss("sum", weight="balanced"),
        "loss_weights": {"concept": 0.5},
        "lr_multipliers": {"backbone": 0.1},
        "class_names": ["apple", "stone", "plum"],
        "label_smoothing": 0.1,
    },
    "names alone": lambda: {"concepts": NAMES},
    "all from the datamodule": lambda: {"data": ToyData(), "concepts": None, "num_classes": None},
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_alone_restores_everything(case: str, tmp_path: Path) -> None:
    model = make(**CASES[case]())
    path = trained(model, tmp_path)
    loaded = CBMModule.load_from_checkpoint(path)
    assert loaded.hparams == model.hparams
    assert yaml.safe_load(yaml.safe_dump(dict(model.hparams))) == dict(model.hparams)
    assert loaded.concept_set == model.concept_set
    assert loaded.class_names == model.class_names
    assert loaded.phases == model.phases
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    rows = toy_tensors(9)
    expected, got = model.eval()(rows), loaded.eval()(rows)
    assert torch.equal(got.logits, expected.logits)
    corrections = {"round": rows["concepts"][:, 1], "wet": 1.0}
    assert torch.equal(loaded.intervene(got, corrections).logits, model.intervene(expected, corrections).logits)
    assert loaded.losses(*got, rows)[0] == model.losses(*expected, rows)[0]


def test_the_file_holds_plain_data_only(tmp_path: Path) -> None:
    path = trained(make(**CASES["options"]()), tmp_path)
    content = torch.load(path, weights_only=True)
    assert content["hyper_parameters"]["_class_path"] == "cbm_lightning.module.CBMModule"
    assert content["hyper_parameters"]["phases"][1]["lr"] == 0.1
    assert content["hyper_parameters"]["data"] is None
    assert len(content["cbm_lightning"]["rng"]) == 1


@pytest.mark.parametrize("spec", ["string", "weights"])
def test_a_timm_backbone_comes_back_without_its_source(spec: str, tmp_path: Path, monkeypatch) -> None:
    name, weights = "test_resnet.r160_in1k", tmp_path / "source.safetensors"
    save_file(TimmBackbone(name).model.state_dict(), weights)
    backbone = f"timm/{name}" if spec == "string" else TimmBackbone(name, checkpoint_path=str(weights), img_size=64)
    model = make(backbone=backbone)
    path = tmp_path / "timm.ckpt"
    trainer = quiet_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    weights.unlink()
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a restore used the network"))
    content = torch.load(path, weights_only=True)
    stored = content["hyper_parameters"]["backbone"]["init_args"]
    assert (stored["pretrained"], stored["checkpoint_path"]) == (False, None)
    source = content["cbm_lightning"]["weights_source"]["init_args"]["checkpoint_path"]
    assert source == (None if spec == "string" else str(weights))
    loaded = CBMModule.load_from_checkpoint(path).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded(x).logits, model.eval()(x).logits)
    assert loaded.backbone.image_stats() == model.backbone.image_stats()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the second Trainer has no callbacks
def test_the_trainer_tests_a_file_without_pickle(tmp_path: Path) -> None:
    model = make(bottleneck=LinearBottleneck("logits"), phases="sequential")
    keep = ModelCheckpoint(tmp_path, monitor="val/concept_acc", mode="max")
    trainer = quiet_trainer(max_epochs=2, callbacks=[keep], enable_checkpointing=True)
    trainer.fit(model, ToyData())
    expected = trainer.test(model, ToyData(), ckpt_path="best", weights_only=True, verbose=False)
    fresh = make(bottleneck=LinearBottleneck("logits"), phases="sequential")
    path = keep.best_model_path
    assert quiet_trainer().test(fresh, ToyData(), ckpt_path=path, weights_only=True, verbose=False) == expected
    loaded = CBMModule.load_from_checkpoint(path)
    assert quiet_trainer().test(loaded, ToyData(), verbose=False) == expected


def test_arguments_of_the_call_replace_stored_ones(tmp_path: Path) -> None:
    path = trained(make(), tmp_path)
    assert CBMModule.load_from_checkpoint(str(path), lr=0.5).lr == 0.5
    with path.open("rb") as file:
        assert CBMModule.load_from_checkpoint(file).lr == 0.02


# ---------------------------------------------------------------- what cannot be written down


def bare() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())


def test_a_bare_module_must_be_handed_over_again(tmp_path: Path) -> None:
    from cbm_lightning.backbones import ModuleBackbone

    model = make(backbone=ModuleBackbone(bare(), input_size=(WIDTH,)))
    path = trained(model, tmp_path)
    torch.load(path, weights_only=True)
    with pytest.raises(
        ValueError, match=r"\['backbone'\] had no plain form.*load_from_checkpoint\(path, backbone=\.\.\.\)"
    ):
        CBMModule.load_from_checkpoint(path)
    loaded = CBMModule.load_from_checkpoint(path, backbone=ModuleBackbone(bare(), input_size=(WIDTH,)))
    rows = toy_tensors(5)
    assert torch.equal(loaded.eval()(rows).logits, model.eval()(rows).logits)


# ---------------------------------------------------------------- classes


class Mine(CBMModule):
    """A subclass with arguments of its own, which makes the backbone itself."""

    def __init__(self, width: int, data: ToyData | None = None, **options: Any) -> None:
        super().__init__(ToyBackbone(width), data=data, **options)
        self.width = width


class Closed(CBMModule):
    """A subclass that takes a datamodule and nothing else."""

    def __init__(self, data: ToyData) -> None:
        super().__init__(ToyBackbone(), data=data)


class Other(CBMModule):
    """Not related to the two above."""


def test_a_subclass_comes_back_as_itself(tmp_path: Path) -> None:
    model = Mine(5, data=ToyData(), lr=0.1)
    path = trained(model, tmp_path)
    for cls in (CBMModule, Mine):
        loaded = cls.load_from_checkpoint(path)
        assert type(loaded) is Mine
        assert (loaded.width, loaded.lr, loaded.concept_set) == (5, 0.1, model.concept_set)
        assert torch.equal(loaded.eval()(toy_tensors(5)).logits, model.eval()(toy_tensors(5)).logits)
    with pytest.raises(ValueError, match=r"holds a .*Mine, which is no Other; load it with that class"):
        Other.load_from_checkpoint(path)
    base = trained(make(), tmp_path)
    assert type(Other.load_from_checkpoint(base)) is Other


def test_a_subclass_that_only_takes_a_datamodule_asks_for_it(tmp_path: Path) -> None:
    path = trained(Closed(ToyData()), tmp_path)
    with pytest.raises(ValueError, match=r"\['data'\] had no plain form"):
        Closed.load_from_checkpoint(path)
    assert Closed.load_from_checkpoint(path, data=ToyData()).num_classes == CLASSES


def test_a_class_that_is_not_imported_is_named(tmp_path: Path) -> None:
    class Local(CBMModule):
        pass

    path = trained(Local(ToyBackbone(), data=ToyData()), tmp_path)
    assert type(Local.load_from_checkpoint(path)) is Local
    with pytest.raises(ValueError, match=r"no class '.*Local' is known here; import the module that defines it"):
        CBMModule.load_from_checkpoint(path)


def test_a_model_keeps_no_hold_of_its_datamodule() -> None:
    import copy

    data = ToyData()
    model = CBMModule(ToyBackbone(), data=data)
    quiet_trainer(fast_dev_run=True).fit(model, data)
    memo: dict[int, Any] = {}
    copy.deepcopy(model, memo)
    assert id(data) not in memo


# ---------------------------------------------------------------- damaged and foreign files


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    path = trained(make(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.ckpt is truncated or not a checkpoint"):
        CBMModule.load_from_checkpoint(path)


def test_foreign_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent"):
        CBMModule.load_from_checkpoint(tmp_path / "absent.ckpt")
    text = tmp_path / "notes.txt"
    text.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"notes\.txt is truncated or not a checkpoint"):
        CBMModule.load_from_checkpoint(text)
    tensor = tmp_path / "tensor.pt"
    torch.save(torch.zeros(3), tensor)
    with pytest.raises(ValueError, match=r"tensor\.pt is no checkpoint: it has no state_dict"):
        CBMModule.load_from_checkpoint(tensor)
    pickled = tmp_path / "pickled.pt"
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": nn.Linear(1, 1)}}, pickled)
    with pytest.raises(ValueError, match=r"pickled\.pt is truncated or not a checkpoint of plain data"):
        CBMModule.load_from_checkpoint(pickled)


def test_a_checkpoint_of_another_module_is_refused(tmp_path: Path) -> None:
    class Plain(LightningModule):
        pass

    trainer = quiet_trainer()
    trainer.strategy.connect(Plain())
    trainer.save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"plain\.ckpt is a checkpoint, but not one of cbm_lightning"):
        CBMModule.load_from_checkpoint(tmp_path / "plain.ckpt")


def test_a_checkpoint_names_no_foreign_code(tmp_path: Path) -> None:
    path = trained(make(), tmp_path)
    content = torch.load(path, weights_only=True)
    for class_path, message in [("subprocess.Popen", "is not a part"), ("antigravity.Fly", "no class 'antigravity")]:
        content["hyper_parameters"]["backbone"] = {"class_path": class_path, "init_args": {}}
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            CBMModule.load_from_checkpoint(path)


def test_options_that_would_unpickle_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights_only=True, nothing else"):
        CBMModule.load_from_checkpoint(tmp_path / "any.ckpt", weights_only=False)
