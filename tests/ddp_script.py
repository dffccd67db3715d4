"""The same runs on one process and on two: ``python ddp_script.py FOLDER`` writes what `test_ddp` compares."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from toy import CLASSES, ToyBackbone, ToyData, quiet_trainer, toy_tensors
from toy_curves import toy_model

from cbm_lightning import CBMModule, ConceptLoss, EmbeddingBottleneck, LinearBottleneck, ResidualHead
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.interventions.leakage_check import LeakageWarning
from cbm_lightning.interventions.policies import ECTP, UCP, GlobalValidationImprovement, Rand

MIXED = ConceptSet(["red", "round", "small", "wet"], kinds=["binary", "binary", "binary", "real"])


class PlainLoaders(LightningDataModule):
    """A user's own datamodule, with subgroups; on two processes Lightning repeats one of the 41 test samples."""

    def _loader(self, n: int, seed: int, shuffle: bool = False) -> DataLoader[Any]:
        rows = {**toy_tensors(n, seed), "group": torch.arange(n) % 3}
        return DataLoader(TensorDataset(rows), batch_size=4, shuffle=shuffle, collate_fn=TensorDataset.collate)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(47, 0, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(41, 1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(41, 2)


class KeepRank(Callback):
    """Keeps the weights of each process after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer, model) -> None:
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.folder.mkdir(exist_ok=True)
        torch.save(state, self.folder / f"rank {trainer.global_rank} epoch {trainer.current_epoch}.pt")


class KeepCurves(Callback):
    """Keeps the curves that each process found."""

    def __init__(self, folder: Path, evaluations: list[InterventionEvaluation]) -> None:
        self.folder, self.evaluations = folder, evaluations

    def on_test_epoch_end(self, trainer, model) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        curves = {policy: found for each in self.evaluations for policy, found in each.result.curves.items()}
        samples = [each.result.samples for each in self.evaluations]
        torch.save({"curves": curves, "samples": samples}, self.folder / f"rank {trainer.global_rank}.pt")


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


def evaluations() -> list[InterventionEvaluation]:
    """Every way in which processes have to agree: draws, learned values and orders, and rankings of the split."""
    single = [Rand(), UCP(), GlobalValidationImprovement()]
    batch = [Rand(label="rand_batch"), UCP(label="ucp_batch"), ECTP(adaptive=True, label="ectp_batch")]
    return [
        InterventionEvaluation(single, values="percentile", competence="uniform", num_seeds=2),
        InterventionEvaluation(batch, scope="batch", num_seeds=2, block_size=7, label_level="class", name="batch"),
    ]


def correct(folder: Path) -> None:
    """Curves of the same weights on one process and on two, and of runs that train."""
    model = toy_model(LinearBottleneck("logits"))
    for name, make_data in {"ours": data, "plain": PlainLoaders}.items():
        for processes in (1, 2):
            kept = folder / "curves" / f"{name} {processes}"
            watchers = evaluations()
            evaluator = trainer(processes, callbacks=[*watchers, KeepCurves(kept, watchers)], default_root_dir=folder)
            scores = evaluator.test(model, make_data(), verbose=False)[0]
            (kept / "scores.json").write_text(json.dumps(scores))
    said: dict[str, Any] = {}
    for scope in ("single", "batch"):
        # of 41 samples one, so that a process has none
        few = InterventionEvaluation([UCP(label=scope)], scope=scope, max_samples=1)
        tester = trainer(2, callbacks=[few], default_root_dir=folder)
        try:
            said |= tester.test(model, PlainLoaders(), verbose=False)[0]
        except Exception as error:
            said[scope] = str(error)
    (folder / "few.json").write_text(json.dumps(said))
    watched = InterventionEvaluation(["ucp"], stages=["val"], values="percentile")
    keep = ModelCheckpoint(folder / "watched", "{epoch}", monitor="val/intervention/ucp/auc", mode="max")
    trainer(2, callbacks=[watched, keep], enable_checkpointing=True, default_root_dir=folder).fit(model, PlainLoaders())


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
    warnings.filterwarnings("ignore", category=LeakageWarning)  # of drawn weights
    for step in (evaluate, fit, refuse, correct):
        step(Path(sys.argv[1]))
