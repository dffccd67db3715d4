"""A model to train, and records of what a run did to it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule
from cbm_lightning.phases import PARTS

STEPS = 6  # batches of ToyData's training split


def make(bottleneck=None, backbone=None, **options) -> CBMModule:
    torch.manual_seed(0)
    options = {"concepts": ToyData().concept_set, "num_classes": CLASSES, "lr": 0.02, **options}
    return CBMModule(ToyBackbone(dropout=0.2) if backbone is None else backbone, bottleneck, **options)


def states(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def part_of(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(f"{part}.")}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder(Callback):
    """Keeps what a run did: weights and logged names an epoch, learning rates a step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []
        self.phases: list[str] = []
        self.training: list[dict[str, bool]] = []

    def on_train_start(self, trainer, model) -> None:
        self.weights.append(states(model))

    def on_train_batch_start(self, trainer, model, batch, batch_idx) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
        if batch_idx == 0:
            self.phases.append(model.phase.name)
            self.training.append({name: getattr(model, name).training for name in PARTS})

    def on_train_epoch_end(self, trainer, model) -> None:
        self.weights.append(states(model))


class Log(DummyLogger):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.append(metrics)


def record(model: CBMModule, data=None, **options: Any) -> Recorder:
    recorder = Recorder()
    callbacks = [*options.pop("callbacks", []), recorder]
    trainer = quiet_trainer(callbacks=callbacks, **options)
    torch.manual_seed(1)
    trainer.fit(model, data or ToyData())
    return recorder
