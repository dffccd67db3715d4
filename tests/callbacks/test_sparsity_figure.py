"""Where tables, page and picture of the curves go, what the picture shows, and what is refused."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.data import DataLoader
from toy import ForeignData, ToyData, quiet_trainer, toy_tensors
from toy_curves import toy_model

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.callbacks import SparsityEvaluation
from cbm_lightning.callbacks.loggers import log_html
from cbm_lightning.callbacks.sparsity_figure import COLOURS, draw_nec_curves
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.sparsity.nec import Sparsity
from cbm_lightning.sparsity.study import NECCurve, NECResult

NAMES = ["test/sparsity/accuracy", "test/sparsity/kept_concepts", "test/sparsity/figure"]
ACCURACY, KEPT, FIGURE = NAMES
SCALAR = "test/sparsity/path/acc_at_nec2"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(bottleneck: Any = None) -> CBMModule:
    names = ["apple", "<stone>", "plum|pear"]
    return toy_model(LinearBottleneck("logits") if bottleneck is None else bottleneck, class_names=names)


def evaluate(made: Any = None, data: Any = None, **trainer: Any) -> NECResult:
    evaluation = SparsityEvaluation([1, 2, 4], solver={"eps": 0.03}, random_concepts=False)
    tester = quiet_trainer(callbacks=[evaluation], **trainer)
    tester.test(made or model(), ToyData() if data is None else data, verbose=False)
    assert evaluation.result is not None
    return evaluation.result


def headings(page: str) -> list[str]:
    """The first cell of each row."""
    found: list[str] = []

    class Rows(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.inside = tag == "th"

        def handle_endtag(self, tag: str) -> None:
            self.inside = False

        def handle_data(self, data: str) -> None:
            if self.inside:
                found.append(data)

    parser = Rows()
    parser.inside = False
    parser.feed(page)
    return found


def check_picture(pixels: np.ndarray) -> None:
    assert pixels.shape == (630, 1290, 3)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    found = {tuple(colour) for colour, count in zip(colours.tolist(), counts, strict=True) if count > 200}
    assert {(255, 255, 255), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= found


# ---------------------------------------------------------------- loggers


@pytest.mark.parametrize("kind", ["none", "csv"])
def test_without_a_logger_of_pictures_there_are_files(tmp_path: Path, kind: str) -> None:
    logger = CSVLogger(tmp_path, "runs", "a") if kind == "csv" else False
    result = evaluate(logger=logger, default_root_dir=tmp_path)
    media = tmp_path / ("runs/a/media" if kind == "csv" else "media")
    files = {str(path.relative_to(media)) for path in media.rglob("*") if path.is_file()}
    endings = {f"{ACCURACY}-step=0.csv", f"{KEPT}-step=0.csv", f"{KEPT}_page-step=0.html", f"{FIGURE}-step=0.png"}
    assert files == endings
    pd.testing.assert_frame_equal(pd.read_csv(media / f"{ACCURACY}-step=0.csv"), result.table(), check_dtype=False)
    kept = pd.read_csv(media / f"{KEPT}-step=0.csv", keep_default_na=False)
    assert kept["class"].unique().tolist() == ["apple", "<stone>", "plum|pear"]
    assert len(kept[kept["concept"] != ""]) == int((result.kept != 0).sum()) == 3
    page = (media / f"{KEPT}_page-step=0.html").read_text()
    assert headings(page) == ["class", "concepts", "apple", "<stone>", "plum|pear"]
    assert "<title>1 concepts a class</title>" in page
    check_picture(np.asarray(Image.open(media / f"{FIGURE}-step=0.png")))
    if kind == "csv":
        logger.save()
        scalars = pd.read_csv(tmp_path / "runs/a/metrics.csv").iloc[0]
        assert scalars[SCALAR] == pytest.approx(result.curves["path"].accuracy[1])


def test_tensorboard_gets_scalars_tables_and_a_picture_and_a_file(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, "runs", "a")
    result = evaluate(logger=logger, default_root_dir=tmp_path)
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    assert {SCALAR, "test/sparsity/nec", "test/sparsity/pruned/anec"} <= set(events.Tags()["scalars"])
    [image] = events.Images(FIGURE)
    assert (image.width, image.height) == (1290, 630)
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode().splitlines()
        for name in (ACCURACY, KEPT)
    }
    assert texts[ACCURACY][0] == "| head | level | nec | accuracy |"
    assert len(texts[ACCURACY]) == 2 + len(result.table())
    assert {line.split(" | ")[0] for line in texts[KEPT][2:]} == {"| apple", "| &lt;stone>", "| plum&#124;pear"}
    media = Path(logger.log_dir) / "media"
    assert [str(path.relative_to(media)) for path in media.rglob("*.*")] == [f"{KEPT}_page-step=0.html"]


def test_wandb_offline_gets_scalars_tables_a_page_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="toy", save_dir=tmp_path, offline=True)
    result = evaluate(logger=logger, default_root_dir=tmp_path)
    held = logger.experiment.summary
    names = held.keys()
    summary = {name: held[name] for name in names}
    wandb.finish()
    assert summary[SCALAR] == pytest.approx(result.curves["path"].accuracy[1])
    [run_folder] = (tmp_path / "wandb").glob("offline-run-*")
    [picture] = run_folder.glob(f"files/media/images/{FIGURE}_*.png")
    check_picture(np.asarray(Image.open(picture).convert("RGB")))
    [found] = run_folder.glob(f"files/media/table/{ACCURACY}_*.table.json")
    table = json.loads(found.read_text())
    assert table["columns"] == ["head", "level", "nec", "accuracy"]
    assert [row[3] for row in table["data"]] == pytest.approx(result.table()["accuracy"].tolist())
    assert list(run_folder.glob(f"files/media/table/{KEPT}*.table.json"))
    # of two values under one name the second takes the place of the first
    kinds = [value["_type"] for value in summary.values() if hasattr(value, "keys")]
    assert sorted(kinds) == ["html-file", "images/separated", "table-file", "table-file"]
    [page] = run_folder.glob(f"files/media/html/{KEPT}_page*.html")
    assert headings(page.read_text()) == ["class", "concepts", "apple", "<stone>", "plum|pear"]
    assert not (tmp_path / "media").exists()


class Takes(Logger):
    """A logger of another make that takes tables, but has no place for pages."""

    name = version = "takes"

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...

    def log_table(self, key, columns, data, step): ...


def test_a_page_is_a_file_for_everything_else(tmp_path: Path) -> None:
    page = "<!doctype html><p>ü</p>"
    trainer = quiet_trainer(logger=[Takes(), CSVLogger(tmp_path, "runs", "a")], default_root_dir=tmp_path / "root")
    log_html(trainer, "val/page", page)
    for folder in (tmp_path / "runs/a", tmp_path / "root"):
        assert (folder / "media/val/page-step=0.html").read_bytes() == page.encode()


def test_pages_are_written_by_the_first_process_and_not_in_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = quiet_trainer(logger=CSVLogger(tmp_path), fast_dev_run=True, default_root_dir=tmp_path)
    log_html(dry, "page", "<p>")
    trainer = quiet_trainer(default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    log_html(trainer, "page", "<p>")
    assert list(tmp_path.rglob("*.html")) == []


# ---------------------------------------------------------------- the picture


def result(own: bool = True, top: float = 0.9) -> NECResult:
    """Curves with numbers of their own."""
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 3.0]])
    curves = {
        "path": NECCurve([1.0, 2.0, 2.5], [0.5, 0.6, top]),
        "path_refit": NECCurve([1.0, 2.0, 2.5], [0.55, 0.7, top]),
        "random": NECCurve([1.0, 2.0, 3.0], [0.3, 0.35, 0.4]),
    }
    if own:
        curves["pruned"] = NECCurve([1.0, 1.25, 1.25], [0.2, 0.25, 0.25])
    return NECResult([1, 2, 3], curves, Sparsity.of(weight) if own else None, 40, weight.unsqueeze(-1))


def test_a_line_a_kind_of_head_dashed_where_refitted() -> None:
    drawn = draw_nec_curves(result(), "Birds")
    axes, _ = drawn.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == [
        "elastic-net path",
        "elastic-net path, refitted",
        "path on random concepts",
        "own head, pruned",
    ]
    # at the number of concepts that a head really has, not at the level asked for
    np.testing.assert_allclose(lines["elastic-net path"].get_xydata(), [[1, 0.5], [2, 0.6], [2.5, 0.9]])
    np.testing.assert_allclose(lines["own head, pruned"].get_xydata(), [[1, 0.2], [1.25, 0.25], [1.25, 0.25]])
    assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "-", "-"]
    assert [line.get_marker() for line in lines.values()] == ["o", "^", "o", "o"]
    colours = [COLOURS[kind] for kind in ("path", "path", "random", "pruned")]
    assert [line.get_color() for line in lines.values()] == colours
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("effective concepts a class (NEC)", "label accuracy")
    assert axes.get_title() == "Birds"


@pytest.mark.parametrize("top", [0.9, 1.0])
def test_the_axes_begin_at_no_concept_and_end_at_perfect(top: float) -> None:
    [axes, *_] = draw_nec_curves(result(top=top)).axes
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlim()[1] > 3
    low, high = axes.get_ylim()
    assert low < 0.2
    assert top < high <= 1.005
    assert axes.get_title() == ""


def test_beside_it_how_many_classes_rest_on_how_many_concepts() -> None:
    _, axes = draw_nec_curves(result()).axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert bars == {0: 1, 1: 1, 2: 2}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("concepts a class", "classes")
    assert axes.get_title() == "own head: NEC 1.25"
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        assert (ticks == np.round(ticks)).all()


def test_without_an_own_head_there_are_the_curves_alone() -> None:
    drawn = draw_nec_curves(result(own=False))
    [axes] = drawn.axes
    assert len(axes.lines) == 3
    assert drawn.get_size_inches().tolist() == [5.6, 4.2]
    assert draw_nec_curves(result()).get_size_inches().tolist() == [8.6, 4.2]


def test_a_level_alone_is_a_point() -> None:
    curve = NECCurve([2.0], [1.0])
    [axes] = draw_nec_curves(NECResult([2], {"path": curve}, None, 3, torch.ones(1, 2, 1))).axes
    [line] = axes.lines
    assert (line.get_xydata().tolist(), line.get_marker()) == ([[2.0, 1.0]], "o")


def test_pyplot_does_not_keep_it() -> None:
    from matplotlib import pyplot

    drawn = draw_nec_curves(result())
    assert isinstance(drawn, Figure)
    assert pyplot.get_fignums() == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, r"levels: expected positive numbers of effective concepts, got \[\]"),
        ({"levels": [5, 0]}, r"levels: expected positive numbers .*, got \[5, 0\]"),
        ({"stages": ["train"]}, r"stages: expected 'val', 'test' or both, got \['train'\]"),
        ({"stages": []}, r"stages: expected 'val', 'test' or both, got \[\]"),
        ({"every_n_epochs": 0}, "every_n_epochs: expected at least 1, got 0"),
        ({"fit_batches": 0}, "fit_batches: expected at least 1, got 0"),
        ({"refit_ridge": 0.0}, "refit_ridge: expected a positive number or None, got 0"),
        ({"solver": {"nec": 3}}, r"solver: \['nec'\] follow from levels, refit_ridge and the model"),
        ({"solver": {"refit_ridge": 3, "lambdas": 1}}, r"solver: \['lambdas', 'refit_ridge'\] follow from"),
        ({"solver": {"aplha": 0.5}}, "solver: .*aplha"),
        ({"solver": {"alpha": -1.0}}, "alpha"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(options: dict[str, Any], message: str) -> None:
    made = model()

    def fit() -> None:
        quiet_trainer(callbacks=[SparsityEvaluation(**options)]).fit(made, ToyData())

    with pytest.raises(ValueError, match=message):
        fit()
    assert made.backbone.calls == 0


def test_a_module_that_is_no_bottleneck_model_is_told_what_it_lacks() -> None:
    class Other(LightningModule):
        head = torch.nn.Linear(2, 2)

        def test_step(self, batch, batch_idx): ...

    with pytest.raises(
        TypeError, match=r"Other has no \['concept_set', 'task', 'read_batch', 'bottleneck', 'head'\] of the kind"
    ):
        evaluate(Other(), ForeignData())


def test_training_samples_are_needed() -> None:
    with pytest.raises(
        ValueError, match="the train split is needed and there is no datamodule with a train_dataloader"
    ):
        evaluate(model(), DataLoader(TensorDataset(toy_tensors(8)), collate_fn=TensorDataset.collate))


def test_values_with_an_axis_of_samples_are_refused() -> None:
    class Sampled(LinearBottleneck):
        def forward(self, features, concepts=None):
            output = super().forward(features, concepts)
            return output.replace(values=output.values.unsqueeze(0), sample_dim=True)

    with pytest.raises(ValueError, match=r"expected values \[B, V\] of one sample and time step, got \[1, 16, 4\]"):
        evaluate(model(Sampled("logits")))


def test_two_evaluations_do_not_mix_what_they_log() -> None:
    tester = quiet_trainer(callbacks=[SparsityEvaluation(), SparsityEvaluation([1, 3])])
    with pytest.raises(ValueError, match="name: two evaluations of one Trainer would log under 'sparsity'"):
        tester.test(model(), ToyData(), verbose=False)
