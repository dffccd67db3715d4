"""`CachedFeatures`: any datamodule, encoded once by a frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from torch.utils.data.distributed import DistributedSampler

from cbm_lightning.backbones.base import Backbone
from cbm_lightning.backbones.factory import create_backbone
from cbm_lightning.backbones.identity import Identity
from cbm_lightning.batches import read_batch
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, Draw, TensorDataset
from cbm_lightning.data.feature_cache import CorruptCacheError, as_float32, content_key, read, verify, write
from cbm_lightning.types import Batch

PROBED_SAMPLES = 16


class CachedFeatures(ConceptDataModule):
    """Replaces images by the features of a frozen backbone, computed once and kept on disk.

    Batches hold ``embedding [B, D]`` (and ``tokens [B, N, D]`` on request) in place of ``image``, with all other
    tensors of the wrapped batches; pixel masks are kept only beside tokens. By default the backbone is the one of the
    model in training, so that the same model works on images afterwards. Every split, train included, goes through the
    evaluation transform: augmented images have no features that could be computed once.

    A split is encoded when its loader is first asked for, which is after Lightning has restored a checkpoint and moved
    the model to its device. On several processes one of each node encodes and the others wait. The name of the file is
    a hash of all that the features depend on: weights and options of the backbone; options, annotations and `files`
    (sizes and times) of the wrapped datamodule; and a few samples as the backbone sees them. A datamodule that is no
    `ConceptDataModule` cannot say what it holds, so all its samples are read (not encoded) to find their file. Files
    are verified by their checksum before use, and a broken one is made again.

    Args:
        data: The datamodule to encode, its batches dicts with an ``image``, ``(x, y)`` or ``(x, c, y)``. Encoding uses
            its ``batch_size`` and ``num_workers``. It belongs to the cache from then on: make another one to train on
            images.
        backbone: The encoder, as a spec (``"timm/resnet18"``) or a `Backbone`, for models whose own backbone is
            ``Identity``. None takes the backbone of the model in training, which has to be frozen.
        tokens: Cache tokens beside the pooled vectors; they take ``N`` times the space.
        dtype: Type of the features on disk; batches are float32 always.
        cache_dir: Folder of the files, made if needed. Stale files are never deleted.
        batch_size: Samples a batch and process in training.
        num_workers: Loader processes in training; reading features gains nothing from them.
        seed: Seed of the order in training.

    Example:
        >>> import tempfile
        >>> from cbm_lightning.data.rendered_birds import RenderedBirds
        >>> birds = RenderedBirds(num_train=8, num_val=4, num_test=4)
        >>> data = CachedFeatures(birds, "timm/test_resnet", cache_dir=tempfile.mkdtemp())
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["embedding"].shape
        torch.Size([8, 96])
    """

    def __init__(
        self,
        data: LightningDataModule,
        backbone: str | Backbone | None = None,
        *,
        tokens: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        cache_dir: str = ".cbm_cache",
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: expected 'float32' or 'float16', got {dtype!r}")
        # of any type, for a foreign datamodule has the attributes that its author gave it
        self.data: Any = data
        self.tokens = tokens
        self.dtype = dtype
        self.cache_dir = cache_dir
        self.prepare_data_per_node = data.prepare_data_per_node
        self.encoder = None if backbone is None else create_backbone(backbone)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the wrapped datamodule knows."""
        if name.startswith("_") or name == "data":
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.data, name)

    @property
    def concept_set(self) -> ConceptSet:
        """The concepts of the wrapped datamodule."""
        found: ConceptSet = self.data.concept_set
        return found

    @property
    def class_names(self) -> list[str]:
        """The classes of the wrapped datamodule."""
        found: list[str] = self.data.class_names
        return found

    @property
    def num_classes(self) -> int:
        """Number of classes of the wrapped datamodule."""
        found: int = self.data.num_classes
        return found

    @property
    def feature_dim(self) -> int | None:
        """Width of the pooled features of the backbone given, None where the model brings its own."""
        return None if self.encoder is None else self.encoder.dims.pooled

    def bayes_accuracy(self) -> float | None:
        """What the wrapped datamodule knows of the best label accuracy."""
        return self.data.bayes_accuracy() if isinstance(self.data, ConceptDataModule) else None

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])`` of a split; encodes it where only the batches know them.

        Raises:
            KeyError: The batches of a foreign datamodule hold no concepts.
        """
        if isinstance(self.data, ConceptDataModule):
            return self.data.annotations(split)
        tensors = self.make_split(split).tensors
        if "concepts" not in tensors:
            raise KeyError(f"the batches of {type(self.data).__name__} hold no concepts, only {sorted(tensors)}")
        return tensors["concepts"], tensors["label"]

    def prepare_data(self) -> None:
        """Prepare the wrapped datamodule."""
        self.data.trainer = self.trainer
        self.data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Set up the wrapped datamodule for the backbone; features follow when a loader is asked for.

        Raises:
            ValueError: There is no backbone, it is not frozen, or it has no tokens and tokens are wanted.
        """
        self.data.trainer = self.trainer
        backbone = self._frozen_backbone()
        if isinstance(self.data, ConceptDataModule) and self.data.encoder is not backbone:
            # splits that were made for another backbone carry its transforms
            self.data.splits.clear()
            self.data.encoder = backbone
        self.data.setup(stage)

    def teardown(self, stage: str | None = None) -> None:
        """Tear down the wrapped datamodule."""
        self.data.teardown(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled anew each epoch, by ``seed`` and epoch."""
        self.splits["train"] = self.make_split("train")
        return super().train_dataloader()

    def ordered_dataloader(self, name: str) -> DataLoader[Any]:
        """Every sample of a split once, in order; encodes what no cache holds."""
        self.splits[name] = self.make_split(name)
        return super().ordered_dataloader(name)

    def make_split(self, name: str) -> TensorDataset:
        """The features of a split, encoded now if no file holds them.

        Raises:
            ValueError: The wrapped batches hold no image or are augmented at random, or features are not finite.
        """
        backbone = self._frozen_backbone()
        source = self._source(name)
        key = self._key(name, source, backbone)
        if self.trainer is not None:
            key = self.trainer.strategy.broadcast(key)
        path = Path(self.cache_dir) / f"{name}-{key[:32]}.safetensors"
        if self._writes() and not _is_intact(path, key):
            self._write(path, key, source, backbone)
        if self.trainer is not None:
            self.trainer.strategy.barrier("cached features")
        # evaluation runs in inference mode, whose tensors could not be trained on later
        with torch.inference_mode(False):
            return TensorDataset(read(path, key), None if self.dtype == "float32" else as_float32)

    def _frozen_backbone(self) -> Backbone:
        backbone = self.backbone()
        if backbone is None or isinstance(backbone, Identity):
            found = "none" if backbone is None else "Identity, which encodes nothing"
            raise ValueError(
                f"backbone: CachedFeatures found {found}; pass backbone=..., or use a Trainer with a model whose "
                "'backbone' is frozen and encodes images"
            )
        if self.encoder is None and not backbone.frozen:
            raise ValueError(
                f"backbone: the model's {type(backbone).__name__} is trained, so that its features change with every "
                "step and cannot be cached; make it with frozen=True, or train on images"
            )
        if self.tokens and backbone.dims.tokens is None:
            raise ValueError(f"tokens: {type(backbone).__name__} has no tokens to cache; use tokens=False")
        return backbone

    def _source(self, name: str) -> DataLoader[Any]:
        """The wrapped split in order, each sample once."""
        if isinstance(self.data, ConceptDataModule):
            dataset = self.data.splits[name]
            return _in_order(dataset, self.data.batch_size, self.data.num_workers, getattr(dataset, "collate", None))
        loader = getattr(self.data, f"{name}_dataloader")()
        whole = (RandomSampler, SequentialSampler, DistributedSampler)
        if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, whole) or loader.batch_size is None:
            raise ValueError(
                f"data: {name}_dataloader of {type(self.data).__name__} has to be one DataLoader over all samples of a "
                f"map-style dataset, with a batch_size and no sampler of its own, got {type(loader).__name__}; make "
                "subsets with torch.utils.data.Subset"
            )
        return _in_order(loader.dataset, loader.batch_size, loader.num_workers, loader.collate_fn)

    def _read(self, raw: Any) -> Batch:
        """A batch as the model would read it."""
        reader = getattr(getattr(self.trainer, "lightning_module", None), "read_batch", read_batch)
        batch: Batch = reader(raw)
        if "image" not in batch:
            raise ValueError(f"data: CachedFeatures encodes the 'image' of a batch, this one has only {sorted(batch)}")
        return batch

    def _key(self, name: str, source: DataLoader[Any], backbone: Backbone) -> str:
        identity = _identity(self.data, name)
        samples = self._samples_key(name, source, every=identity is None)
        count = len(source.dataset)  # type: ignore[arg-type]
        return content_key(
            [_options(backbone), backbone.state_dict(), identity, count, samples, self.tokens, self.dtype]
        )

    def _samples_key(self, name: str, source: DataLoader[Any], every: bool) -> str:
        """Hash samples as the backbone would see them: a few, or all where nothing else says what the data is."""
        dataset: Any = source.dataset
        count = len(dataset)
        if count == 0:
            raise ValueError(f"data: the {name} split is empty; check its split options")
        rows = torch.linspace(0, count - 1, min(count, PROBED_SAMPLES)).long().tolist()
        # drawn in two epochs, because augmentation may be seeded by the epoch
        draws = ([Draw(row, epoch) for row in rows] for epoch in (0, 1))
        probes = [_in_order(Subset(dataset, few), PROBED_SAMPLES, 0, source.collate_fn) for few in draws]
        key, again = (content_key([_tensors(self._read(batch)) for batch in probe]) for probe in probes)
        if key != again:
            raise ValueError(
                f"data: the {name} split is augmented, for its samples differ from epoch to epoch, and their features "
                "cannot be computed once; turn the augmentation off"
            )
        return content_key([content_key(_tensors(self._read(batch))) for batch in source]) if every else key

    def _writes(self) -> bool:
        trainer = self.trainer
        if trainer is None:
            return True
        return trainer.local_rank == 0 if self.prepare_data_per_node else trainer.is_global_zero

    def _write(self, path: Path, key: str, source: DataLoader[Any], backbone: Backbone) -> None:
        count = len(source.dataset)  # type: ignore[arg-type]
        rank_zero_info(f"encoding {count} samples with {type(backbone).__name__} into {path}")
        with self._encoding(backbone) as device:
            write(path, key, count, (self._encode(backbone, batch, device) for batch in self._progress(source)))

    @contextmanager
    def _encoding(self, backbone: Backbone) -> Iterator[torch.device]:
        """The backbone in evaluation mode; one that is not the model's is on the Trainer's device meanwhile."""
        home = _device(backbone)
        device = self.trainer.strategy.root_device if self.encoder is not None and self.trainer is not None else home
        training = backbone.training
        backbone.to(device).eval()
        try:
            yield device
        finally:
            backbone.to(home).train(training)

    def _progress(self, source: DataLoader[Any]) -> Any:
        from tqdm import tqdm  # type: ignore[import-untyped]

        shown = self.trainer is None or self.trainer.progress_bar_callback is not None
        return tqdm(source, desc="Encoding", unit="batch", leave=False, disable=not shown)

    @torch.no_grad()
    def _encode(self, backbone: Backbone, raw: Any, device: torch.device) -> dict[str, Tensor]:
        batch = _tensors(self._read(raw))
        image = batch["image"]
        weight = next(backbone.parameters(), image)
        features = backbone(image.to(device, weight.dtype if image.is_floating_point() else image.dtype))
        dropped = {"image", "index"} if self.tokens else {"image", "index", "concept_masks"}
        rows = {
            name: value for name, value in batch.items() if name not in dropped and value.shape[:1] == image.shape[:1]
        }
        if features.pooled.ndim != 2:
            raise ValueError(
                f"backbone: {type(backbone).__name__} made of images a pooled vector of shape "
                f"{list(features.pooled.shape)}, expected [B, D]; give a backbone that encodes images"
            )
        rows["embedding"] = self._stored(features.pooled)
        if self.tokens:
            rows["tokens"] = self._stored(features.tokens)
            if features.mask is not None:
                rows["token_mask"] = features.mask.cpu()
        return rows

    def _stored(self, features: Tensor) -> Tensor:
        stored = features.to("cpu", getattr(torch, self.dtype))
        if not stored.isfinite().all():
            raise ValueError(
                f"backbone: some features are not finite in {self.dtype}; check the images and weights"
                + (", or use dtype='float32'" if self.dtype == "float16" else "")
            )
        return stored


def _is_intact(path: Path, key: str) -> bool:
    try:
        verify(path, key)
    except FileNotFoundError:
        return False
    except CorruptCacheError as error:
        rank_zero_warn(f"{error}; encoding again")
        return False
    return True


def _in_order(dataset: Any, batch_size: int, num_workers: int, collate: Callable[[Any], Any] | None) -> DataLoader[Any]:
    # its own generator, so that making an iterator draws nothing from the global one
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        generator=generator,
    )


def _device(backbone: Backbone) -> torch.device:
    weight = next(backbone.parameters(), None)
    return torch.device("cpu") if weight is None else weight.device


def _options(backbone: Backbone) -> Any:
    """The options of a backbone; the printed structure stands in for a bare module, which has no options to tell."""
    try:
        return backbone.spec()
    except TypeError:
        return repr(backbone)


def _identity(data: LightningDataModule, split: str) -> Any:
    """What a datamodule knows of the content of a split without reading it, or None if it knows too little."""
    if not isinstance(data, ConceptDataModule):
        return None
    try:
        spec = data.spec()
    except TypeError:
        return None
    options = {name: value for name, value in spec["init_args"].items() if name not in ("batch_size", "num_workers")}
    stats = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in data.files())
    return [split, spec["class_path"], options, data.annotations(split), stats]


def _tensors(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
