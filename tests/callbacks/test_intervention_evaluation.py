"""Intervention curves in validation and test: when they are made, of how many encodings, and what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassCohenKappa
from toy import CLASSES, WIDTH, ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import accuracy_of_head, check_same, plain_accuracy, run, toy_model

from cbm_lightning import CBMModule, ConceptSet, EmbeddingBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.callbacks import intervention_evaluation as module
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.interventions.policies import UCP, Rand
from cbm_lightning.types import ConceptOutput, Features, Prediction

# the models here have drawn weights
pytestmark = pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
EVERY = ["rand", "ucp", "cctp", "ectp", "eudtp", "coop", "lcp", "greedy"]


@pytest.fixture(autouse=True)
def _no_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go to a folder of their own, and no time goes into drawing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "log_figure", lambda *_: None)


def loader(seed: int = 2, n: int = 41, batch_size: int = 16, **more: Any) -> DataLoader:
    rows = {name: x[:n] for name, x in toy_tensors(n, seed).items()} | more
    return DataLoader(TensorDataset(rows), batch_size=batch_size, collate_fn=TensorDataset.collate)


# ---------------------------------------------------------------- when


def test_its_scalars_can_be_monitored(tmp_path: Path) -> None:
    evaluation = InterventionEvaluation(["ucp"], stages=["val"], target=0.01)
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/intervention/ucp/auc", mode="max")
    trainer = quiet_trainer(max_epochs=3, callbacks=[evaluation, keep], enable_checkpointing=True)
    trainer.fit(toy_model(lr=0.02), ToyData())
    assert 0 < keep.best_model_score <= 1
    scores = evaluation.result.scores("ucp")[0]
    found = trainer.callback_metrics
    assert found["val/intervention/ucp/final"] == scores[-1]
    assert found["val/intervention/ucp/gain"] == pytest.approx(float(torch.trapezoid(scores) / 4 - scores[0]), abs=1e-6)
    assert found["val/intervention/ucp/target_budget"] == 0
    assert scores[0] == found["val/label_acc"]


def made_at(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[tuple[str, int, bool]]:
    made = []
    monkeypatch.setattr(
        module,
        "log_table",
        lambda trainer, name, _: made.append((name, trainer.current_epoch, trainer.sanity_checking)),
    )
    evaluation = InterventionEvaluation(["ucp"], **options)
    trainer = quiet_trainer(max_epochs=5, callbacks=[evaluation], num_sanity_val_steps=2)
    model = toy_model()
    trainer.fit(model, ToyData())
    trainer.validate(model, ToyData(), verbose=False)
    trainer.test(model, ToyData(), verbose=False)
    return made


def test_it_runs_every_nth_epoch_and_not_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    val = "val/intervention/curves"
    expected = [(val, 1, False), (val, 3, False), (val, 5, False)]
    assert made_at(monkeypatch, stages=["val"], every_n_epochs=2) == expected


def test_it_runs_in_both_stages_or_in_the_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [name for name, *_ in made_at(monkeypatch)] == ["test/intervention/curves"]
    both = [name for name, *_ in made_at(monkeypatch, stages=["val", "test"])]
    assert both == ["val/intervention/curves"] * 6 + ["test/intervention/curves"]


# ---------------------------------------------------------------- encodings


class Silent(CBMModule):
    """Keeps its predictions to itself."""

    def test_step(self, batch, batch_idx):
        super().test_step(batch, batch_idx)


def test_the_backbone_sees_every_batch_once() -> None:
    model = toy_model()
    expected = run(model, policies=EVERY, scope="batch")
    assert model.backbone.calls == 3
    silent = toy_model(kind=Silent)
    check_same(run(silent, policies=EVERY, scope="batch"), expected)
    assert silent.backbone.calls == 6


class Own(LightningModule):
    """A user's own model that owes nothing to `CBMModule`."""

    concept_set = ToyData().concept_set
    num_classes, task = CLASSES, "multiclass"

    def __init__(self, like: CBMModule) -> None:
        super().__init__()
        self.to_concepts, self.to_label = like.bottleneck.scores, like.head.linear

    def read_batch(self, batch):
        return dict(zip(("image", "concepts", "label"), batch, strict=True))

    def forward(self, batch):
        logits = self.to_concepts(batch["image"])
        return self.decide(ConceptOutput(Features(batch["image"]), logits, logits.sigmoid(), logits.sigmoid()))

    def decide(self, output):
        return Prediction(self.to_label(output.values), output)

    def intervene(self, prediction, corrections):
        output = prediction.concepts
        values = torch.where(corrections.mask, corrections.values, output.values)
        return self.decide(output.replace(probs=values, values=values))

    def test_step(self, batch, batch_idx): ...


@pytest.mark.parametrize("scope", ["single", "batch"])
def test_any_module_that_meets_the_protocol_is_served(scope: str) -> None:
    like = toy_model(backbone=Identity(WIDTH))
    expected = run(like, ForeignData(), EVERY, scope=scope, competence=0.9)
    check_same(run(Own(like), ForeignData(), EVERY, scope=scope, competence=0.9), expected)


def test_a_module_that_does_not_is_told_what_it_lacks() -> None:
    class Lacking(LightningModule):
        concept_set = ConceptSet(["a"])

        def test_step(self, batch, batch_idx): ...

    class Half(Lacking):
        num_classes = 2

        def read_batch(self, batch): ...

    with pytest.raises(TypeError, match=r"Lacking has no \['num_classes', 'read_batch'\]: use CBMModule, or give it"):
        run(Lacking(), ForeignData())
    with pytest.raises(TypeError, match=r"Half has no \['task', 'intervene', 'decide'\]"):
        run(Half(), ForeignData())


def test_a_module_that_predicts_something_else_is_told_so() -> None:
    class Tensors(Own):
        def forward(self, batch):
            return super().forward(batch).logits

    with pytest.raises(TypeError, match=r"Tensors returned Tensor; .* returns a Prediction\(logits, concepts\)"):
        run(Tensors(toy_model(backbone=Identity(WIDTH))), ForeignData())


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("scope", ["single", "batch"])
@pytest.mark.parametrize("bottleneck", [None, EmbeddingBottleneck], ids=["scalar", "embedding"])
def test_curves_do_not_depend_on_the_batch_size(bottleneck: Any, scope: str) -> None:
    model = toy_model(bottleneck and bottleneck(3))
    options = {"scope": scope, "competence": "uniform", "policies": EVERY}
    one, many = (run(model, ToyData(batch_size=size), **options) for size in (1, 64))
    check_same(one, many)
    check_same(run(model, ToyData(batch_size=10), block_size=7, **options), many)


def test_two_runs_are_the_same_and_another_seed_is_another_run() -> None:
    model = toy_model()
    options = {"competence": 0.7, "reading": "sample", "policies": ["rand"]}
    first = run(model, **options)
    torch.manual_seed(1234)
    check_same(run(model, **options), first)
    other = run(model, seed=1, **options)
    assert not torch.equal(first.curves["rand"]["loss"], other.curves["rand"]["loss"])


def test_without_a_correction_the_accuracy_is_that_of_the_test() -> None:
    model = toy_model()
    result = run(model, policies=EVERY)
    for policy in EVERY:
        assert (result.scores(policy)[:, 0] == plain_accuracy(model, toy_tensors(41, 2))).all()


def test_budgets_are_numbers_or_fractions() -> None:
    model = toy_model()
    every = run(model)
    assert every.budgets == [0, 1, 2, 3, 4]
    for budgets in ([2, 4], [0.5, 1.0], [0.3, 4]):
        some = run(model, budgets=budgets)
        assert some.budgets == [0, 2, 4]
        assert torch.equal(some.scores("rand"), every.scores("rand")[:, [0, 2, 4]])


def test_only_the_first_samples() -> None:
    model, rows = toy_model(), {name: x[:18] for name, x in toy_tensors(41, 2).items()}
    result = run(model, max_samples=18)
    assert result.samples == 18
    assert result.scores("ucp")[0, 0] == plain_accuracy(model, rows)
    assert result.scores("ucp")[0, -1] == accuracy_of_head(model, rows["concepts"], rows["label"])
    check_same(run(model, ToyData(batch_size=5), max_samples=18), result)


def test_an_independent_model_ends_as_the_head_on_true_concepts() -> None:
    torch.manual_seed(0)
    model = CBMModule(ToyBackbone(), concepts=ToyData().concept_set, num_classes=CLASSES, phases="independent", lr=0.05)
    quiet_trainer(max_epochs=6).fit(model, ToyData())
    rows = toy_tensors(41, 2)
    expected = accuracy_of_head(model, rows["concepts"], rows["label"])
    assert expected > plain_accuracy(model, rows)
    for options in ({}, {"unit": "group"}, {"scope": "batch"}, {"trainer": {"precision": "bf16-mixed"}}):
        result = run(model, policies=EVERY, **options)
        assert all((result.scores(policy)[:, -1] == expected).all() for policy in EVERY)


def test_mixed_precision_scores_in_single_precision() -> None:
    model, rows = toy_model(), toy_tensors(41, 2)
    result = run(model, policies=EVERY, trainer={"precision": "bf16-mixed"})
    for policy in EVERY:
        assert {curve.dtype for curve in result.curves[policy].values()} == {torch.float32}
        # the features are rounded, so a few samples near the border may fall on its other side
        assert result.scores(policy)[0, 0] == pytest.approx(float(plain_accuracy(model, rows)), abs=2.5 / 41)
        assert result.scores(policy)[0, -1] == accuracy_of_head(model, rows["concepts"], rows["label"])
    single = run(model, policies=["ucp"]).curves["ucp"]["loss"][0, 0]
    assert result.curves["ucp"]["loss"][0, 0] == pytest.approx(float(single), rel=0.02)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_models_in_other_precisions_are_evaluated_too(precision: str) -> None:
    model = toy_model()
    single = run(model, policies=EVERY, values="constant")
    other = run(model, policies=EVERY, values="constant", trainer={"precision": precision})
    for policy in EVERY:
        torch.testing.assert_close(other.scores(policy)[:, -1], single.scores(policy)[:, -1], atol=1.5 / 41, rtol=0)


def test_the_worst_group_and_the_weight_of_groups_of_ones_own() -> None:
    model = toy_model()
    unit = {"look": ["red", "wet"], "feel": ["small", "round"]}
    groups = torch.arange(41) % 2
    results = [
        run(model, loader(group=groups), unit=unit, costs={"feel": 3.0}),
        run(model, loader(hospital=groups), unit=unit, costs={"feel": 3.0}, subgroup_key="hospital"),
    ]
    check_same(*results)
    curves = results[0].curves["ucp"]
    assert curves["cost"][0].tolist() == [0.0, curves["cost"][0, 1], 4.0]
    halves = [{name: x[groups == g] for name, x in toy_tensors(41, 2).items()} for g in (0, 1)]
    assert curves["worst_group"][0, 0] == min(plain_accuracy(model, half) for half in halves)
    assert "worst_group" not in run(model, unit=unit).curves["ucp"]


def test_any_metric_of_the_label() -> None:
    model = toy_model()
    result = run(model, policies=["ucp"], task_metric=MulticlassCohenKappa(CLASSES))
    rows = toy_tensors(41, 2)
    with torch.no_grad():
        expected = MulticlassCohenKappa(CLASSES)(model.eval()(rows).logits, rows["label"])
    assert result.score_name == "MulticlassCohenKappa"
    assert result.scores("ucp")[0, 0] == pytest.approx(float(expected), abs=1e-6)


# ---------------------------------------------------------------- several at once


class Several(Silent):
    """A test step for several loaders."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        return {"prediction": self(self.read_batch(batch))}


@pytest.mark.parametrize("kind", [list, dict])
def test_every_test_loader_has_its_curves(kind: type) -> None:
    model = toy_model(kind=Several)
    loaders = [loader(2), loader(5, 23)]
    expected = [run(model, each, ["ucp"]) for each in loaders]
    evaluation = InterventionEvaluation(["ucp"])
    trainer = quiet_trainer(callbacks=[evaluation])
    trainer.test(model, loaders if kind is list else dict(zip("ab", loaders, strict=True)), verbose=False)
    check_same(evaluation.result, expected[0])
    for i, result in enumerate(expected):
        found = trainer.callback_metrics[f"test/intervention/ucp/auc/dataloader_idx_{i}"]
        assert found == pytest.approx(result.scalars()["ucp/auc"])
        assert Path(f"media/test/intervention/curves/dataloader_idx_{i}-step=0.csv").is_file()


def test_two_evaluations_in_one_trainer() -> None:
    model = toy_model()
    by_concept = InterventionEvaluation([UCP(), Rand()])
    by_group = InterventionEvaluation(["ucp"], unit="group", name="intervention_groups")
    trainer = quiet_trainer(callbacks=[by_concept, by_group])
    trainer.test(model, ToyData(), verbose=False)
    check_same(by_concept.result, run(model, policies=["ucp", "rand"]))
    found = trainer.callback_metrics
    for name, evaluation in {"intervention": by_concept, "intervention_groups": by_group}.items():
        assert found[f"test/{name}/ucp/auc"] == pytest.approx(evaluation.result.scalars()["ucp/auc"])
        assert Path(f"media/test/{name}/curves-step=0.csv").is_file()


def test_two_evaluations_do_not_mix_what_they_log() -> None:
    by_concept, by_group = (InterventionEvaluation(["ucp"], unit=unit) for unit in ("concept", "group"))
    trainer = quiet_trainer(callbacks=[by_concept, by_group])
    with pytest.raises(ValueError, match="name: two evaluations of one Trainer would log under 'intervention'"):
        trainer.test(toy_model(), ToyData(), verbose=False)
