from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from PIL import Image
from toy import quiet_trainer

from cbm_lightning.callbacks.loggers import log_figure, log_image, log_table, rasterize

TABLE = pd.DataFrame({"concept": ["red", "<bias>"], "probability": [0.25, float("nan")], "sample": [0, 0]})
# red brightens to the right, green is half on everywhere, blue is off
GRADIENT = torch.stack([torch.linspace(0, 1, 8).expand(4, 8), torch.full((4, 8), 0.5), torch.zeros(4, 8)])


class Recorder(Logger):
    """A logger of another make that takes tables and images."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list = []
        self.images: list = []

    name = version = "recorder"

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))

    def log_image(self, key, images, step):
        self.images.append((key, images, step))


class ScalarsOnly(Logger):
    """A logger without a folder that takes scalars only."""

    name = version = "scalars"

    def log_metrics(self, metrics, step=None): ...

    def log_hyperparams(self, params): ...


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_a_logger_that_takes_tables_and_images_gets_plain_values_and_bytes(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = quiet_trainer(logger=recorder, default_root_dir=tmp_path)
    log_table(trainer, "val/table", TABLE)
    log_image(trainer, "val/image", GRADIENT)
    [(key, columns, data, step)] = recorder.tables
    assert (key, columns, step) == ("val/table", ["concept", "probability", "sample"], 0)
    assert data[0] == ["red", 0.25, 0]
    assert [type(value) for value in data[1]] == [str, float, int]
    [(key, [pixels], step)] = recorder.images
    assert (key, pixels.dtype, pixels.shape, step) == ("val/image", np.uint8, (4, 8, 3), 0)
    assert pixels[0, :, 0].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]
    assert (pixels[..., 1] == 128).all()
    assert files_in(tmp_path) == set()


@pytest.mark.parametrize("kind", ["none", "csv", "scalars"])
def test_everything_else_gets_files(tmp_path: Path, kind: str) -> None:
    logger = {"none": False, "csv": CSVLogger(tmp_path, "runs", "a"), "scalars": ScalarsOnly()}[kind]
    trainer = quiet_trainer(logger=logger, default_root_dir=tmp_path)
    log_table(trainer, "val/table", TABLE)
    log_image(trainer, "val/image", GRADIENT)
    media = tmp_path / ("runs/a/media" if kind == "csv" else "media")
    assert files_in(media) == {"val/table-step=0.csv", "val/image-step=0.png"}
    pd.testing.assert_frame_equal(pd.read_csv(media / "val/table-step=0.csv"), TABLE)
    pixels = np.asarray(Image.open(media / "val/image-step=0.png"))
    assert pixels[2, :, 0].tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


def test_every_logger_gets_its_share(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = quiet_trainer(logger=[recorder, CSVLogger(tmp_path, "runs", "a")], default_root_dir=tmp_path / "root")
    log_image(trainer, "image", GRADIENT)
    assert len(recorder.images) == 1
    assert files_in(tmp_path / "runs/a/media") == {"image-step=0.png"}
    assert not (tmp_path / "root").exists()


def test_tensorboard_gets_an_image_and_a_table_in_markdown(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, "runs", "a")
    trainer = quiet_trainer(logger=logger, default_root_dir=tmp_path)
    log_table(trainer, "val/table", TABLE)
    log_image(trainer, "val/image", GRADIENT)
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(logger.log_dir).Reload()
    [image] = events.Images("val/image")
    assert (image.width, image.height) == (8, 4)
    text = events.Tensors("val/table/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == [
        "| concept | probability | sample |",
        "| --- | --- | --- |",
        "| red | 0.250 | 0 |",
        "| &lt;bias> |  | 0 |",
    ]
    assert not (Path(logger.log_dir) / "media").exists()


def test_a_figure_becomes_an_image_of_its_own_size(tmp_path: Path) -> None:
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="red")
    assert rasterize(figure).shape == (3, 50, 100)
    log_figure(quiet_trainer(default_root_dir=tmp_path), "figure", figure)
    pixels = np.asarray(Image.open(tmp_path / "media/figure-step=0.png"))
    assert pixels[25, 50].tolist() == [255, 0, 0]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(logger=CSVLogger(tmp_path), fast_dev_run=True, default_root_dir=tmp_path)
    log_table(trainer, "table", TABLE)
    log_image(trainer, "image", GRADIENT)
    assert files_in(tmp_path) == set()


def test_other_processes_than_the_first_log_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    log_table(trainer, "table", TABLE)
    log_image(trainer, "image", GRADIENT)
    log_figure(trainer, "figure", Figure())
    assert files_in(tmp_path) == set()


def test_a_file_that_cannot_be_completed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.local import LocalFileSystem

    trainer = quiet_trainer(default_root_dir=tmp_path)
    log_table(trainer, "table", TABLE)

    def cut_short(self, path, value, **kwargs):
        Path(path).write_bytes(value[:3])
        raise OSError("disk full")

    monkeypatch.setattr(LocalFileSystem, "pipe_file", cut_short)
    with pytest.raises(OSError, match="disk full"):
        log_table(trainer, "table", TABLE.head(1))
    assert files_in(tmp_path) == {"media/table-step=0.csv"}
    assert len(pd.read_csv(tmp_path / "media/table-step=0.csv")) == 2


def test_an_image_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image: expected \[1, H, W\] or \[3, H, W\], got \[4, 8, 3\]"):
        log_image(quiet_trainer(), "image", torch.zeros(4, 8, 3))
