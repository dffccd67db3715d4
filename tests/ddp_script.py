"""The same runs on one process and on two: ``python ddp_script.py FOLDER`` writes what `test_ddp` compares."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer

from cbm_lightning import CBMModule, ConceptLoss, EmbeddingBottleneck, LinearBottleneck, ResidualHead
from cbm_lightning.concepts import ConceptSet

MIXED = ConceptSet(["red", "round", "small", "wet"], kinds=["binary", "binary", "binary", "real"])


class KeepRank(Callback):
    """Keeps the weights of each process after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer, model) -> None:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.folder.mkdir(exist_ok=True)
        torch.save(state, self.folder / f"rank {trainer.global_rank} epoch {trainer.current_epoch}.pt")


def make(bottleneck: Any = None, **options: Any) -> CBMModule:
    torch.manual_seed(0)
    concepts = options.pop("concepts", ToyData().concept_set)
    return CBMModule(ToyBackbone(dropout=0.2), bottleneck, concepts=concepts, num_classes=CLASSES, **options)


def data() -> ToyData:
    """47 samples to train on, 41 to evaluate on: 6 batches for one process, 5 for the other."""
    return ToyData(n=47, n_eval=41, batch_size=4)


def trainer(processes: int, strategy: str = "ddp_fork", **options: Any) -> Trainer:
    return quiet_trainer(devices=processes, strategy="auto" if processes == 1 else strategy, **options)


def evaluate(folder: Path) -> None:
    """Metrics of the same weights on one process and on two."""
    models = {
        "defaults": make(),
        "all scores": make(LinearBottleneck("logits"), head=ResidualHead(), concept_loss=ConceptLoss("sum")),
        "real concepts": make(concepts=MIXED),
    }
    torch.nn.init.normal_(models["all scores"].head.side.weight)
    scores: dict[str, dict[int, Any]] = {name: {} for name in models}
    for name, model in models.items():
        for processes in (1, 2):
            found = trainer(processes).validate(model, data(), verbose=False)[0]
            scores[name][processes] = found | trainer(processes).test(model, data(), verbose=False)[0]
    (folder / "scores.json").write_text(json.dumps(scores))


def fit(folder: Path) -> None:
    """Runs on two processes, and one that is resumed."""
    cases = {
        "joint": (make(LinearBottleneck("logits", randint=0.3)), "ddp_fork"),
        "sequential": (make(EmbeddingBottleneck(3), phases="sequential"), "ddp_fork_find_unused_parameters_true"),
    }
    for name, (model, strategy) in cases.items():
        keep = ModelCheckpoint(folder / name, "{epoch}", save_top_k=-1)
        options: dict[str, Any] = {"max_epochs": 4, "enable_checkpointing": True}
        trainer(2, strategy, callbacks=[keep, KeepRank(folder / f"{name} ranks")], **options).fit(model, data())
    model = make(EmbeddingBottleneck(3), phases="sequential")
    keep = ModelCheckpoint(folder / "resumed", "{epoch}", save_top_k=-1)
    resumed = trainer(2, cases["sequential"][1], callbacks=[keep, KeepRank(folder / "resumed ranks")], **options)
    resumed.fit(model, data(), ckpt_path=folder / "sequential" / "epoch=1.ckpt", weights_only=True)


def refuse(folder: Path) -> None:
    """What plain DDP says to phases and to a head without a loss."""
    said = {}
    for name, model in {
        "sequential": make(phases="sequential"),
        "no label": make(loss_weights={"label": 0.0}),
    }.items():
        try:
            trainer(2, max_epochs=2).fit(model, data())
        except Exception as error:
            said[name] = str(error)
    (folder / "refused.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*sync_dist.*")
    for step in (evaluate, fit, refuse):
        step(Path(sys.argv[1]))
