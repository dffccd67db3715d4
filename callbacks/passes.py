"""Passes over loaders that a callback makes by itself, beside the Trainer's own loop."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from typing import Any, NamedTuple, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torchmetrics.utilities.distributed import gather_all_tensors

from cbm_lightning.data import ConceptDataModule
from cbm_lightning.modes import evaluating
from cbm_lightning.types import Batch, Prediction


class Predicts(Protocol):
    """What `predictions` needs of a LightningModule."""

    def read_batch(self, batch: Any) -> Batch:
        """A dict with ``image`` (or features), ``concepts`` and ``label``, as far as the batch has them."""

    def __call__(self, batch: Batch) -> Prediction:
        """Predict concepts and label."""


class Predicted(NamedTuple):
    """A batch of a split that the Trainer is not evaluating.

    Attributes:
        prediction: What the model says.
        batch: As `Predicts.read_batch` reads it, on the device.
        position: ``[B]`` int64, a number a sample, unique in the split.
    """

    prediction: Prediction
    batch: Batch
    position: Tensor


def predictions(
    trainer: Trainer, pl_module: LightningModule, split: str, limit: int | None = None
) -> Generator[Predicted, None, None]:
    """Predict a split once, its samples shared among the processes; modes and random states stay as they were.

    Args:
        trainer: It, its datamodule or its module has the split.
        pl_module: Predicts, see `Predicts`.
        split: ``"train"`` (with its augmentation) or ``"val"``.
        limit: Batches of the loader at most; all by default.

    Yields:
        The samples of this process, batch by batch.
    """
    module = cast(Predicts, pl_module)
    with evaluating(pl_module), closing(batches(trainer, pl_module, split, limit)) as found:
        for batch, position in found:
            yield Predicted(predict(trainer, module, batch), batch, position)


def batches(
    trainer: Trainer, pl_module: LightningModule, split: str, limit: int | None = None
) -> Generator[tuple[Batch, Tensor], None, None]:
    """Read a split once, without predicting. Arguments as in `predictions`.

    Yields:
        Batches on the device, of the samples of this process, and their positions ``[B]`` in the split.
    """
    module = cast(Predicts, pl_module)
    with isolate_rng(), torch.no_grad():
        loader, shared = loader_of(trainer, pl_module, split)
        world, rank = trainer.world_size, trainer.global_rank
        positions = Positions(loader, world if shared else 1, rank if shared else 0)
        for i, batch in enumerate(loader):
            if limit is not None and i >= limit:
                return
            converted = trainer.precision_plugin.convert_input(batch)
            content = module.read_batch(trainer.strategy.batch_to_device(converted, dataloader_idx=0))
            size = next(len(value) for value in content.values() if isinstance(value, Tensor))
            position, _ = positions.take(size)
            if not shared and world > 1:
                # a loader that knows nothing of processes gives each of them everything
                rows = slice(rank, None, world)
                content = {name: rows_of(value, size, rows) for name, value in content.items()}
                position = position[rows]
            yield content, position


def rows_of(value: Any, size: int, rows: slice) -> Any:
    """Some rows of what a batch of ``size`` samples holds; other things stay as they are."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


def predict(trainer: Trainer, module: Predicts, batch: Batch) -> Prediction:
    """Predict a batch in the Trainer's precision.

    Raises:
        TypeError: The module returns something else than a `Prediction`.
    """
    with trainer.precision_plugin.forward_context():
        prediction = module(batch)
    if not isinstance(prediction, Prediction):
        raise TypeError(
            f"{type(module).__name__} returned {type(prediction).__name__}; a module whose concepts are corrected "
            "returns a Prediction(logits, concepts) for a batch"
        )
    return prediction


def prediction_of(trainer: Trainer, module: Predicts, outputs: Any, batch: Batch) -> Prediction:
    """The ``prediction`` that the step of a module returned, or a new one where it returned none."""
    found = outputs.get("prediction") if isinstance(outputs, Mapping) else None
    return found if isinstance(found, Prediction) else predict(trainer, module, batch)


def loader_of(trainer: Trainer, pl_module: LightningModule, split: str) -> tuple[Iterable[Any], bool]:
    """A loader of a split, wherever the Trainer would take it from, and whether it shares samples among processes.

    It is a loader of its own: the Trainer's keeps its place, its workers and its random state.

    Raises:
        ValueError: There is none; the message says what needs it.
    """
    data = getattr(trainer, "datamodule", None)
    fitting = trainer.state.fn == "fit"
    if isinstance(data, ConceptDataModule):
        data.setup("fit")
        return data.ordered_dataloader(split), True
    given = getattr(trainer, "train_dataloader" if split == "train" else "val_dataloaders", None)
    if fitting and given is not None:
        return in_order(flatten(given)[0])
    hook = f"{split}_dataloader"
    for source in (data, pl_module):
        if source is not None and is_overridden(hook, source):
            if not fitting and source is data:
                # never the module, whose setup may build or initialise what is being tested
                data.setup("fit")
            return in_order(flatten(getattr(source, hook)())[0])
    raise ValueError(
        f"the {split} split is needed and there is no datamodule with a {hook}: pass the datamodule to the Trainer, or "
        "choose options that learn nothing from it"
    )


def in_order(loader: Any) -> tuple[Iterable[Any], bool]:
    """A loader of the same samples in order, and whether it shares them among processes.

    What is no map-style ``DataLoader`` with batches is returned as it is.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader, False
    sampler: Any = loader.sampler
    distributed = isinstance(sampler, DistributedSampler)
    own = sampler.dataset is loader.dataset if distributed else isinstance(sampler, (RandomSampler, SequentialSampler))
    rows: Any = None
    if not own:
        # a sampler of the user's chooses the samples; drawing from it must not move its generator
        generator = getattr(sampler, "generator", None)
        state = None if generator is None else generator.get_state()
        rows = list(sampler)
        if generator is not None:
            generator.set_state(state)
    made: DataLoader[Any] = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=rows,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(0),
    )
    return made, distributed and not own


def flatten(loaders: Any) -> list[Any]:
    """The loaders of whatever collection a user gave."""
    return list(CombinedLoader(loaders).flattened)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, in rank order and the same everywhere; a collective call."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    return torch.cat(gather_all_tensors(rows.contiguous()))


class Positions:
    """Numbers the samples of an evaluation as the whole split counts them, on any number of processes.

    Samples that a `DistributedSampler` repeats to give each process the same number are told apart by a position
    beyond the end.

    Args:
        loader: Whose samples are counted.
        world: Number of processes that share them, one sample each in turn.
        rank: Number of this process.
    """

    def __init__(self, loader: Any, world: int, rank: int) -> None:
        self.world, self.rank = world, rank
        self.seen = 0
        sampler: Any = getattr(loader, "sampler", None)
        dataset: Any = sampler.dataset if isinstance(sampler, DistributedSampler) else None
        self.end = None if dataset is None else len(dataset)

    def take(self, samples: int) -> tuple[Tensor, Tensor]:
        """``[B]`` positions of the next samples, and ``[B]`` whether each is there for the first time."""
        positions = (self.seen + torch.arange(samples)) * self.world + self.rank
        self.seen += samples
        first = torch.ones_like(positions, dtype=torch.bool) if self.end is None else positions < self.end
        return positions, first
