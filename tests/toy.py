"""Tiny stand-ins: a backbone of one layer and a datamodule of drawn numbers, for tests of everything else."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cbm_lightning.backbones.base import Backbone
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.types import FeatureDims, Features

WIDTH, CONCEPTS, CLASSES = 6, 4, 3


class ToyBackbone(Backbone):
    """Linear, BatchNorm and dropout over ``[B, 6]`` inputs; counts its calls."""

    def __init__(
        self, width: int = 8, dropout: float = 0.0, *, frozen: bool = False, freeze_norm: bool = False
    ) -> None:
        super().__init__(frozen=frozen, freeze_norm=freeze_norm)
        self.layers = nn.Sequential(nn.Linear(WIDTH, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout))
        self.dims = FeatureDims(width)
        self.calls = 0
        self.freeze()

    def encode(self, x: Tensor) -> Features:
        self.calls += 1
        return Features(self.layers(x))


def toy_tensors(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs whose signs are the concepts; the label is which of three sums of concepts is largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, WIDTH, generator=generator)
    concepts = (x[:, :CONCEPTS] > 0).float()
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.2, 1.2], [0.0, 1.1, 1.1, 0.0]])
    return {"image": x, "concepts": concepts, "label": (concepts @ weight.T + torch.tensor([0.1, 0, 0])).argmax(1)}


class ToyData(ConceptDataModule):
    """Drawn numbers under the contract of our datamodules."""

    def __init__(
        self, n: int = 96, n_eval: int = 41, *, batch_size: int = 16, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.sizes = {"train": n, "val": n_eval, "test": n_eval}

    @property
    def concept_set(self) -> ConceptSet:
        return ConceptSet(["red", "round", "small", "wet"], groups={"look": ["red", "round"]})

    @property
    def class_names(self) -> list[str]:
        return ["apple", "stone", "plum"]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return toy_tensors(self.sizes[name], seed=["train", "val", "test"].index(name))

    def make_split(self, name: str) -> TensorDataset:
        return TensorDataset(self.tensors(name))

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        tensors = self.tensors(split)
        return tensors["concepts"], tensors["label"]


class ForeignData(LightningDataModule):
    """A user's own datamodule that knows nothing of concepts: yields ``(x, y)`` or ``(x, c, y)``."""

    def __init__(self, with_concepts: bool = True, shuffle: bool = False) -> None:
        super().__init__()
        self.with_concepts = with_concepts
        self.shuffle = shuffle

    def _loader(self, seed: int, shuffle: bool = False) -> DataLoader[Any]:
        rows = toy_tensors(48, seed)
        names = ("image", "concepts", "label") if self.with_concepts else ("image", "label")
        dataset = torch.utils.data.TensorDataset(*(rows[name] for name in names))
        return DataLoader(dataset, batch_size=16, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0, self.shuffle)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(2)


def quiet_trainer(**options: Any) -> Trainer:
    """A Trainer that writes nothing and prints little."""
    silent = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "log_every_n_steps": 1, **silent, **options})
