from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from cbm_lightning import CBMModule
from cbm_lightning.cli import command, main

TOY = """
seed_everything: 1
trainer:
  max_epochs: 2
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  logger: false
  log_every_n_steps: 1
model:
  class_path: CBMModule
  init_args:
    backbone: {class_path: toy.ToyBackbone, init_args: {width: 16}}
    bottleneck: {class_path: LinearBottleneck, init_args: {link: logits}}
    phases: sequential
    optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}
    lr: 0.1
data:
  class_path: toy.ToyData
"""


@pytest.fixture
def toy_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import toy  # noqa: F401  the CLI finds classes that are imported, or importable by path

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])
    (tmp_path / "toy.yaml").write_text(TOY)
    return "toy.yaml"


def toy_labels() -> list[int]:
    from toy import toy_tensors

    return toy_tensors(41, seed=2)["label"].tolist()


def test_fit_tests_at_the_end_and_saves_the_resolved_config(toy_config: str, tmp_path: Path) -> None:
    cli = main(["fit", "-c", toy_config, "--model.label_smoothing=0.1"])
    assert "test/label_acc" in cli.trainer.callback_metrics
    assert cli.model.label_smoothing == 0.1
    assert (len(cli.model.concept_set), cli.model.num_classes) == (4, 3)  # linked from the datamodule
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["model"]["init_args"]["label_smoothing"] == 0.1
    checkpoint = next((tmp_path / "checkpoints").glob("*.ckpt"))
    inside = yaml.safe_load(torch.load(checkpoint, weights_only=True)["config"])
    assert inside["model"]["init_args"] == saved["model"]["init_args"]

    restored = CBMModule.load_from_checkpoint(str(checkpoint))
    assert torch.equal(restored.head.linear.weight, cli.model.head.linear.weight)
    fitted = cli.trainer.callback_metrics["test/label_acc"]
    tested = main(["test", "-c", toy_config, "--ckpt_path", str(checkpoint)])
    assert tested.trainer.callback_metrics["test/label_acc"] == fitted
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == saved  # a test does not replace it
    predicted = main(["predict", "-c", toy_config, "--ckpt_path", str(checkpoint)])
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert len(table) == len(predicted.datamodule.splits["test"])
    assert {"index", "predicted", "probability: plum", "concept: round"} <= set(table.columns)
    accuracy = (table["predicted"].map(predicted.model.class_names.index) == toy_labels()).mean()
    assert accuracy == pytest.approx(float(fitted))


def test_the_console_script_reports_success(toy_config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"cbm": "cbm_lightning.cli:command"}
    monkeypatch.setattr(sys, "argv", ["cbm", "validate", "-c", toy_config])
    assert command() is None


def test_test_without_a_checkpoint_warns(toy_config: str) -> None:
    with pytest.warns(UserWarning, match="without --ckpt_path judges the weights that the model starts with"):
        main(["test", "-c", toy_config])


def test_what_the_user_typed_survives_the_link(toy_config: str) -> None:
    cli = main(
        ["validate", "-c", toy_config, "--model.concepts", '["red","round","small","wet"]', "--model.num_classes=3"]
    )
    assert cli.model.class_names is None
    with pytest.raises(ValueError, match="the model has 5 concepts, ToyData has 4"):
        main(["validate", "-c", toy_config, "--model.concepts=5"])


def test_a_datamodule_without_the_attributes_gets_a_helpful_error(toy_config: str) -> None:
    with pytest.raises(ValueError, match="ForeignData has no `concept_set`: pass model.concepts"):
        main(["fit", "-c", toy_config, "--data=toy.ForeignData"])
    cli = main(["fit", "-c", toy_config, "--data=toy.ForeignData", "--model.concepts=4", "--model.num_classes=3"])
    assert "test/label_acc" in cli.trainer.callback_metrics


def test_a_users_own_module_runs_under_the_same_command(toy_config: str) -> None:
    arguments = ["fit", "-c", toy_config, "--model=lightning.pytorch.demos.boring_classes.BoringModel"]
    cli = main([*arguments, "--data=lightning.pytorch.demos.boring_classes.BoringDataModule"])
    assert cli.trainer.global_step > 0


def test_unknown_recipes_are_listed(toy_config: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", "quickstat"])
    message = capsys.readouterr().err
    assert "no file and no recipe is called 'quickstat'" in message
    assert "'quickstart'" in message
