"""Where curves go, what the picture shows, what is warned of, and what is refused before anything runs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from toy import ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import run, toy_model

from cbm_lightning import CBMModule, ConceptSet, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.callbacks.intervention_figure import RANDOM, draw_curves
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.interventions.leakage_check import LeakageWarning
from cbm_lightning.interventions.policies import CooP
from cbm_lightning.interventions.study import StudyResult
from cbm_lightning.interventions.values import CollapseWarning

CURVES, FIGURE = "test/intervention/curves", "test/intervention/figure"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def quiet_model() -> CBMModule:
    """An untrained model whose accuracy hardly depends on its concepts."""
    torch.manual_seed(0)
    return CBMModule(ToyBackbone(), concepts=ToyData().concept_set, num_classes=3)


def evaluate(**trainer: Any) -> InterventionEvaluation:
    evaluation = InterventionEvaluation(["rand", "ucp"], num_seeds=3)
    quiet_trainer(callbacks=[evaluation], **trainer).test(quiet_model(), ToyData(), verbose=False)
    return evaluation


def check_picture(pixels: np.ndarray) -> None:
    assert pixels.shape == (660, 960, 3)
    # the lines of RAND and UCP, on white
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour) for colour, count in zip(colours.tolist(), counts, strict=True) if count > 200}
    assert {(255, 255, 255), (0x00, 0x72, 0xB2), (0x80, 0x80, 0x80)} <= found


@pytest.mark.parametrize("kind", ["none", "csv"])
def test_without_a_logger_of_pictures_there_are_files(tmp_path: Path, kind: str) -> None:
    logger = CSVLogger(tmp_path, "runs", "a") if kind == "csv" else False
    evaluation = evaluate(logger=logger, default_root_dir=tmp_path)
    media = tmp_path / ("runs/a/media" if kind == "csv" else "media")
    table = pd.read_csv(media / f"{CURVES}-step=0.csv")
    assert list(table) == ["policy", "seed", "budget", "label_acc", "loss", "concepts", "cost", "concept_acc"]
    assert table.groupby("policy").size().to_dict() == {"rand": 15, "ucp": 5}
    ucp = table[table["policy"] == "ucp"]
    assert ucp["label_acc"].tolist() == pytest.approx(evaluation.result.scores("ucp")[0].tolist())
    assert ucp["concept_acc"].isna().tolist() == [False] * 4 + [True]
    check_picture(np.asarray(Image.open(media / f"{FIGURE}-step=0.png")))
    if kind == "csv":
        logger.save()
        scalars = pd.read_csv(tmp_path / "runs/a/metrics.csv").iloc[0]
        assert scalars["test/intervention/ucp/auc"] == pytest.approx(evaluation.result.scalars()["ucp/auc"])


def test_tensorboard_gets_scalars_a_table_and_a_picture(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, "runs", "a")
    evaluate(logger=logger, default_root_dir=tmp_path)
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert {"test/intervention/rand/auc", "test/intervention/ucp/final"} <= set(events.Tags()["scalars"])
    [image] = events.Images(FIGURE)
    assert (image.width, image.height) == (960, 660)
    text = events.Tensors(f"{CURVES}/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines()[0].startswith("| policy | seed | budget | label_acc | loss |")
    assert len(text.splitlines()) == 2 + 20
    assert not (Path(logger.log_dir) / "media").exists()


def test_wandb_offline_gets_scalars_a_table_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="toy", save_dir=tmp_path, offline=True)
    evaluation = evaluate(logger=logger, default_root_dir=tmp_path)
    auc = logger.experiment.summary["test/intervention/ucp/auc"]
    wandb.finish()
    assert auc == pytest.approx(evaluation.result.scalars()["ucp/auc"])
    [run_folder] = (tmp_path / "wandb").glob("offline-run-*")
    [picture] = run_folder.glob(f"files/media/images/{FIGURE}_*.png")
    check_picture(np.asarray(Image.open(picture).convert("RGB")))
    [found] = run_folder.glob(f"files/media/table/{CURVES}_*.table.json")
    table = json.loads(found.read_text())
    assert table["columns"][:4] == ["policy", "seed", "budget", "label_acc"]
    assert len(table["data"]) == 20


def test_the_picture_shows_a_line_a_policy_and_the_spread_of_trials() -> None:
    trials = torch.tensor([[0.5, 0.6, 0.7], [0.5, 0.4, 0.9]])
    curves = {"rand": {"label_acc": trials}, "ucp": {"label_acc": torch.tensor([[0.5, 0.8, 0.8]])}}
    [axes] = draw_curves(StudyResult([0, 1, 4], 4, "label_acc", curves, 10), "group", "title").axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["rand (2 seeds)"].get_xydata(), [[0, 0.5], [1, 0.5], [4, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(lines["ucp"].get_ydata(), [0.5, 0.8, 0.8], rtol=1e-6)
    assert lines["rand (2 seeds)"].get_color() == RANDOM
    [band] = axes.collections
    box = band.get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (pytest.approx(0.4), pytest.approx(0.9))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("groups corrected a sample", "label accuracy")
    assert axes.get_title() == "title"


# ---------------------------------------------------------------- leakage


def leaky() -> tuple[CBMModule, dict[str, Tensor]]:
    """The predicted concept says the label, which the true concept says for 60 of 100 samples."""
    model = CBMModule(Identity(1), concepts=["a"], num_classes=2)
    with torch.no_grad():
        model.bottleneck.scores.weight.fill_(2.0)
        model.bottleneck.scores.bias.zero_()
        model.head.linear.weight.copy_(torch.tensor([[0.0], [8.0]]))
        model.head.linear.bias.copy_(torch.tensor([0.0, -4.0]))
    label = torch.arange(100) % 2
    concept = torch.where(torch.arange(100) < 60, label, 1 - label)
    return model, {"embedding": (2.0 * label - 1).view(-1, 1), "concepts": concept.float().view(-1, 1), "label": label}


def judge(**options: Any) -> StudyResult:
    model, rows = leaky()
    rows |= options.pop("more", {})
    train = DataLoader(TensorDataset(rows), batch_size=32, collate_fn=TensorDataset.collate)
    return run(model, train, ["ucp"], **options)


def test_a_leak_is_told_with_its_numbers() -> None:
    message = (
        r"test: .* \(100 samples\)\. ucp: from 1\.000 uncorrected to 0\.600 with 1 concept corrected\. .*\(leakage\)"
    )
    with pytest.warns(LeakageWarning, match=message):
        result = judge()
    assert result.scores("ucp")[0].tolist() == [1.0, pytest.approx(0.6)]


def test_a_fall_in_validation_is_told_too_but_not_in_every_epoch() -> None:
    model, rows = leaky()
    model.lr = 1e-9
    data = DataLoader(TensorDataset(rows), batch_size=32, collate_fn=TensorDataset.collate)
    trainer = quiet_trainer(callbacks=[InterventionEvaluation(["ucp"], stages=["val"])], num_sanity_val_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeakageWarning)
        trainer.fit(model, data, data)
    with pytest.warns(LeakageWarning, match="val: correct interventions"):
        trainer.validate(leaky()[0], data, verbose=False)


@pytest.mark.parametrize("competence", [0.9, {"a": 0.5}, "uniform"])
def test_mistakes_of_the_person_are_no_leak(competence: Any) -> None:
    result = judge(competence=competence)
    assert result.scores("ucp")[0, -1] < 0.8


def test_answers_that_are_wrong_on_purpose_are_no_leak() -> None:
    """``on_invisible="zero"`` says "absent" of what cannot be seen."""
    invisible = torch.zeros(100, 1)
    rows = leaky()[1]
    # every concept is true to the label, and none is visible
    told = judge(on_invisible="zero", more={"concepts": rows["label"].float().view(-1, 1), "certainty": invisible})
    assert told.scores("ucp")[0].tolist() == [1.0, 0.5]


class NoisyLabels(ToyData):
    """A quarter of the labels is drawn."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        n, g = 600 if name == "train" else 6000, torch.Generator().manual_seed(9)
        rows = toy_tensors(n, ["train", "val", "test"].index(name))
        drawn = torch.randint(3, (n,), generator=g)
        return {**rows, "label": torch.where(torch.rand(n, generator=g) < 0.25, drawn, rows["label"])}


def test_an_oracle_that_puts_off_what_hurts_is_no_leak() -> None:
    """It knows the label, so it begins with what helps; a head that learned from annotations has nothing to leak."""
    torch.manual_seed(0)
    model = CBMModule(ToyBackbone(), concepts=ToyData().concept_set, num_classes=3, phases="independent", lr=0.05)
    quiet_trainer(max_epochs=4).fit(model, NoisyLabels(batch_size=64))
    result = run(model, NoisyLabels(batch_size=512), ["greedy", "ucp"])
    assert result.scores("greedy")[0, 2] > result.scores("greedy")[0, -1] > result.scores("greedy")[0, 0]


# ---------------------------------------------------------------- what is refused, or warned of


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policies": ["upc"]}, r"policies: nothing is called 'upc'; did you mean 'ucp'"),
        ({"policies": "ucp"}, r"policies: expected a list of names, got the single text 'ucp'"),
        ({"policies": []}, r"policies: expected at least one"),
        ({"policies": ["coop", CooP()]}, r"policies: several are called \['coop'\]"),
        ({"values": "percentiles"}, r"values: nothing is called 'percentiles'; did you mean 'percentile'"),
        ({"stages": ["train"]}, r"stages: expected 'val', 'test' or both, got \['train'\]"),
        ({"stages": []}, r"stages: expected 'val', 'test' or both, got \[\]"),
        ({"every_n_epochs": 0}, r"every_n_epochs: expected at least 1, got 0"),
        ({"max_samples": 0}, r"max_samples: expected at least 1, got 0"),
        ({"fit_batches": 0}, r"fit_batches: expected at least 1, got 0"),
        ({"block_size": 0}, r"block_size: expected at least 1, got 0"),
        ({"num_seeds": 0}, r"num_seeds: expected at least 1, got 0"),
        ({"unit": "concepts"}, r"unit: expected 'concept', 'group' or a mapping .*, got 'concepts'"),
        ({"unit": {"a": ["red", "wet"]}}, r"in no group are \['round', 'small'\]"),
        ({"unit": {"a": ["red", "rund"]}}, r"no concept is called 'rund'; did you mean"),
        ({"group_reduce": "median"}, r"group_reduce: expected 'mean', 'max' or 'sum', got 'median'"),
        ({"scope": "all"}, r"scope: expected one of \('single', 'batch'\), got 'all'"),
        ({"reading": "rounded"}, r"reading: expected one of .*, got 'rounded'"),
        ({"unanswered": "ask"}, r"unanswered: expected one of .*, got 'ask'"),
        ({"label_level": "group"}, r"label_level: expected one of .*, got 'group'"),
        ({"on_invisible": "guess"}, r"on_invisible: expected one of .*, got 'guess'"),
        ({"competence": 1.5}, r"competence: expected probabilities in \[0, 1\], got 1\.5"),
        ({"competence": {"blue": 0.5}}, r"no concept is called 'blue'"),
        ({"budgets": [5]}, r"budgets: expected numbers of units from 0 to 4, or fractions in \[0, 1\], got 5"),
        ({"budgets": [1.5]}, r"budgets: expected numbers of units .*, got 1\.5"),
        ({"costs": {"blue": 1.0}}, r"costs: expected units such as .*, got also \['blue'\]"),
        ({"costs": -1.0}, r"costs: expected finite numbers of at least 0, got -1"),
        ({"average": "weighted"}, r"average: expected 'micro' or 'macro', got 'weighted'"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    model = toy_model()

    def fit() -> None:
        quiet_trainer(callbacks=[InterventionEvaluation(**options)]).fit(model, ToyData())

    with pytest.raises(ValueError, match=message):
        fit()
    assert model.backbone.calls == 0


def test_data_without_annotations_is_refused() -> None:
    from cbm_lightning import SimilarityBottleneck

    concepts = ConceptSet(ToyData().concept_set.names, embeddings=torch.randn(4, 8))
    model = CBMModule(ToyBackbone(), SimilarityBottleneck(), concepts=concepts, num_classes=3)
    with pytest.raises(ValueError, match="the batch has no 'concepts'.*Intervention curves need annotated concepts"):
        run(model, ForeignData(with_concepts=False))


def test_a_concept_that_no_correction_moves_is_named() -> None:
    model = quiet_model_with_dead("small")
    with pytest.warns(CollapseWarning, match="'absent' and 'present' meet for 1 concepts, 'small'"):
        run(model, policies=["ucp"], values="percentile")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CollapseWarning)
        run(model, policies=["ucp"], values="binary")


def quiet_model_with_dead(name: str) -> CBMModule:
    """A model that predicts one concept the same for every sample."""
    torch.manual_seed(0)
    model = CBMModule(ToyBackbone(), LinearBottleneck("logits"), concepts=ToyData().concept_set, num_classes=3)
    torch.nn.init.zeros_(model.bottleneck.scores.weight[model.concept_set.index(name)])
    return model
