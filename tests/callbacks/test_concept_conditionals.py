"""Conditional probabilities in validation and test: what they are, where they go, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.bottlenecks import EnergyBottleneck
from cbm_lightning.callbacks import ConceptConditionals
from cbm_lightning.callbacks.concept_conditionals import annotated_share
from cbm_lightning.callbacks.conditionals_figure import draw_conditionals

NAMES = ["red", "round", "small", "wet"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(bottleneck: Any = None, **options: Any) -> CBMModule:
    torch.manual_seed(0)
    given = {"concepts": ToyData().concept_set, "num_classes": CLASSES, "class_names": ["apple", "stone", "plum"]}
    return CBMModule(ToyBackbone(), bottleneck or EnergyBottleneck(8, steps=3), **{**given, **options})


def run(watcher: ConceptConditionals, made: CBMModule, **options: Any) -> dict[str, float]:
    tester = quiet_trainer(callbacks=[watcher], **options)
    tester.test(made, ToyData(), verbose=False)
    return {name: float(value) for name, value in tester.callback_metrics.items()}


def test_probabilities_are_those_of_the_bottleneck_on_the_predictions_of_the_split() -> None:
    made, watcher = model(), ConceptConditionals("stone")
    metrics = run(watcher, made)
    rows = toy_tensors(41, 2)
    with torch.no_grad():
        probs = made.eval()(rows).concepts.probs
        expected = made.bottleneck.concepts_given_label(probs)
        pairs = made.bottleneck.concepts_given_label_and_concept(probs, 1)
    torch.testing.assert_close(watcher.given_label, expected)
    torch.testing.assert_close(watcher.given_label_and_concept, pairs, equal_nan=True)
    share = torch.stack([rows["concepts"][rows["label"] == y].mean(0) for y in range(CLASSES)])
    torch.testing.assert_close(annotated_share(rows["concepts"], rows["label"], CLASSES), share)
    assert metrics["test/conditionals/error"] == pytest.approx(float((expected - share).abs().mean()))


def test_tables_and_figure_go_to_the_loggers(tmp_path: Path) -> None:
    watcher = ConceptConditionals(label=2, name="pairs")
    logger = CSVLogger(tmp_path, name="run", version=0)
    run(watcher, model(), logger=logger)
    media = tmp_path / "run" / "version_0" / "media" / "test" / "pairs"
    marginal = pd.read_csv(media / "given_label-step=0.csv")
    assert list(marginal.columns) == ["class", "concept", "probability", "annotated"]
    assert marginal["class"].tolist() == ["apple"] * 4 + ["stone"] * 4 + ["plum"] * 4
    assert marginal["concept"].tolist() == NAMES * 3
    assert marginal["probability"].tolist() == pytest.approx(watcher.given_label.flatten().tolist(), abs=1e-6)
    pairs = pd.read_csv(media / "given_label_and_concept-step=0.csv")
    assert pairs[["class", "given", "concept"]].to_numpy().tolist() == [["plum", j, k] for j in NAMES for k in NAMES]
    assert pairs["probability"].tolist() == pytest.approx(
        watcher.given_label_and_concept.flatten().tolist(), abs=1e-6, nan_ok=True
    )
    with Image.open(media / "figure-step=0.png") as figure:
        assert min(figure.size) > 100


def test_validation_counts_where_it_is_asked_for() -> None:
    watcher = ConceptConditionals(stages=["val"], every_n_epochs=2)
    trainer = quiet_trainer(callbacks=[watcher], max_epochs=1)
    trainer.fit(model(), ToyData())
    assert watcher.given_label is None
    trainer = quiet_trainer(callbacks=[watcher], max_epochs=2)
    trainer.fit(model(), ToyData())
    assert 0 <= float(trainer.callback_metrics["val/conditionals/error"]) <= 1
    assert watcher.given_label.shape == (CLASSES, 4)


class Unannotated(ToyData):
    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        rows = super().tensors(name)
        return {**rows, "concepts": torch.full_like(rows["concepts"], torch.nan)}


def test_annotations_are_not_needed() -> None:
    watcher = ConceptConditionals()
    tester = quiet_trainer(callbacks=[watcher])
    tester.test(model(), Unannotated(), verbose=False)
    assert watcher.given_label.isfinite().all()
    assert tester.callback_metrics["test/conditionals/error"].isnan()


def test_the_figure_shows_both_tables_and_leaves_out_names_that_nobody_could_read() -> None:
    marginal, pairs = torch.rand(3, 4), torch.rand(4, 4)
    pairs[1] = torch.nan
    figure = draw_conditionals(marginal, pairs, ["apple", "stone", "plum"], NAMES, 1)
    left, right = figure.axes[:2]
    assert [text.get_text() for text in left.get_yticklabels()] == ["apple", "stone", "plum"]
    assert [text.get_text() for text in right.get_yticklabels()] == NAMES
    assert right.get_title() == "p(concept | row's concept, stone)"
    shown = torch.as_tensor(left.images[0].get_array().data)
    torch.testing.assert_close(shown, marginal)
    names = [str(k) for k in range(112)]
    large = draw_conditionals(torch.rand(200, 112), torch.rand(112, 112), [str(y) for y in range(200)], names, 0)
    assert large.axes[0].get_yticklabels() == []
    assert max(large.get_size_inches()) < 20


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match="LinearBottleneck has no .* knows no probabilities of concepts given a class"):
        run(ConceptConditionals(), model(LinearBottleneck()))
    with pytest.raises(ValueError, match="label: expected a class from 0 to 2 or its name, got 3"):
        run(ConceptConditionals(3), model())
    with pytest.raises(ValueError, match="got 'pear'"):
        run(ConceptConditionals("pear"), model())
    with pytest.raises(ValueError, match="exclude each other, got a multilabel task"):
        run(ConceptConditionals(), model(task="multilabel"))
    with pytest.raises(ValueError, match="stages: expected"):
        ConceptConditionals(stages=[])
    with pytest.raises(ValueError, match="name: two evaluations"):
        quiet_trainer(callbacks=[ConceptConditionals(), ConceptConditionals(1)]).test(model(), ToyData())
