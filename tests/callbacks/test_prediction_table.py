from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from toy import CLASSES, CONCEPTS, ForeignData, ToyBackbone, ToyData, quiet_trainer, toy_tensors

from cbm_lightning import CBMModule, ConceptSet, MLPHead, callbacks
from cbm_lightning.backbones.base import Backbone, ImageStats
from cbm_lightning.callbacks import PredictionTable
from cbm_lightning.callbacks.prediction_figure import RIGHT, WRONG, draw_predictions
from cbm_lightning.callbacks.prediction_table import annotate, displayable
from cbm_lightning.data.rendered_birds import RenderedBirds
from cbm_lightning.types import FeatureDims, Features

STATS = ImageStats((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


class Pixels(Backbone):
    """The mean of 16 patches of an image, and the statistics of a pretrained model."""

    dims = FeatureDims(48)

    def encode(self, x):
        return Features(nn.functional.adaptive_avg_pool2d(x, 4).flatten(1))

    def image_stats(self):
        return STATS


def toy_model(**options) -> CBMModule:
    return CBMModule(ToyBackbone(), concepts=ToyData().concept_set, num_classes=CLASSES, **options)


def birds() -> RenderedBirds:
    return RenderedBirds(num_train=16, num_val=12, num_test=12, size=32, batch_size=5)


def bird_model(data: RenderedBirds) -> CBMModule:
    return CBMModule(Pixels(), data=data, class_names=data.class_names)


def tables(folder: Path, stage: str) -> dict[int, pd.DataFrame]:
    found = sorted((folder / "media" / stage).glob("prediction_table-step=*.csv"))
    return {int(path.stem.rpartition("=")[2]): pd.read_csv(path) for path in found}


def test_the_table_holds_the_first_samples_with_truth_and_annotations(tmp_path: Path) -> None:
    model = toy_model(class_names=ToyData().class_names)
    trainer = quiet_trainer(callbacks=[PredictionTable(max_samples=20, top_k=2)], default_root_dir=tmp_path)
    trainer.test(model, ToyData(), verbose=False)
    table = tables(tmp_path, "test")[0]
    rows = toy_tensors(41, seed=2)
    with torch.no_grad():
        logits, output = model.eval()(rows)
    assert table["sample"].unique().tolist() == list(range(20))
    names = ["apple", "stone", "plum"]
    for sample, lines in table.groupby("sample"):
        assert set(lines["true"]) == {names[rows["label"][sample]]}
        assert set(lines["predicted"]) == {names[logits[sample].argmax()]}
        assert lines["contribution"].sum() == pytest.approx(logits[sample].max().item(), abs=1e-5)
        for line in lines[~lines["concept"].str.startswith("<")].to_dict("records"):
            k = model.concept_set.index(line["concept"])
            assert line["concept_probability"] == pytest.approx(output.probs[sample, k].item(), abs=1e-6)
            assert line["concept_right"] == float((output.probs[sample, k] >= 0.5) == rows["concepts"][sample, k])
    assert table.loc[table["concept"].str.startswith("<"), "concept_right"].isna().all()


def test_it_logs_every_nth_epoch_and_not_before_training(tmp_path: Path) -> None:
    callback = PredictionTable(max_samples=2, every_n_epochs=2)
    trainer = quiet_trainer(max_epochs=5, callbacks=[callback], default_root_dir=tmp_path, num_sanity_val_steps=2)
    trainer.fit(toy_model(), ToyData())
    assert sorted(tables(tmp_path, "val")) == [12, 24]  # 6 steps an epoch
    trainer.validate(toy_model(), ToyData(), verbose=False)
    assert sorted(tables(tmp_path, "val")) == [12, 24, 30]


class Watched(CBMModule):
    """Has dropout in evaluation, which draws from the global random numbers."""

    def explain(self, batch, top_k=5):
        torch.rand(7)
        random.random()
        return super().explain(batch, top_k)


@pytest.mark.parametrize("sanity", [0, 2])
def test_training_is_the_same_with_and_without_it(tmp_path: Path, sanity: int) -> None:
    weights = []
    for watchers in ([], [PredictionTable()]):
        torch.manual_seed(0)
        model = Watched(ToyBackbone(dropout=0.5), concepts=CONCEPTS, num_classes=CLASSES)
        trainer = quiet_trainer(
            max_epochs=2, callbacks=watchers, default_root_dir=tmp_path, num_sanity_val_steps=sanity
        )
        trainer.fit(model, ToyData())
        weights.append(model.state_dict())
        assert model.training
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_modes_are_those_of_before() -> None:
    model = toy_model()
    model.backbone.train()
    callback = PredictionTable(max_samples=1)
    callback.take(quiet_trainer(), model, "val", None, toy_tensors(4), 0)
    assert model.training
    assert model.backbone.training
    model.eval()
    model.head.train()
    callback.begin(quiet_trainer(), model, "val", None)
    callback.take(quiet_trainer(), model, "val", None, toy_tensors(4), 0)
    assert (model.training, model.head.training) == (False, True)


def wandb_history(path: Path) -> dict[str, list]:
    """All that an offline run logged: a LevelDB log (blocks of 32 KiB, records in pieces) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record, logged = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(content):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, piece = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if piece in (1, 4):  # whole, or the last piece
            for item in Record.FromString(record).history.item:
                logged.setdefault(item.key or ".".join(item.nested_key), []).append(json.loads(item.value_json))
            record = b""
    return logged


def test_wandb_offline_shows_scalars_a_table_and_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    data = birds()
    logger = WandbLogger(project="birds", save_dir=tmp_path, offline=True)
    trainer = quiet_trainer(logger=logger, callbacks=[PredictionTable(max_samples=4)], default_root_dir=tmp_path)
    trainer.fit(bird_model(data), data)
    wandb.finish()

    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [picture] = run.glob("files/media/images/val/prediction_figure_*.png")
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.min() < 60
    assert pixels.max() == 255
    assert pixels.reshape(-1, 3).std(0).min() > 20
    [found] = run.glob("files/media/table/val/prediction_table_*.table.json")
    table = json.loads(found.read_text())
    assert table["columns"][:4] == ["sample", "predicted", "true", "probability"]
    assert {row[0] for row in table["data"]} == {0, 1, 2, 3}

    logged = wandb_history(next(run.glob("*.wandb")))
    assert 0 <= logged["val/label_acc"][0] <= 1
    assert logged["train/loss"]
    assert logged["val/prediction_table._type"] == ["table-file"]
    assert logged["val/prediction_figure.count"] == [1]
    assert 4 in logged["trainer/global_step"]


def test_tensorboard_and_csv_at_once(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = birds()
    board, table = TensorBoardLogger(tmp_path, "tb", "a"), CSVLogger(tmp_path, "csv", "a")
    trainer = quiet_trainer(logger=[board, table], callbacks=[PredictionTable(max_samples=3)])
    trainer.fit(bird_model(data), data)
    events = event_accumulator.EventAccumulator(board.log_dir).Reload()
    assert "val/label_acc" in events.Tags()["scalars"]
    assert events.Images("val/prediction_figure")[0].width > 500
    assert "val/prediction_table/text_summary" in events.Tags()["tensors"]
    assert (tmp_path / "csv/a/media/val/prediction_figure-step=4.png").stat().st_size > 5000
    assert tables(tmp_path / "csv/a", "val")[4]["sample"].nunique() == 3


def test_batches_of_any_form_and_inputs_that_are_no_images(tmp_path: Path) -> None:
    class OtherBatches(CBMModule):
        def read_batch(self, batch):
            x, concepts, y = batch
            return {"embedding": x[:, :3].repeat(1, 3)[:, :8], "concepts": concepts, "label": y}

    trainer = quiet_trainer(callbacks=[PredictionTable(max_samples=18)], default_root_dir=tmp_path)
    trainer.test(OtherBatches(ToyBackbone(), concepts=CONCEPTS, num_classes=CLASSES), ForeignData(), verbose=False)
    assert tables(tmp_path, "test")[0]["sample"].nunique() == 18
    assert (tmp_path / "media/test/prediction_figure-step=0.png").is_file()


def test_without_annotations_nothing_is_called_right_or_wrong(tmp_path: Path) -> None:
    from cbm_lightning import SimilarityBottleneck

    concepts = ConceptSet(ToyData().concept_set.names, embeddings=torch.randn(CONCEPTS, 8))
    model = CBMModule(ToyBackbone(), SimilarityBottleneck(), concepts=concepts, num_classes=CLASSES)
    trainer = quiet_trainer(callbacks=[PredictionTable()], default_root_dir=tmp_path)
    trainer.test(model, ForeignData(with_concepts=False), verbose=False)
    table = tables(tmp_path, "test")[0]
    assert "annotation" not in table
    assert table["concept_right"].isna().all()
    assert table["true"].isin(range(CLASSES)).all()


def test_any_module_that_meets_the_protocol_is_served(tmp_path: Path) -> None:
    class Own(LightningModule):
        concept_set = ConceptSet(["red", "round"])

        def read_batch(self, batch):
            return {"image": batch[0], "label": batch[2]}

        def explain(self, batch, top_k):
            lines = [{"concept": name, "concept_probability": 0.7, "contribution": 1.5} for name in self.concept_set]
            return pd.DataFrame([{"sample": i, "predicted": 1, "probability": 0.9, **lines[i % 2]} for i in range(16)])

        def test_step(self, batch, batch_idx): ...

    trainer = quiet_trainer(callbacks=[PredictionTable(max_samples=17)], default_root_dir=tmp_path)
    trainer.test(Own(), ForeignData(), verbose=False)
    assert tables(tmp_path, "test")[0]["sample"].tolist() == list(range(17))


def test_what_cannot_be_explained_fails_before_training() -> None:
    class Silent(LightningModule):
        def explain(self, batch, top_k): ...

        def test_step(self, batch, batch_idx): ...

    with pytest.raises(TypeError, match=r"Silent has no \['concept_set', 'read_batch'\]"):
        quiet_trainer(callbacks=[PredictionTable()]).test(Silent(), ForeignData())
    trainer = quiet_trainer(callbacks=[PredictionTable(every_n_epochs=3)], num_sanity_val_steps=1)
    with pytest.raises(ValueError, match="MLPHead with a multiclass label has no exact contributions"):
        trainer.fit(toy_model(head=MLPHead([4])), ToyData())
    assert trainer.global_step == 0


@pytest.mark.parametrize("argument", ["max_samples", "top_k", "every_n_epochs"])
def test_numbers_below_one_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
        PredictionTable(**{argument: 0})


def test_images_are_shown_as_they_were_before_normalisation() -> None:
    image = torch.rand(2, 3, 4, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in STATS)
    normalised = (image - mean) / std
    torch.testing.assert_close(displayable(normalised, STATS), image)
    torch.testing.assert_close(displayable(image, STATS), image)
    stretched = displayable(normalised * 9)
    torch.testing.assert_close(stretched.amin((1, 2, 3)), torch.zeros(2))
    torch.testing.assert_close(stretched.amax((1, 2, 3)), torch.ones(2))
    assert displayable(torch.full((1, 1, 4, 4), 7, dtype=torch.uint8)).tolist() == torch.full((1, 3, 4, 4), 7).tolist()


def test_real_concepts_and_unknown_annotations_are_neither_right_nor_wrong() -> None:
    concepts = ConceptSet(["red", "age", "round"], kinds=["binary", "real", "binary"])
    table = pd.DataFrame(
        {
            "sample": 0,
            "predicted": "plum",
            "concept": ["red", "age", "round", "<bias>"],
            "concept_probability": [0.3, 0.9, 0.6, np.nan],
            "annotation": [1.0, 0.9, np.nan, np.nan],
            "contribution": 1.0,
        }
    )
    marked = annotate(table, {"label": torch.tensor([[1.0]])}, concepts, ["apple", "plum"])
    assert marked["true"].tolist() == ["plum"] * 4
    np.testing.assert_array_equal(marked["concept_right"], [0.0, np.nan, np.nan, np.nan])
    assert annotate(table, {}, concepts)["true"].tolist() == [None] * 4
    assert "true" not in table


def test_bars_are_coloured_and_add_up() -> None:
    table = pd.DataFrame(
        {
            "sample": [0] * 4,
            "predicted": "plum",
            "true": "apple",
            "probability": 0.8,
            "concept": ["red", "round", "<other concepts>", "<bias>"],
            "concept_probability": [0.9, 0.2, np.nan, np.nan],
            "concept_right": [1.0, 0.0, np.nan, np.nan],
            "contribution": [2.0, -1.0, 0.25, 0.5],
        }
    )
    figure = draw_predictions(table)
    [axes] = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert "✗ plum  80%" in texts
    assert "   is apple" in texts
    assert {"+2.00", "−1.00", "+0.75"} <= set(texts)
    from matplotlib.colors import to_rgba

    bars = {patch.get_facecolor(): patch.get_width() for patch in axes.patches[:3]}
    assert bars[to_rgba(RIGHT)] == pytest.approx(-2 * bars[to_rgba(WRONG)])
    assert axes.patches[0].get_x() == pytest.approx(axes.patches[2].get_x())


def test_importing_the_callbacks_loads_no_plotting_library() -> None:
    heavy = {"matplotlib", "pandas", "wandb", "PIL", "tensorboard", "numpy"}
    for path in Path(callbacks.__file__).parent.glob("*.py"):
        statements = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        modules = {getattr(node, "module", None) or node.names[0].name for node in statements}
        assert not heavy & {module.partition(".")[0] for module in modules}, path.name
