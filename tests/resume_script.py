"""Runs that are killed: ``python resume_script.py FOLDER`` starts each of `KILLS` in a process that kills itself."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from toy import CLASSES, ForeignData, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.backbones.base import Backbone
from cbm_lightning.data import ConceptFolder
from cbm_lightning.types import FeatureDims, Features

EPOCHS = 6  # three a phase


class Kill(NamedTuple):
    """A kind of run, and the epoch and batch after which it dies."""

    kind: str
    epoch: int
    batch: int

    @property
    def folder(self) -> str:
        return f"{self.kind} {self.epoch} {self.batch}"


KILLS = [
    Kill("embedding", 1, 2),  # in the middle of the first phase
    Kill("embedding", 3, 0),  # in the first batch of the second phase, so that its checkpoint is that of the boundary
    Kill("embedding", 4, 3),  # in the middle of the second phase
    Kill("linear", 3, 0),
    Kill("linear", 4, 3),
    Kill("foreign", 4, 1),
    Kill("images", 4, 1),
]


class ToyImageBackbone(Backbone):
    """One convolution, BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3))
        self.dims = FeatureDims(8)

    def encode(self, x: torch.Tensor) -> Features:
        return Features(self.layers(x).mean((2, 3)))


class NoisyBackbone(ToyBackbone):
    """Draws from the random states of Python and NumPy too, as users' code does."""

    def encode(self, x: torch.Tensor) -> Features:
        if self.training:
            x = x + random.gauss(0, 0.1) + np.random.normal(0, 0.1)  # noqa: NPY002
        return super().encode(x)


def draw_images(folder: Path) -> None:
    """25 images of noise, whose brightness and redness are the concepts."""
    folder.mkdir(exist_ok=True)
    generator, rows = np.random.default_rng(0), ["image,label,bright,red,split"]
    for i in range(25):
        bright, red = i % 2, i // 2 % 2
        pixels = generator.integers(0, 128, (20, 20, 3)) + 100 * bright
        pixels[..., 1:] //= 1 + red
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        rows.append(
            f"{i}.png,{'ab'[bright and red]},{bright},{red},{'train' if i < 20 else 'val' if i < 24 else 'test'}"
        )
    (folder / "table.csv").write_text("\n".join(rows) + "\n")


def make_run(kind: str, folder: Path, **options: Any) -> tuple[Trainer, CBMModule, Any]:
    """Trainer, model and data of a run that writes a checkpoint after each epoch."""
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    common: dict[str, Any] = {"phases": "sequential", "lr": 0.05, "lr_scheduler": "OneCycleLR"}
    common |= {name: options.pop(name) for name in ("phases", "lr_scheduler") if name in options}
    data: Any
    if kind == "images":
        draw_images(drawn := folder.parent / "drawn")
        data = ConceptFolder(str(drawn), "table.csv", split_column="split", image_size=16, batch_size=8, num_workers=2)
        model = CBMModule(ToyImageBackbone(), EmbeddingBottleneck(2), data=data, **common)
    elif kind == "embedding":
        data = ToyData(n=64)
        model = CBMModule(ToyBackbone(dropout=0.3), EmbeddingBottleneck(4, randint=0.5), data=data, **common)
    elif kind == "linear":
        data = ToyData(n=64)
        scheduler = {"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.7}}
        model = CBMModule(
            NoisyBackbone(dropout=0.3),
            LinearBottleneck("logits", extra_dims=2, randint=0.5),
            data=data,
            **{**common, "lr_scheduler": scheduler, "optimizer": "Adamax"},
        )
    else:
        data = ForeignData(shuffle=True)
        model = CBMModule(ToyBackbone(dropout=0.3), concepts=4, num_classes=CLASSES, **common)
    keep = ModelCheckpoint(folder, **{"filename": "{epoch}", "save_top_k": -1, **options.pop("keep", {})})
    callbacks = [keep, *options.pop("callbacks", [])]
    return quiet_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=callbacks, **options), model, data


class KillAt(Callback):
    """Kills the process after a batch, without any farewell."""

    def __init__(self, kill: Kill) -> None:
        self.kill = kill

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (self.kill.epoch, self.kill.batch):
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """Run and kill each of `KILLS` in a fork of its own; fails where one ends in another way."""
    torch.set_num_threads(1)
    for kill in KILLS:
        child = os.fork()
        if child == 0:
            trainer, model, data = make_run(kill.kind, folder / kill.folder, callbacks=[KillAt(kill)])
            trainer.fit(model, data)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{kill} ended with status {status} instead of being killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
