"""`LeakageReport` in validation and test: of what, when, on how many processes, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from toy import CLASSES, WIDTH, ForeignData, ToyData, quiet_trainer

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import LeakageReport
from cbm_lightning.cli import main
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.metrics.leakage import Evidence, concept_task_leakage, cross_splits
from cbm_lightning.metrics.leakage.study import LeakageResult, Sightings, measure_leakage

ALL = ["ctl", "icl", "conditional_mi", "head_on_truth", "ois", "nis", "completeness"]
SAMPLES = 120


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Hidden(ToyData):
    """The label says whether a number is positive that no concept knows of, and whether the first concept holds."""

    @property
    def class_names(self) -> list[str]:
        return ["a", "b", "c", "d"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        rows = super().tensors(name)
        first, hidden = rows["concepts"][:, 0], (rows["image"][:, 5] > 0).float()
        return {**rows, "label": (first + 2 * hidden).long()}

    def bayes_accuracy(self) -> float:
        return 0.5


def hidden(**options: Any) -> Hidden:
    return Hidden(n=SAMPLES, n_eval=SAMPLES, **options)


def model(leak: float = 0.0, bottleneck: Any = None, **options: Any) -> CBMModule:
    """Scores that are the inputs of the concepts; the second one leaks, and the head knows how to read it."""
    torch.manual_seed(0)
    bottleneck = LinearBottleneck("logits") if bottleneck is None else bottleneck
    options = {"concepts": ToyData().concept_set, "num_classes": 4, **options}
    made = CBMModule(Identity(WIDTH), bottleneck, **options)
    if isinstance(bottleneck, LinearBottleneck):
        with torch.no_grad():
            scores = made.bottleneck.scores
            scores.weight.copy_(torch.eye(4, WIDTH))
            scores.weight[1, 5] = leak
            scores.bias.zero_()
            if made.num_classes == 4:
                first, second = torch.tensor([[-1.0, 1, -1, 1], [-1.0, -1, 1, 1]])
                made.head.linear.weight.zero_()
                made.head.linear.weight[:, :2].copy_(torch.stack([first, second], 1))
                made.head.linear.bias.zero_()
    return made


def run(made: LightningModule, data: Any = None, trainer: Any = None, **options: Any) -> tuple[Any, dict[str, float]]:
    """The result of a test, and what was logged."""
    report = LeakageReport(**{"repeats": 2, "folds": 3, **options})
    tester = quiet_trainer(callbacks=[report], **(trainer or {}))
    tester.test(made, hidden() if data is None else data, verbose=False)
    return report.result, {name: float(value) for name, value in tester.callback_metrics.items()}


# ---------------------------------------------------------------- numbers


def test_it_logs_what_the_measures_find_in_the_predictions() -> None:
    made = model(leak=3.0, bottleneck=LinearBottleneck("logits", extra_dims=2))
    result, logged = run(made, measures=ALL)
    rows = Hidden(n_eval=SAMPLES).tensors("test")
    with torch.no_grad():
        prediction = made.eval()(rows)
    values = prediction.concepts.values
    evidence = Evidence(values[:, :4, None], rows["concepts"], rows["label"], "multiclass", 4, values[:, 4:])
    correct = (prediction.logits.argmax(1) == rows["label"]).double()
    with torch.no_grad():
        corrected = torch.where(rows["concepts"] == 1, *made.bottleneck.value_range.flip(0))
        told = made.head.linear(torch.cat([corrected, values[:, 4:]], 1))
    sightings = Sightings(evidence, correct, (told.argmax(1) == rows["label"]).double(), rows["image"])
    expected = measure_leakage(sightings, cross_splits(SAMPLES, 3, 2), made.concept_set.names, ALL, 0, 0.5)
    found = {name.removeprefix("test/leakage/"): value for name, value in logged.items() if "/leakage/" in name}
    assert found == pytest.approx({k: v for k, v in expected.scalars().items() if v == v}, abs=1e-4)
    named = {"ctl", "icl", "conditional_mi", "conditional_mi_share", "conditional_mi_extra", "head_on_truth_acc"}
    named |= {"head_gap", "ceiling_gap", "ceiling_acc", "best_acc", "ois", "nis", "completeness", "samples"}
    assert named <= found.keys()
    assert result.sentences == expected.sentences
    table = pd.read_csv("media/test/leakage/concepts-step=0.csv")
    assert table["concept"].tolist() == list(made.concept_set.names)
    assert table["ctl"].tolist() == pytest.approx(
        concept_task_leakage(evidence.settled()).per_concept.tolist(), abs=1e-4
    )
    assert {"ctl_error", "conditional_mi", "conditional_mi_error", "ois_excess", "nis", "icl"} <= set(table.columns)


def test_it_says_what_leaks_and_through_which_concept(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        result, logged = run(model(leak=6.0), measures=["ctl", "conditional_mi", "head_on_truth"])
    [said] = [record.message for record in caplog.records if record.message.startswith("LeakageReport: ")]
    assert said == f"LeakageReport: {' '.join(result.sentences)}"
    assert "Label information leaks through the concepts (120 samples)." in said
    assert "lies above 0.500, the best that the true concepts allow on this data" in said
    assert "carry some of it, most: round (" in said
    assert "predicted concepts say more of the label than their true values do" in said
    assert "phases: independent" in said
    assert logged["test/leakage/conditional_mi"] > 0.3
    # the head reads what leaks, which the truth does not say
    assert logged["test/leakage/head_gap"] > 0.2
    assert pd.read_csv("media/test/leakage/findings-step=0.csv")["finding"].tolist() == result.sentences


def test_it_says_that_nothing_was_found_where_nothing_leaks() -> None:
    result, logged = run(model(), measures=["ctl", "conditional_mi", "head_on_truth"])
    assert result.sentences[0] == "No leakage of label information was found (120 samples)."
    assert any("does not lie above 0.500" in sentence for sentence in result.sentences)
    assert logged["test/leakage/conditional_mi"] < 0.05


def test_embeddings_have_several_numbers_a_concept() -> None:
    made = model(bottleneck=EmbeddingBottleneck(3))
    result, _ = run(made, measures=["ctl"])
    with torch.no_grad():
        values = made.eval()(Hidden(n_eval=SAMPLES).tensors("test")).concepts.values.unflatten(1, (4, 3))
    rows = Hidden(n_eval=SAMPLES).tensors("test")
    by_hand = concept_task_leakage(Evidence(values, rows["concepts"], rows["label"], "multiclass", 4).settled())
    assert result.measurements["ctl"].per_concept.tolist() == pytest.approx(by_hand.per_concept.tolist(), abs=1e-4)


@pytest.mark.parametrize("reads", ["values", "logits", "probs"])
def test_what_represents_a_concept(reads: str) -> None:
    made = model(leak=2.0, bottleneck=LinearBottleneck("hard"))
    result, _ = run(made, measures=["ctl"], reads=reads)
    rows = Hidden(n_eval=SAMPLES).tensors("test")
    with torch.no_grad():
        output = made.eval()(rows).concepts
    values = getattr(output, reads).unsqueeze(-1)
    by_hand = concept_task_leakage(Evidence(values, rows["concepts"], rows["label"], "multiclass", 4).settled())
    assert result.measurements["ctl"].value == pytest.approx(by_hand.value, abs=1e-6)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_labels(task: str) -> None:
    class Others(Hidden):
        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            bits = torch.stack([rows["label"] % 2, rows["label"] // 2], 1)
            return {**rows, "label": bits[:, 1:] if task == "binary" else bits}

        @property
        def class_names(self) -> list[str]:
            return ["no", "yes"]

        def bayes_accuracy(self) -> None:
            return None

        def annotations(self, split: str) -> tuple[Tensor, Tensor]:
            raise KeyError(split)

    made = model(leak=6.0, task=task, num_classes=2)
    result, logged = run(made, Others(n_eval=SAMPLES), measures=["ctl", "conditional_mi", "head_on_truth"])
    assert logged["test/leakage/conditional_mi"] > 0.3
    assert result.measurements["head_on_truth"].details["acc"] == pytest.approx(logged["test/label_acc"])
    assert "test/leakage/best_acc" not in logged


def test_unknown_and_real_valued_concepts() -> None:
    class Gaps(Hidden):
        @property
        def concept_set(self) -> ConceptSet:
            return ConceptSet(["red", "round", "small", "wet"], kinds=["binary", "binary", "binary", "real"])

        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            concepts = rows["concepts"].clone()
            concepts[:, 3] = rows["image"][:, 3]
            concepts[:30, 0] = torch.nan
            return {**rows, "concepts": concepts}

    data = Gaps(n_eval=SAMPLES)
    made = model(leak=6.0, concepts=data.concept_set)
    result, logged = run(made, data, measures=["ctl", "conditional_mi", "head_on_truth", "ois", "nis"])
    assert result.measurements["conditional_mi"].details["samples"] == SAMPLES - 30
    assert logged["test/leakage/conditional_mi"] > 0.3
    assert all(value == value for name, value in logged.items() if "/leakage/" in name)


def test_incomplete_annotations_leave_a_measure_out() -> None:
    class Never(Hidden):
        def tensors(self, name: str) -> dict[str, Tensor]:
            rows = super().tensors(name)
            holes = torch.nn.functional.one_hot(torch.arange(len(rows["label"])) % 4, 4).bool()
            return {**rows, "concepts": rows["concepts"].masked_fill(holes, torch.nan)}

    measures = ["ctl", "conditional_mi", "head_on_truth", "ois", "nis"]
    result, logged = run(model(leak=6.0), Never(n_eval=SAMPLES), measures=measures)
    assert "test/leakage/conditional_mi" not in logged
    assert result.sentences[-1].endswith("of 120 samples 0 are annotated completely.")
    # the rest is measured all the same
    assert result.measurements["ctl"].per_concept[1] > 5 * result.measurements["ctl"].concept_error[1]
    assert all(value == value for name, value in logged.items() if "/leakage/" in name)


def test_probes_can_be_fitted_on_the_validation_split() -> None:
    result, logged = run(model(leak=6.0), fit_on="val", measures=["conditional_mi", "head_on_truth", "ctl"])
    assert logged["test/leakage/samples"] == SAMPLES
    assert logged["test/leakage/conditional_mi"] > 0.3
    other, _ = run(model(leak=6.0), measures=["ctl"])
    # what needs no probes is measured on the evaluated split alone
    assert result.measurements["ctl"].value == pytest.approx(other.measurements["ctl"].value)


def test_a_draw_of_the_samples() -> None:
    found = [run(model(), measures=["ctl"], max_samples=60, seed=seed) for seed in (0, 0, 1)]
    assert [logged["test/leakage/samples"] for _, logged in found] == [60] * 3
    values = [result.measurements["ctl"].per_concept.tolist() for result, _ in found]
    assert values[0] == values[1] != values[2]


def test_batches_of_any_size_give_the_same_numbers() -> None:
    measures = ["ctl", "conditional_mi", "head_on_truth"]
    one, other = (run(model(leak=1.0), hidden(batch_size=size), measures=measures)[1] for size in (7, 120))
    leaks = {name: value for name, value in one.items() if "/leakage/" in name}
    assert leaks == pytest.approx({name: other[name] for name in leaks}, abs=1e-5)


def test_mixed_precision() -> None:
    result, logged = run(model(leak=6.0), trainer={"precision": "bf16-mixed"}, measures=["conditional_mi", "ctl"])
    assert logged["test/leakage/conditional_mi"] > 0.3
    assert result.samples == SAMPLES


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{processes}.json").read_text()) for processes in (1, 2))
    assert one["test/leakage/samples"] == 41
    assert {name: two[name] for name in one} == pytest.approx(one, abs=1e-5)


# ---------------------------------------------------------------- when


def test_validation_of_a_fit() -> None:
    report = LeakageReport(["ctl"], stages=["val"], every_n_epochs=2)
    seen = []
    report.finish = lambda trainer, module, stage, old=report.finish: (  # type: ignore[method-assign]
        old(trainer, module, stage),
        seen.append("val/leakage/ctl" in trainer.callback_metrics),
    )
    fitter = quiet_trainer(callbacks=[report], max_epochs=2, num_sanity_val_steps=1)
    fitter.fit(model(), hidden())
    assert seen == [False, True]
    assert isinstance(report.result, LeakageResult)


def test_too_few_samples_stop_no_fit_but_a_test() -> None:
    few = Hidden(n=96, n_eval=20)
    report = LeakageReport(["conditional_mi"], stages=["val", "test"])
    with pytest.warns(UserWarning, match="LeakageReport is left out of this validation: probes need at least 50"):
        quiet_trainer(callbacks=[report]).fit(model(), few)
    with pytest.raises(ValueError, match="probes need at least 50 samples for 5 folds, got 20"):
        quiet_trainer(callbacks=[report]).test(model(), few, verbose=False)


def test_the_best_that_concepts_allow_in_a_test_says_nothing_of_validation() -> None:
    validator = quiet_trainer(callbacks=[LeakageReport(["head_on_truth"], stages=["val"], folds=3)])
    validator.validate(model(), hidden(), verbose=False)
    assert "val/leakage/ceiling_acc" in validator.callback_metrics
    assert "val/leakage/best_acc" not in validator.callback_metrics


def test_a_stage_that_is_not_asked_for() -> None:
    result, logged = run(model(), stages=["val"])
    assert result is None
    assert not [name for name in logged if "leakage" in name]


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measures": ["leak"]}, "measures: expected a list of"),
        ({"measures": "ctl"}, "measures: expected a list of"),
        ({"measures": []}, "measures: expected a list of"),
        ({"reads": "scores"}, "reads: expected one of"),
        ({"fit_on": "train"}, "fit_on: expected 'folds' or 'val'"),
        ({"fit_on": "val", "stages": ["val"]}, "cannot be judged on it"),
        ({"max_samples": 10}, "max_samples: expected at least 50, got 10"),
        ({"folds": 2}, "folds: expected at least 3"),
        ({"repeats": 1}, "repeats: expected at least 2"),
        ({"stages": ["train"]}, "stages: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeakageReport(**options)


def test_modules_without_what_it_reads() -> None:
    class Bare(LightningModule):
        concept_set, task, num_classes = ToyData().concept_set, "multiclass", CLASSES

        def test_step(self, batch, batch_idx):
            pass

    with pytest.raises(TypeError, match=r"Bare has no \['read_batch'\]"):
        run(Bare(), measures=["ctl"])
    with pytest.raises(TypeError, match="leave 'head_on_truth' out of measures"):
        run(Bare(), measures=["head_on_truth"])


def test_a_module_of_ones_own() -> None:
    """Any module that speaks the protocol, with predictions that its step keeps to itself."""

    class Own(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model(leak=6.0)
            self.concept_set, self.task, self.num_classes = self.inner.concept_set, "multiclass", 4

        def read_batch(self, batch):
            return batch

        def forward(self, batch):
            return self.inner(batch)

        def test_step(self, batch, batch_idx):
            pass

    _, logged = run(Own(), measures=["ctl", "conditional_mi"])
    _, expected = run(model(leak=6.0), measures=["ctl", "conditional_mi"])
    assert logged["test/leakage/conditional_mi"] == pytest.approx(expected["test/leakage/conditional_mi"], abs=1e-6)


def test_concepts_that_nobody_annotated() -> None:
    made = model()
    made.bottleneck.discovers = True
    with pytest.raises(ValueError, match="LinearBottleneck finds concepts of its own, which nobody annotated"):
        run(made)

    class Free(CBMModule):
        def test_step(self, batch, batch_idx):
            pass

    plain = Free(Identity(WIDTH), LinearBottleneck(), concepts=4, num_classes=CLASSES)
    with pytest.raises(ValueError, match="the batches have no 'concepts'"):
        run(plain, ForeignData(with_concepts=False), measures=["ctl"])


def test_namesakes_are_refused() -> None:
    twins = [LeakageReport(["ctl"]), LeakageReport(["ois"])]
    with pytest.raises(ValueError, match="two evaluations of one Trainer would log under 'leakage'"):
        quiet_trainer(callbacks=twins).test(model(), hidden(), verbose=False)


@pytest.mark.filterwarnings("ignore:cbm test without --ckpt_path")
def test_a_report_is_added_to_the_test_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cbm"])
    given = ["test", "--config", "quickstart", "--config", "leakage", "--data.num_test=64", "--data.num_train=64"]
    given += ["--data.num_val=16", "--data.kept_groups=[beak]", "--trainer.enable_progress_bar=false"]
    trainer = main(given).trainer
    assert trainer.callback_metrics["test/leakage/samples"] == 64
    assert trainer.callback_metrics["test/leakage/best_acc"] == pytest.approx(trainer.datamodule.bayes_accuracy())
    # the recipe's own callbacks are still there
    assert trainer.checkpoint_callback.monitor == "val/loss"


def _on_processes(folder: Path) -> None:
    """What `test_two_processes_measure_what_one_does` compares: 41 samples, so that one process has one more."""
    torch.set_num_threads(1)
    os.chdir(folder)
    for processes in (1, 2):
        report = LeakageReport(["ctl", "conditional_mi", "head_on_truth"], folds=3, repeats=2)
        strategy = "auto" if processes == 1 else "ddp_fork"
        tester = quiet_trainer(callbacks=[report], devices=processes, strategy=strategy)
        scores = tester.test(model(leak=3.0), Hidden(n_eval=41, batch_size=4), verbose=False)[0]
        (folder / f"{processes}.json").write_text(json.dumps({k: v for k, v in scores.items() if "/leakage/" in k}))


if __name__ == "__main__":
    _on_processes(Path(sys.argv[1]))
