"""What every datamodule of the package shares: splits, loaders and samplers that are exact on resume and under DDP."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from cbm_lightning.backbones.base import Backbone
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.configurable import Configurable
from cbm_lightning.types import Batch


class SizedDataset(Protocol):
    """A map-style dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> Any: ...


class ConceptDataModule(Configurable, LightningDataModule):
    """Base of the datamodules: subclasses say what the concepts are and make the three splits.

    Loaders draw the same samples in the same order after a resume (the order depends on ``seed`` and the epoch only)
    and evaluate every sample once on any number of processes.

    Args:
        batch_size: Samples a batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of splits, order and augmentation.

    Attributes:
        splits: Datasets by the names ``train``, ``val`` and ``test``, filled by `setup`.
        encoder: Set by `CachedFeatures`: the backbone that will see each sample once. It takes the place of the model's
            in `backbone`, and the train split is not augmented, for its features are computed a single time.
    """

    encoder: Backbone | None = None

    def __init__(self, *, batch_size: int = 64, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers: expected at least 0, got {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.splits: dict[str, SizedDataset] = {}
        self._followed: LightningModule | None = None

    @property
    @abstractmethod
    def concept_set(self) -> ConceptSet:
        """The concepts, known before `setup`."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]:
        """The classes in label order, known before `setup`."""

    @property
    def num_classes(self) -> int:
        """Number of classes ``L``."""
        return len(self.class_names)

    def bayes_accuracy(self) -> float | None:
        """The best label accuracy that the true concepts allow, None where nobody knows it."""
        return None

    @property
    def feature_dim(self) -> int | None:
        """Width of precomputed features in the batches, None where batches hold images."""
        return None

    @abstractmethod
    def make_split(self, name: str) -> SizedDataset:
        """Make the dataset ``"train"``, ``"val"`` or ``"test"``; called once each by `setup`."""

    def files(self) -> Iterable[Path]:
        """The files that the splits are read from, whose change makes cached features stale; none by default."""
        return ()

    @abstractmethod
    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])`` of a split without reading an image; call after `setup`.

        Raises:
            KeyError: The data has no annotated concepts.
        """

    def setup(self, stage: str | None = None) -> None:
        """Make the splits that a stage needs, each once.

        Raises:
            ValueError: A split is empty.
        """
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for name in needed.get(stage or "", ("train", "val", "test")):
            if name not in self.splits:
                dataset = self.make_split(name)
                if len(dataset) == 0:
                    raise ValueError(f"the {name} split of {type(self).__name__} is empty; check its split options")
                self.splits[name] = dataset
                if name == "train":
                    self._warn_of_co_occurrence()

    def _warn_of_co_occurrence(self) -> None:
        try:
            annotations = self.annotations("train")
        except KeyError:
            return  # nothing is annotated
        self.concept_set.warn(*annotations)

    def backbone(self) -> Backbone | None:
        """The backbone of the model in training, whose transforms and pixel statistics the data follow by default."""
        if self.encoder is not None:
            return self.encoder
        model = getattr(self.trainer, "lightning_module", None) or self._followed
        backbone = getattr(model, "backbone", None)
        return backbone if isinstance(backbone, Backbone) else None

    def follow(self, model: LightningModule) -> Self:
        """Prepare images as a model wants them where no Trainer does it; call before `setup`.

        Returns:
            The datamodule itself.
        """
        self._followed = model
        return self

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled anew each epoch, by ``seed`` and epoch."""
        world, rank = self._world()
        dataset = self.splits["train"]
        sampler = EpochSampler(
            dataset,  # type: ignore[arg-type]
            num_replicas=world,
            rank=rank,
            shuffle=True,
            seed=self.seed,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every sample once, in order."""
        return self.ordered_dataloader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Every sample once, in order."""
        return self.ordered_dataloader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test split."""
        return self.ordered_dataloader("test")

    def ordered_dataloader(self, name: str) -> DataLoader[Any]:
        """Every sample of a split once, in order, on any number of processes; call after `setup`.

        Args:
            name: ``"train"`` (with its augmentation), ``"val"`` or ``"test"``.
        """
        world, rank = self._world()
        dataset = self.splits[name]
        if world == 1:
            return self._loader(dataset, None)
        sampler = UnrepeatedDistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=False)
        return self._loader(dataset, sampler)

    def _loader(self, dataset: SizedDataset, sampler: DistributedSampler[Any] | None) -> DataLoader[Any]:
        return DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=getattr(dataset, "collate", None),
            persistent_workers=self.num_workers > 0,
            # its own generator, so that making an iterator draws nothing from the global one
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _world(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.world_size, trainer.global_rank) if trainer is not None else (1, 0)


class Draw(int):
    """An index that also says which epoch drew it, so that augmentation can be seeded by sample and epoch."""

    epoch: int

    def __new__(cls, index: int, epoch: int) -> Draw:
        """An int with an epoch."""
        made = super().__new__(cls, index)
        made.epoch = epoch
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return (Draw, (int(self), self.epoch))


class EpochSampler(DistributedSampler[Any]):
    """Shuffles by seed and epoch alone, on one process or many, and yields `Draw` indices."""

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch
        return (Draw(index, epoch) for index in super().__iter__())


class TensorDataset(Dataset[Batch]):
    """Rows of in-memory (or memory-mapped) tensors, fetched a whole batch at a time.

    Args:
        tensors: Name to ``[N, ...]`` tensor, one length for all.
        transform: Applied to each fetched batch dict (normalisation of pixels, say).

    Raises:
        ValueError: The lengths differ.
    """

    def __init__(self, tensors: dict[str, Tensor], transform: Callable[[Batch], Batch] | None = None) -> None:
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"tensors: expected one length for all, got {lengths}")
        self.tensors = tensors
        self.transform = transform

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        batch: Batch = {name: tensor[rows] for name, tensor in self.tensors.items()}
        batch["index"] = rows
        return self.transform(batch) if self.transform else batch

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Batches arrive whole."""
        return batch
