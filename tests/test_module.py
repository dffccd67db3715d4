from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from toy import CLASSES, CONCEPTS, ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import (
    CBMModule,
    ConceptLoss,
    EmbeddingBottleneck,
    Intervention,
    LinearBottleneck,
    LinearHead,
    MLPHead,
    Phase,
    ResidualHead,
    SimilarityBottleneck,
)
from cbm_lightning.concepts import ConceptSet

BOTTLENECKS = {
    "sigmoid": lambda: LinearBottleneck("sigmoid"),
    "logits": lambda: LinearBottleneck("logits"),
    "relu": lambda: LinearBottleneck("relu"),
    "hard": lambda: LinearBottleneck("hard"),
    "hybrid": lambda: LinearBottleneck(extra_dims=3),
    "embedding": lambda: EmbeddingBottleneck(4),
    "similarity": lambda: SimilarityBottleneck(),
}


def make(name: str = "sigmoid", **options) -> CBMModule:
    concepts = options.pop("concepts", ConceptSet(ToyData().concept_set.names, embeddings=torch.randn(CONCEPTS, 8)))
    return CBMModule(
        options.pop("backbone", None) or ToyBackbone(),
        BOTTLENECKS[name](),
        concepts=concepts,
        **{"num_classes": CLASSES, **options},
    )


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_every_bottleneck_trains_evaluates_and_predicts(name: str) -> None:
    model, data = make(name, lr=0.02), ToyData()
    trainer = quiet_trainer(max_epochs=4)
    trainer.fit(model, data)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    results = trainer.test(model, data, verbose=False)[0]
    expected = {
        "loss",
        "loss_label",
        "label_acc",
        "concept_acc",
        "concept_auroc",
        "concept_ap",
        "concept_joint_acc",
        "concept_ece",
    }
    expected |= {"loss_concept"} if name != "similarity" else set()
    assert set(results) == {f"test/{key}" for key in expected}
    predictions = trainer.predict(model, data)
    assert sum(len(batch["label"]) for batch in predictions) == 41
    rows = toy_tensors(41, seed=2)
    accuracy = (torch.cat([batch["label"] for batch in predictions]) == rows["label"]).float().mean()
    assert accuracy.item() == pytest.approx(results["test/label_acc"], abs=1e-6)


@pytest.mark.parametrize("name", BOTTLENECKS)
def test_intervening_redoes_the_label_without_the_backbone(name: str) -> None:
    model = make(name).eval()
    rows = toy_tensors(5)
    with torch.no_grad():
        prediction = model(rows)
        calls = model.backbone.calls
        same = model.intervene(prediction, Intervention(torch.zeros(5, CONCEPTS, dtype=torch.bool), rows["concepts"]))
        full = model.intervene(prediction, Intervention(torch.ones(5, CONCEPTS, dtype=torch.bool), rows["concepts"]))
        by_name = model.intervene(prediction, {"round": rows["concepts"][:, 1], "wet": 1.0})
    assert model.backbone.calls == calls
    torch.testing.assert_close(same.logits, prediction.logits)
    torch.testing.assert_close(full.concepts.probs, rows["concepts"])
    torch.testing.assert_close(by_name.concepts.probs[:, 1], rows["concepts"][:, 1])
    torch.testing.assert_close(by_name.concepts.probs[:, 0], prediction.concepts.probs[:, 0])
    assert (by_name.logits != prediction.logits).any()
    with pytest.raises(ValueError, match=r"no concept is called 'rund'; did you mean \['round'"):
        model.intervene(prediction, {"rund": 1.0})


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_three_kinds_of_labels(task: str) -> None:
    rows = toy_tensors(32)
    one_hot = nn.functional.one_hot(rows["label"], CLASSES)
    rows["label"] = {"multiclass": rows["label"], "binary": (rows["label"] > 0).long(), "multilabel": one_hot}[task]
    model = make(task=task, num_classes=2 if task == "binary" else CLASSES, lr=0.05)
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in rows.items()} for i in range(32)], batch_size=8)
    trainer = quiet_trainer(max_epochs=30)
    trainer.fit(model, loader, loader)
    assert trainer.test(model, loader, verbose=False)[0]["test/label_acc"] > 0.85
    prediction = trainer.predict(model, loader)[0]
    assert prediction["label"].shape == ((8, CLASSES) if task == "multilabel" else (8,))
    assert ("contributions" in prediction) == (task != "multilabel")


@pytest.mark.parametrize("name", ["sigmoid", "hybrid", "embedding"])
@pytest.mark.parametrize("head", [None, ResidualHead()], ids=["linear", "residual"])
def test_an_explanation_adds_up_to_the_logit(name: str, head) -> None:
    model = make(name, head=head, class_names=["apple", "stone", "plum"])
    rows = toy_tensors(6)
    table = model.explain(rows, top_k=2)
    with torch.no_grad():
        logits = model.eval()(rows).logits
    for sample, lines in table.groupby("sample"):
        assert lines["contribution"].sum() == pytest.approx(logits[sample].max().item(), abs=1e-5)
        assert set(lines["predicted"]) == {["apple", "stone", "plum"][logits[sample].argmax()]}
        named = lines[~lines["concept"].str.startswith("<")]
        assert len(named) == 2
        assert named["contribution"].abs().is_monotonic_decreasing
        k = model.concept_set.index(named["concept"].iloc[0])
        assert named["annotation"].iloc[0] == rows["concepts"][sample, k]
    with pytest.raises(ValueError, match="top_k"):
        model.explain(rows, top_k=0)
    with pytest.raises(ValueError, match="MLPHead with a multiclass label has no exact contributions"):
        make(head=MLPHead([4])).explain(rows)


def test_a_foreign_datamodule_with_tuples_trains_unchanged() -> None:
    trainer = quiet_trainer()
    trainer.fit(make(), ForeignData(with_concepts=True))
    trainer = quiet_trainer()
    trainer.fit(make("similarity"), ForeignData(with_concepts=False))
    assert "val/concept_acc" not in trainer.callback_metrics
    assert "val/label_acc" in trainer.callback_metrics


def test_a_subclass_overriding_one_method_works() -> None:
    class Mine(CBMModule):
        def label_loss(self, logits, label):
            return nn.functional.multi_margin_loss(logits, label)

    model = Mine(ToyBackbone(), concepts=CONCEPTS, num_classes=CLASSES)
    trainer = quiet_trainer()
    trainer.fit(model, ToyData())
    assert trainer.callback_metrics["val/loss_label"] > 0

    class OtherBatches(CBMModule):
        def read_batch(self, batch):
            x, (concepts, y) = batch
            return {"image": x, "concepts": concepts, "label": y}

    rows = toy_tensors(8)
    loader = torch.utils.data.DataLoader(
        [(rows["image"][i], (rows["concepts"][i], rows["label"][i])) for i in range(8)], batch_size=4
    )
    quiet_trainer().fit(OtherBatches(ToyBackbone(), concepts=CONCEPTS, num_classes=CLASSES), loader, loader)


def test_unknown_annotations_reach_no_loss_and_batches_are_not_written_to() -> None:
    rows = toy_tensors(16)
    rows["concepts"][::3, 1] = torch.nan
    before = {name: tensor.clone() for name, tensor in rows.items()}
    model = make("embedding", phases=[Phase("p", head_input="true")])
    model.bottleneck.randint = 0.5
    trainer = quiet_trainer(max_epochs=2)
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in rows.items()} for i in range(16)], batch_size=8)
    trainer.fit(model, loader, loader)
    assert all(torch.equal(rows[name].nan_to_num(9), before[name].nan_to_num(9)) for name in rows)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_precomputed_features_skip_the_backbone() -> None:
    model = make()
    embedding = torch.randn(4, 8)
    model({"embedding": embedding})
    assert model.backbone.calls == 0
    tokens = torch.randn(4, 5, 8)
    torch.testing.assert_close(model.encode({"tokens": tokens}).pooled, tokens.mean(1))
    with pytest.raises(ValueError, match="features of width 7, the backbone makes 8"):
        model({"embedding": torch.randn(4, 7)})


def test_what_the_user_typed_wins_over_the_datamodule() -> None:
    model = CBMModule(ToyBackbone(), data=ToyData(), concepts=7, num_classes=5)
    assert (len(model.concept_set), model.num_classes) == (7, 5)
    assert CBMModule(ToyBackbone(), data=ToyData()).class_names == ["apple", "stone", "plum"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"concepts": CONCEPTS}, "ForeignData has no `num_classes`: pass model.num_classes"),
        ({"num_classes": CLASSES}, "ForeignData has no `concept_set`: pass model.concepts"),
        ({"concepts": CONCEPTS, "num_classes": 1}, "num_classes: expected at least 2"),
        ({"concepts": CONCEPTS, "num_classes": 3, "class_names": ["a"]}, "class_names: expected 3"),
        ({"concepts": CONCEPTS, "num_classes": 3, "lr": 0.0}, "lr: expected a positive"),
        ({"concepts": CONCEPTS, "num_classes": 3, "label_smoothing": 1.0}, "label_smoothing"),
        ({"concepts": CONCEPTS, "num_classes": 3, "loss_weights": {"concept": -1.0}}, "loss_weights"),
        ({"concepts": CONCEPTS, "num_classes": 3, "lr_multipliers": {"body": 1.0}}, "lr_multipliers"),
        (
            {"concepts": CONCEPTS, "num_classes": 3, "optimizer": "AdamX"},
            r"optimizer: no Optimizer is called 'AdamX'; near",
        ),
        (
            {
                "concepts": CONCEPTS,
                "num_classes": 3,
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}},
            },
            r"optimizer: SGD takes .* not \['momentun'\]",
        ),
    ],
)
def test_bad_arguments_fail_at_construction(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CBMModule(ToyBackbone(), data=ForeignData(), **options)


def bad_rows(field: str, value) -> torch.utils.data.DataLoader:
    rows = toy_tensors(8)
    if value is None:
        del rows[field]
    else:
        rows[field] = value(rows[field])
    return torch.utils.data.DataLoader([{k: v[i] for k, v in rows.items()} for i in range(8)], batch_size=4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("concepts", None, "has no 'concepts'.*compares images with concept texts"),
        ("label", None, "has no 'label'"),
        ("concepts", lambda c: c * 3, r"expected values in \[0, 1\] or NaN, got 3 for"),
        ("concepts", lambda c: c[:, :3], "the model has 4 concepts, the batch has the shape"),
        ("label", lambda y: y + 1, "expected values from 0 to 2"),
        ("label", lambda y: y.float(), "expected class indices"),
        ("image", None, "needs one of the keys"),
    ],
)
def test_bad_batches_fail_before_the_first_step(field, value, message) -> None:
    model = make()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = bad_rows(field, value)
    with pytest.raises((ValueError, TypeError), match=message):
        quiet_trainer().fit(model, loader, loader)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_a_datamodule_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has 5 concepts, ToyData has 4"):
        quiet_trainer().fit(CBMModule(ToyBackbone(), concepts=5, num_classes=CLASSES), ToyData())
    with pytest.raises(ValueError, match="the model has 4 classes, ToyData has 3"):
        quiet_trainer().fit(CBMModule(ToyBackbone(), concepts=4, num_classes=4), ToyData())
    model = CBMModule(ToyBackbone(), concepts=["red", "wet", "small", "round"], num_classes=CLASSES)
    with pytest.raises(ValueError, match="concept 1 is 'wet' in the model and 'round' in ToyData"):
        quiet_trainer().fit(model, ToyData())


def test_balanced_weights_come_from_the_training_annotations_of_any_data() -> None:
    rows = toy_tensors(48, 0)["concepts"]
    expected = (1 - rows).sum(0) / rows.sum(0)
    model = make(concept_loss=ConceptLoss(weight="balanced"))
    quiet_trainer().fit(model, ForeignData())
    torch.testing.assert_close(model.concept_loss.weight, expected)
    with pytest.raises(ValueError, match="'balanced' weights of the concept_loss, or the bottleneck, need annotated"):
        quiet_trainer().fit(
            make("similarity", concept_loss=ConceptLoss(weight="balanced")), ForeignData(with_concepts=False)
        )


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "('timm', 'open_clip', 'wandb', 'matplotlib', 'pandas', 'captum', 'sklearn')"

    def loaded_by(modules: str) -> str:
        code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    ours = loaded_by("cbm_lightning, cbm_lightning.data, cbm_lightning.callbacks")
    assert ours == loaded_by("lightning.pytorch, torchmetrics")


def test_data_can_follow_a_model_without_a_trainer() -> None:
    from cbm_lightning.backbones import TimmBackbone
    from cbm_lightning.data import RenderedBirds

    def first_image(birds: RenderedBirds) -> torch.Tensor:
        birds.setup("test")
        return next(iter(birds.test_dataloader()))["image"][0]

    sizes = {"num_train": 2, "num_val": 2, "num_test": 2}
    plain = first_image(RenderedBirds(**sizes))
    backbone = TimmBackbone("test_resnet.r160_in1k", img_size=64, mean=[0.1, 0.2, 0.3], std=[0.5, 0.5, 0.5])
    model = CBMModule(backbone, data=RenderedBirds(**sizes))
    followed = first_image(RenderedBirds(**sizes).follow(model))
    torch.testing.assert_close(followed, (plain - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5)


def test_binary_and_several_labels_are_scored_on_probabilities() -> None:
    from cbm_lightning.reporting import EvaluationMetrics

    for task, logits, label in (
        ("binary", torch.tensor([[0.3], [0.2]]), torch.tensor([1, 1])),
        ("multilabel", torch.tensor([[0.3, -0.2]]), torch.tensor([[1, 0]])),
    ):
        scores = EvaluationMetrics(ConceptSet(["a"]), 2, task)
        scores.update({"loss": torch.tensor(float("nan"))}, torch.rand(len(logits), 1), logits, {"label": label}, True)
        found = scores.finish()
        assert found["label_acc"] == 1.0
        assert found["loss"].isnan()  # a diverged loss must not vanish from the log


def test_a_detached_head_sends_no_gradient_anywhere() -> None:
    rows = toy_tensors(16)
    for name, head in (("embedding", None), ("sigmoid", ResidualHead())):
        model = make(name, head=head, phases=[Phase("p", head_input="detached", loss_weights={"concept": 0.0})])
        model.bottleneck.randint = 0.5
        loader = torch.utils.data.DataLoader([{k: v[i] for k, v in rows.items()} for i in range(16)], batch_size=8)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items() if "running" not in key}
        quiet_trainer().fit(model, loader, loader)
        moved = {key for key in before if not torch.equal(before[key], model.state_dict()[key])}
        assert {key.split(".")[0] for key in moved if "num_batches" not in key} == {"head"}


def test_weights_of_losses_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no loss is called \['concpet'\].*did you mean \['concept'"):
        quiet_trainer().fit(make(loss_weights={"concpet": 5.0}), ToyData())
    with pytest.raises(ValueError, match="phase 'concepts': no loss counts"):
        quiet_trainer(max_epochs=2).fit(make("similarity", phases="sequential"), ToyData())


def test_a_later_batch_out_of_range_is_refused_too() -> None:
    rows = toy_tensors(12)
    rows["concepts"][9] = 7.0
    loader = torch.utils.data.DataLoader([{k: v[i] for k, v in rows.items()} for i in range(12)], batch_size=4)
    with pytest.raises(ValueError, match=r"expected values in \[0, 1\] or NaN, got 7"):
        quiet_trainer().fit(make(), loader, loader)


def test_what_a_subclass_adds_trains() -> None:
    class Wider(CBMModule):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            self.temperature = nn.Parameter(torch.ones(()))

        def label_loss(self, logits, label):
            return super().label_loss(logits / self.temperature, label)

    model = Wider(backbone=ToyBackbone(), concepts=CONCEPTS, num_classes=CLASSES)
    quiet_trainer().fit(model, ToyData())
    assert model.temperature != 1


def test_kinds_of_labels_are_checked() -> None:
    with pytest.raises(ValueError, match="task: expected one of"):
        make(task="ranking")
    with pytest.raises(ValueError, match="task: a binary label has 2 classes"):
        make(task="binary", num_classes=3)


def test_bottleneck_and_head_hear_of_progress_and_project_after_each_step() -> None:
    class Clamped(LinearHead):
        def on_progress(self, fraction: float) -> None:
            heard.append(fraction)

        def constrain(self) -> None:
            self.linear.weight.data.clamp_(min=0.0)

    heard: list[float] = []
    model = make(head=Clamped())
    quiet_trainer(max_epochs=2).fit(model, ToyData())
    assert heard == sorted(heard)
    assert heard[0] == 0.0
    assert 0.9 < heard[-1] < 1.0
    assert model.head.linear.weight.min() >= 0
