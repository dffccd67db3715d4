"""Sparse runs on one process and on two: ``python sparsity_script.py FOLDER NAME...`` writes what tests compare."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from toy import CLASSES, WIDTH, ToyData, quiet_trainer

from cbm_lightning import CBMModule, LinearBottleneck, Phase
from cbm_lightning.backbones import Identity
from cbm_lightning.callbacks import SparsitySchedule

HEAD, SCORES = "head.linear.weight", "bottleneck.scores.weight"
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"mode": "linear", "strength": 0.1, "begin": 0.0, "end": 0.5},
    "cubic": {"mode": "cubic", "target_nec": 2, "parameters": [HEAD, SCORES], "begin": 0.0, "end": 0.6},
    "adaptive": {"mode": "adaptive", "strength": 0.05, "target_nec": 5 / 3, "end": 0.6, "finetune": 0.3},
    "rows": {
        "mode": "linear",
        "strength": 0.3,
        "penalty": "group",
        "group_dim": 0,
        "parameters": SCORES,
        "begin": 0.0,
    },
}
LOGISTIC = "sklearn.linear_model.LogisticRegression"
SOLVERS: dict[str, Any] = {
    "path": {"class_path": "ElasticNetPath", "init_args": {"nec": 2, "tol": 1e-8, "max_iter": 1000}},
    "logistic": {"class_path": LOGISTIC, "init_args": {"C": 0.5, "tol": 1e-8, "max_iter": 1000}},
    "class unseen": {"class_path": "ElasticNetPath", "init_args": {"lambdas": 0.05, "tol": 1e-8, "max_iter": 1000}},
}


class Even(ToyData):
    """48 samples to train on, with batches of eight for all processes together."""

    def __init__(self, processes: int, unseen: int | None = None) -> None:
        super().__init__(n=48, batch_size=8 // processes)
        self.unseen = unseen

    def tensors(self, name: str) -> dict[str, Tensor]:
        rows = super().tensors(name)
        if self.unseen is not None:
            # its samples belong to other classes now
            rows["label"] = torch.where(rows["label"] == self.unseen, (self.unseen + 1) % CLASSES, rows["label"])
        return rows


class Keep(Callback):
    """Keeps the weights that each process ends with, what it logged, and what it was warned of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warned: list[str] = []

    def on_fit_start(self, trainer: Trainer, model: Any) -> None:
        warnings.showwarning = lambda message, *others: self.warned.append(str(message))

    def on_fit_end(self, trainer: Trainer, model: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
            "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "warned": self.warned,
        }
        torch.save(content, self.folder / f"rank {trainer.global_rank}.pt")


def run(folder: Path, name: str, processes: int) -> None:
    """One run, by the name of its schedule or solver."""
    torch.manual_seed(0)
    phases: Any = "joint"
    callbacks: list[Callback] = [Keep(folder / f"{name} {processes}")]
    if name in SCHEDULES:
        callbacks.append(SparsitySchedule(**SCHEDULES[name]))
    else:
        phases = [Phase("joint", epochs=1), Phase("head", train=["head"], solver=SOLVERS[name])]
    model = CBMModule(
        Identity(WIDTH),
        LinearBottleneck("logits"),
        concepts=ToyData().concept_set,
        num_classes=CLASSES,
        phases=phases,
        optimizer="SGD",
        lr=0.2,
    )
    options = {"devices": processes, "strategy": "auto" if processes == 1 else "ddp_fork"}
    trainer = quiet_trainer(max_epochs=2 if name in SOLVERS else 3, callbacks=callbacks, **options)
    trainer.fit(model, Even(processes, unseen=1 if name == "class unseen" else None))


def main(folder: Path, names: list[str]) -> None:
    """The runs named, on both numbers of processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("always")
    for name in names:
        for processes in (1, 2):
            try:
                run(folder, name, processes)
            except Exception as error:
                (folder / f"{name} {processes}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
