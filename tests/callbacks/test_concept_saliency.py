"""Concept saliency in validation and test: which numbers, when, of which samples, and where they go."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor
from toy import quiet_trainer
from toy_images import NAMES, Asked, ForeignImages, Rows, ToyImages, batch_of, looker, toy_model

from cbm_lightning import CBMModule, Phase
from cbm_lightning.callbacks import ConceptSaliency
from cbm_lightning.callbacks import concept_saliency as module
from cbm_lightning.cli import main
from cbm_lightning.saliency import GradCAM, IntegratedGradients, SaliencyResult, SaliencyStudy
from cbm_lightning.saliency.measures import DEFAULT

MASKED = DEFAULT["masks"]
TABLES = ["co_occurrence", "concepts", "metrics"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(made: LightningModule, data: Any = None, trainer: dict[str, Any] | None = None, **options: Any) -> Any:
    """The callback after a test, and what was logged; no picture unless one is asked for."""
    watcher = ConceptSaliency(**{"max_images": 0, **options})
    tester = quiet_trainer(callbacks=[watcher], **(trainer or {}))
    tester.test(made, ToyImages() if data is None else data, verbose=False)
    return watcher, {name: float(value) for name, value in tester.callback_metrics.items() if "/saliency/" in name}


def by_hand(made: CBMModule, samples: int, split: int = 2, **options: Any) -> SaliencyResult:
    """The study of predictions that no Trainer made, of the first of 9 samples."""
    study = SaliencyStudy(made, **options)
    study.update({name: value[:samples] for name, value in batch_of(9, seed=split).items()})
    return study.compute()


def named(result: SaliencyResult, stage: str = "test") -> dict[str, float]:
    return {f"{stage}/saliency/{name}": float(value) for name, value in result.scalars().items()}


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("samples", [1, 4, 7, 9, 99])
def test_it_logs_the_numbers_of_the_study_over_the_first_samples(samples: int) -> None:
    made = toy_model()
    watcher, logged = run(made, max_samples=samples)
    expected = by_hand(made, samples)
    assert logged == pytest.approx(named(expected), abs=1e-6)
    assert {name.removesuffix("_chance") for name in logged} <= {f"test/saliency/{name}" for name in MASKED}
    pd.testing.assert_frame_equal(watcher.result.table(), expected.table())
    assert samples < 4 or len(logged) == 8


def test_a_model_that_looks_at_the_right_place() -> None:
    right, wrong = (run(looker(order))[1] for order in ((0, 1, 2), (1, 2, 0)))
    assert right["test/saliency/pointing_game"] == 1
    assert right["test/saliency/energy_in_mask"] > 0.4 > right["test/saliency/energy_in_mask_chance"]
    assert wrong["test/saliency/energy_in_mask"] < wrong["test/saliency/energy_in_mask_chance"]


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    options = {"max_samples": 7, "method": "grad_cam"}
    found = run(toy_model(), ToyImages(batch_size=batch_size), **options)[1]
    assert found == pytest.approx(run(toy_model(), **options)[1], abs=1e-6)


def test_options_reach_the_study() -> None:
    made = looker((0, 2, 1))
    options = {"method": "gradient", "metrics": {"iou_at_mass": {"mass": 0.3}}, "counted": "predicted"}
    assert run(made, **options)[1] == pytest.approx(named(by_hand(made, 9, **options)), abs=1e-6)


def test_no_more_samples_than_wanted_are_looked_at() -> None:
    method, made = Asked(), toy_model()
    run(made, ToyImages(n_eval=40), method=method, max_samples=6, images_at_once=3)
    assert method.images == [3, 1, 2]
    assert made.backbone.images < 40 + 5 * 6, "the test itself, and a few passes over the samples"
    method = Asked()
    run(toy_model(), ToyImages(n_eval=40), method=method, max_samples=6, max_images=5, concepts=2)
    assert method.images == [4, 4, 2, 1]
    assert [len(pairs) for pairs in method.pairs[1::2]] == [2 * 4, 2 * 1], "two concepts an image in the picture"


class Silent(CBMModule):
    """Keeps its predictions to itself, and serves several loaders."""

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self(self.read_batch(batch))


@pytest.mark.parametrize("form", ["dict", "several"])
def test_only_the_first_loader_counts(form: str) -> None:
    made = toy_model()
    silent = Silent(made.backbone, made.bottleneck, made.head, concepts=NAMES, num_classes=3)
    watcher, logged = run(silent, ForeignImages(form))
    assert logged == pytest.approx(named(by_hand(made, 9)), abs=1e-6)
    assert watcher.co_occurrence.known.tolist() == [9] * 3


# ---------------------------------------------------------------- when


def logged_at(monkeypatch: pytest.MonkeyPatch, made: CBMModule | None = None, **options: Any) -> list[Any]:
    seen = []

    def keep(trainer: Any, name: str, *_: Any) -> None:
        seen.append((name, trainer.current_epoch, trainer.sanity_checking))

    monkeypatch.setattr(module, "log_table", keep)
    watcher = ConceptSaliency(max_images=0, max_samples=4, **options)
    trainer = quiet_trainer(max_epochs=4, callbacks=[watcher], num_sanity_val_steps=2)
    made = made or toy_model()
    trainer.fit(made, ToyImages())
    trainer.validate(made, ToyImages(), verbose=False)
    trainer.test(made, ToyImages(), verbose=False)
    return [at for at in seen if at[0].endswith("/metrics")]


def test_it_runs_every_nth_epoch_and_not_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    val, test = "val/saliency/metrics", "test/saliency/metrics"
    found = logged_at(monkeypatch, every_n_epochs=2)
    assert found == [(val, 1, False), (val, 3, False), (val, 4, False), (test, 4, False)]


@pytest.mark.parametrize("stage", ["val", "test"])
def test_it_runs_in_the_wanted_stages(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name, *_ in logged_at(monkeypatch, stages=[stage])} == {f"{stage}/saliency/metrics"}


def test_it_runs_while_only_concepts_train(monkeypatch: pytest.MonkeyPatch) -> None:
    concepts = Phase("concepts", epochs=3, train=["backbone", "bottleneck"], loss_weights={"label": 0.0})
    sequential = toy_model(phases=[concepts, Phase("labels", train=["head"])])
    assert [epoch for _, epoch, _ in logged_at(monkeypatch, sequential, stages=["val"])] == [0, 1, 2, 3, 4]


def test_the_check_before_training_looks_at_one_image() -> None:
    method = Asked()
    watcher = ConceptSaliency(method, max_images=3, every_n_epochs=5)
    trainer = quiet_trainer(callbacks=[watcher], num_sanity_val_steps=2)
    trainer.fit(toy_model(), ToyImages())
    assert set(method.images) == {1}
    assert watcher.result is None
    assert not list(Path().rglob("*saliency*"))


def test_a_checkpoint_can_follow_it(tmp_path: Path) -> None:
    key = "val/saliency/energy_in_mask"
    watcher = ConceptSaliency("gradient", max_images=0, every_n_epochs=2)
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor=key, mode="max", save_top_k=-1, every_n_epochs=2)
    trainer = quiet_trainer(max_epochs=4, callbacks=[watcher, keep], enable_checkpointing=True)
    trainer.fit(toy_model(), ToyImages())
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"epoch=1.ckpt", "epoch=3.ckpt"}
    assert float(trainer.callback_metrics[key]) == pytest.approx(float(watcher.result.values["energy_in_mask"]))


# ---------------------------------------------------------------- co-occurrence


def tied(rows: Rows) -> Rows:
    """Blue is wherever red is."""
    return {**rows, "concepts": rows["concepts"][:, [0, 1, 0]], "concept_masks": rows["concept_masks"][:, [0, 1, 0]]}


def table(name: str, stage: str = "test", step: int = 0) -> pd.DataFrame:
    return pd.read_csv(f"media/{stage}/saliency/{name}-step={step}.csv")


@pytest.mark.parametrize("data", [ToyImages(n=40, change=tied), ForeignImages(n=40, change=tied)])
def test_concepts_that_the_data_never_separates(data: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        watcher, _ = run(toy_model(), data)
    assert watcher.co_occurrence.groups == [[0, 2]]
    known = 40 if isinstance(data, ToyImages) else 9
    assert watcher.co_occurrence.known.tolist() == [known] * 3
    assert sum("'red' and 'blue' come together in 100 %" in message for message in caplog.messages) == 1
    assert sorted(path.name for path in Path("media/test/saliency").iterdir()) == [f"{n}-step=0.csv" for n in TABLES]
    assert table("concepts")["inseparable_from"].fillna("").tolist() == ["blue", "", "red"]
    assert set(table("co_occurrence")["concept"][:2]) == {"red", "blue"}


class AfterSetup(ToyImages):
    """Like the datamodules of images: only what is set up is annotated."""

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        rows = self.splits[split].tensors
        return rows["concepts"], rows["label"]


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_the_training_data_is_looked_at_in_any_stage(stage: str) -> None:
    watcher, data = ConceptSaliency(max_images=0), AfterSetup(n=40, change=tied)
    getattr(quiet_trainer(callbacks=[watcher]), stage)(toy_model(), data)
    assert watcher.co_occurrence.known.tolist() == [40] * 3


def test_data_that_has_no_annotations() -> None:
    class Nothing(ToyImages):
        def annotations(self, split: str) -> tuple[Tensor, Tensor]:
            raise KeyError(split)

    watcher, logged = run(toy_model(), Nothing(change=tied))
    assert len(logged) == 8
    assert watcher.co_occurrence.known.tolist() == [9] * 3, "the batches are annotated"


def test_batches_that_have_no_annotations() -> None:
    silent = Silent(toy_model().backbone, concepts=NAMES, num_classes=3)
    watcher, logged = run(silent, ForeignImages(change=lambda rows: rows | {"concepts": 0 * rows["concepts"] / 0}))
    assert watcher.co_occurrence.known.tolist() == [0] * 3
    without = ForeignImages(change=lambda rows: {name: rows[name] for name in ("image", "concept_masks")})
    watcher, same = run(silent, without)
    assert same == logged
    assert len(logged) == 8
    assert watcher.co_occurrence is None
    assert "inseparable_from" not in table("concepts")


# ---------------------------------------------------------------- where to


def test_tables_and_picture_in_files() -> None:
    watcher, _ = run(looker(), max_images=2, max_samples=5)
    folder = Path("media/test/saliency")
    files = [*(f"{name}-step=0.csv" for name in TABLES), "figure-step=0.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    assert (folder / "figure-step=0.png").stat().st_size > 5000
    rows, expected = table("concepts"), watcher.result.concept_table()
    pd.testing.assert_frame_equal(rows[list(expected.columns)], expected, check_dtype=False)
    pd.testing.assert_frame_equal(table("metrics"), watcher.result.table(), check_dtype=False)
    assert set(table("co_occurrence")["concept"]) == set(NAMES)


def test_wandb_offline_shows_scalars_tables_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="spots", save_dir=tmp_path, offline=True)
    trainer = quiet_trainer(logger=logger, callbacks=[ConceptSaliency(max_images=2)])
    trainer.fit(toy_model(), ToyImages(change=tied))
    wandb.finish()
    [found] = (tmp_path / "wandb").glob("offline-run-*")
    [picture] = found.glob("files/media/images/val/saliency/figure_*.png")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.min() < 60
    assert pixels.max() == 255
    assert pixels.reshape(-1, 3).std(0).min() > 20
    for name, columns in (("concepts", ["concept", "pairs"]), ("metrics", ["metric", "value"])):
        [file] = found.glob(f"files/media/table/val/saliency/{name}_*.table.json")
        assert json.loads(file.read_text())["columns"][:2] == columns
    [file] = found.glob("files/media/table/val/saliency/co_occurrence_*.table.json")
    assert json.loads(file.read_text())["data"][0][-1] in ("red", "blue")
    assert "val/saliency/pointing_game" in trainer.logged_metrics


def test_tensorboard_and_csv_at_once(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board, scores = TensorBoardLogger(tmp_path, "tb", "a"), CSVLogger(tmp_path, "csv", "a")
    trainer = quiet_trainer(logger=[board, scores], callbacks=[ConceptSaliency(max_images=2)])
    trainer.fit(toy_model(), ToyImages())
    events = event_accumulator.EventAccumulator(board.log_dir).Reload()
    keys = {f"val/saliency/{name}{end}" for name in MASKED for end in ("", "_chance")}
    assert keys <= set(events.Tags()["scalars"])
    assert events.Images("val/saliency/figure")[0].width > 500
    assert {f"val/saliency/{name}/text_summary" for name in TABLES} <= set(events.Tags()["tensors"])
    written = {path.name for path in (tmp_path / "csv/a/media/val/saliency").iterdir()}
    assert written == {*(f"{name}-step=3.csv" for name in TABLES), "figure-step=3.png"}
    assert keys <= set(pd.read_csv(tmp_path / "csv/a/metrics.csv").columns)


def test_two_in_one_trainer() -> None:
    first, second = ConceptSaliency(max_images=0), ConceptSaliency("gradient", max_images=0, name="slopes")
    tester = quiet_trainer(callbacks=[first, second])
    tester.test(toy_model(), ToyImages(), verbose=False)
    for watcher in (first, second):
        key = f"test/{watcher.name}/energy_in_mask"
        assert float(tester.callback_metrics[key]) == float(watcher.result.values["energy_in_mask"])
        assert Path(f"media/test/{watcher.name}/concepts-step=0.csv").is_file()
    assert first.result.values["energy_in_mask"] != second.result.values["energy_in_mask"]
    again = quiet_trainer(callbacks=[first, ConceptSaliency("gradient")])
    with pytest.raises(ValueError, match="name: two evaluations of one Trainer would log under 'saliency'"):
        again.fit(toy_model(), ToyImages())
    apart = [ConceptSaliency(stages=["val"], max_images=0), ConceptSaliency(stages=["test"], max_images=0)]
    quiet_trainer(callbacks=apart).fit(toy_model(), ToyImages())


# ---------------------------------------------------------------- processes


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:Using `DistributedSampler`")
@pytest.mark.parametrize(
    ("data", "options"),
    [
        (ToyImages, {"max_samples": 7}),
        (ForeignImages, {"method": "gradient"}),
        # the second process has no sample, and with defaults it does not know of masks
        (ForeignImages, {"max_samples": 1}),
        (ToyImages, {"max_samples": 1, "metrics": ["energy_in_mask", "concept_existence", "concept_importance"]}),
    ],
    ids=["some", "a sample repeated", "one", "one, other metrics"],
)
def test_two_processes_find_what_one_finds(
    data: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep(trainer: Any, name: str, content: Any) -> None:
        file = tmp_path / f"{trainer.world_size}/{trainer.global_rank}/{name.rpartition('/')[2]}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        content.to_csv(file)

    monkeypatch.setattr(module, "log_table", keep)
    logged = []
    for processes in (1, 2):
        tester = quiet_trainer(
            callbacks=[ConceptSaliency(max_images=0, **options)],
            devices=processes,
            strategy="auto" if processes == 1 else "ddp_fork",
        )
        [found] = tester.test(toy_model(), data(), verbose=False)
        logged.append({key: value for key, value in found.items() if "/saliency/" in key})
    assert len(logged[0]) >= 4
    assert logged[1] == pytest.approx(logged[0], abs=1e-6)
    # the first process alone writes, and what it writes is the same
    assert [path.name for path in (tmp_path / "2").iterdir()] == ["0"]
    for name in TABLES:
        one, two = (pd.read_csv(tmp_path / f"{n}/0/{name}.csv") for n in (1, 2))
        pd.testing.assert_frame_equal(one, two, atol=1e-5)


# ---------------------------------------------------------------- files of options


def test_options_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["cbm"])
    quiet = ["accelerator=cpu", "max_epochs=1", "enable_progress_bar=false", "enable_model_summary=false"]
    model = ["CBMModule", ".backbone=TimmBackbone", ".backbone.name=test_resnet.r160_in1k", ".backbone.stage=2"]
    birds = ["RenderedBirds", ".size=32", ".masks=true", *(f".num_{split}=4" for split in ("train", "val", "test"))]
    arguments = ["fit", *(f"--trainer.{option}" for option in [*quiet, "logger=false", "enable_checkpointing=false"])]
    arguments += [f"--model{'=' * (i == 0)}{option}" for i, option in enumerate([*model, ".backbone.img_size=32"])]
    arguments += [f"--data{'=' * (i == 0)}{option}" for i, option in enumerate(birds)]
    callback = ["=ConceptSaliency", ".max_images=1", ".max_samples=2", ".stages=[test]"]
    gradients = '{"class_path":"cbm_lightning.saliency.IntegratedGradients","init_args":{"n_steps":4}}'
    for options, kind, metrics in (
        ([".method=grad_cam", '.concepts=["crest: present"]', ".metrics=[deletion]"], GradCAM, ["deletion"]),
        (
            [f".method={gradients}", '.metrics={"iou_at_mass":{"mass":0.3},"pointing_game":null}'],
            IntegratedGradients,
            ["iou_at_mass", "pointing_game"],
        ),
    ):
        flags = [f"--trainer.callbacks{'+' * (i == 0)}{option}" for i, option in enumerate([*callback, *options])]
        cli = main([*arguments, *flags])
        [watcher] = [each for each in cli.trainer.callbacks if isinstance(each, ConceptSaliency)]
        assert isinstance(watcher.method, kind)
        assert list(watcher.result.values) == metrics
        assert {f"test/saliency/{name}" for name in metrics} <= set(cli.trainer.callback_metrics)
        written = yaml.safe_load(Path("config.yaml").read_text())["trainer"]["callbacks"][0]["init_args"]
        assert written["max_samples"] == 2
    assert watcher.method.n_steps == written["method"]["init_args"]["n_steps"] == 4
