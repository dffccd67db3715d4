"""Image files as a dataset, and what datamodules of image files share: transforms, augmentation, geometry, splits."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cbm_lightning.backbones.base import ImageStats, Transform
from cbm_lightning.data.base import ConceptDataModule
from cbm_lightning.types import Batch

if TYPE_CHECKING:
    from PIL import Image

PLAIN_SIZE = 224
"""Side of the images in pixels where neither the user nor a backbone names one."""


def read_image(path: Path, mode: str = "RGB") -> Image.Image:
    """Decode an image file.

    Raises:
        ValueError: The file is missing or damaged; the message names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the image {path}: {error}; replace the file or leave it out") from error


def plain_transform(size: int, train: bool = False, stats: ImageStats | None = None) -> Transform:
    """The transform for models that bring none: a square crop as float ``[3, size, size]``.

    Evaluation scales the shorter side to ``size`` and keeps the centre. Training crops 60 to 100 % of the area at
    random and never flips, because a flip would exchange left and right in concepts that name them.

    Args:
        size: Side of the result in pixels.
        train: Crop at random.
        stats: Normalise pixels with these; without, they stay in [0, 1].
    """
    from torchvision.transforms import v2

    crop = [v2.RandomResizedCrop(size, scale=(0.6, 1.0))] if train else [v2.Resize(size), v2.CenterCrop(size)]
    normalise = [] if stats is None else [v2.Normalize(stats.mean, stats.std)]
    transform: Transform = v2.Compose([*crop, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), *normalise])
    return transform


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed the global generators that transforms draw from (torch, Python, NumPy) by a key, and restore them after.

    Args:
        key: Non-negative numbers; the same key gives the same draws in any process.
    """
    torch_seed, python_seed, numpy_seed = (int(word) for word in np.random.SeedSequence(key).generate_state(3))
    # the CPU generator alone: torch.manual_seed would also reset the generators of the accelerators
    generator = torch.default_generator
    states = generator.get_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    generator.manual_seed(torch_seed)
    random.seed(python_seed)
    np.random.seed(numpy_seed)  # noqa: NPY002
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002


class Geometry(NamedTuple):
    """Where a transform takes its pixels from: ``source = scale * target + offset`` an axis, counted in pixel centres.

    Attributes:
        scale: ``(x, y)``.
        offset: ``(x, y)`` in source pixels.
        size: ``(height, width)`` of the transformed image.
    """

    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]

    def map_points(self, points: Tensor) -> Tensor:
        """Points ``(x, y, visible)`` ``[P, 3]`` in the transformed image; invisible and cut-off ones become zeros."""
        height, width = self.size
        xy = (points[:, :2] - torch.tensor(self.offset)) / torch.tensor(self.scale)
        inside = (xy >= -0.5).all(1) & (xy[:, 0] < width - 0.5) & (xy[:, 1] < height - 0.5)
        visible = points[:, 2] * inside
        return torch.cat([xy, visible[:, None]], 1) * (visible > 0)[:, None]

    def map_mask(self, mask: Tensor) -> Tensor:
        """A mask ``[h, w]`` at the pixels of the transformed image ``[H, W]``: the nearest value, zero outside."""
        columns, rows = (
            (scale * torch.arange(length) + offset).round().long()
            for scale, offset, length in zip(self.scale, self.offset, reversed(self.size), strict=True)
        )
        height, width = mask.shape
        inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
        return mask[rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1)] * inside


def probe_geometry(transform: Transform, size: tuple[int, int]) -> Geometry:
    """Measure how a deterministic transform moves pixels, by what it makes of a ramp along each axis.

    So points and masks follow any transform that scales, crops, pads or flips and then normalises each channel: the
    backbone's own, or the user's. A black and a white image undo the normalisation and show where it pads.

    Args:
        transform: PIL image to ``[C, H, W]``.
        size: ``(width, height)`` of the images.

    Raises:
        ValueError: The transform does something else (rotates, draws at random), so that nothing can follow it.
    """
    from PIL import Image

    width, height = size
    black, white = (transform(Image.new("RGB", size, colour)).double() for colour in ("black", "white"))
    shown = ((white - black).abs() > 1e-6).all(0)
    scales, offsets = [], []
    for length, axis in ((width, 1), (height, 0)):
        ramp = np.linspace(0, 255, length).round().astype(np.uint8)
        picture = np.broadcast_to(ramp if axis == 1 else ramp[:, None], (height, width))
        level = ((transform(Image.fromarray(picture).convert("RGB")).double() - black) / (white - black)).mean(0)
        # the outermost levels are left out: filters repeat border pixels there, which bends the line
        usable = shown & (level > 0.03) & (level < 0.97)
        target = usable.nonzero()[:, axis].double()
        source = level[usable] * (length - 1)
        design = torch.stack([target, torch.ones_like(target)], 1)
        scale, offset = torch.linalg.lstsq(design, source).solution.tolist() if len(source) else (0.0, 0.0)
        error = (design @ torch.tensor([scale, offset], dtype=torch.double) - source).square().mean().sqrt().item()
        if not (scale and error <= 1 + 0.01 * length):
            raise ValueError(
                "parts and masks cannot follow this transform: it does more than scale, crop, pad, flip and normalise; "
                "use another eval_transform, or leave parts and masks out"
            )
        scales.append(scale)
        offsets.append(offset)
    return Geometry((scales[0], scales[1]), (offsets[0], offsets[1]), (black.shape[1], black.shape[2]))


class ImageDataset(Dataset[Batch]):
    """Image files with a row of tensors each, decoded and transformed on demand.

    An augmented image depends on ``seed``, epoch and index alone: not on the number of workers, nor on what ran before,
    so that a resumed run sees what an uninterrupted one sees.

    Args:
        paths: ``N`` image files.
        tensors: Name to ``[N, ...]`` tensor (``label``, ``concepts``, ...), copied into the items.
        transform: PIL image to ``[C, H, W]``.
        augmented: The transform draws at random.
        seed: Seed of the augmentation.
        parts: ``[N, P, 3]`` points ``(x, y, visible)`` in pixels of the files. Items of a split without augmentation
            have them as ``parts``, in pixels of the transformed image.
        masks: A row of ``K`` mask files an image, None where a concept has no mask; any pixel above zero belongs to the
            concept. Items of a split without augmentation have ``concept_masks`` ``[K, H, W]``, NaN where no mask is.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        tensors: Mapping[str, Tensor],
        transform: Transform,
        *,
        augmented: bool = False,
        seed: int = 0,
        parts: Tensor | None = None,
        masks: Sequence[Sequence[Path | None]] | None = None,
    ) -> None:
        if wrong := {name: len(tensor) for name, tensor in tensors.items() if len(tensor) != len(paths)}:
            raise ValueError(f"tensors: expected {len(paths)} rows, one an image, got {wrong}")
        self.paths = list(paths)
        self.tensors = dict(tensors)
        self.seed = seed
        self.parts = parts
        self.masks = masks
        self.use(transform, augmented)

    def use(self, transform: Transform, augmented: bool) -> None:
        """Replace the transform."""
        self.transform = transform
        self.augmented = augmented
        self._geometries: dict[tuple[int, int], Geometry] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch:
        row = int(index)
        picture = read_image(self.paths[row])
        item: Batch = {name: tensor[row] for name, tensor in self.tensors.items()}
        item["index"] = torch.tensor(row)
        if self.augmented:
            with seeded(self.seed, getattr(index, "epoch", 0), row):
                item["image"] = self.transform(picture)
            return item
        item["image"] = self.transform(picture)
        if self.parts is not None:
            item["parts"] = self._geometry(picture.size).map_points(self.parts[row])
        if self.masks is not None:
            item["concept_masks"] = torch.stack([self._mask(path, picture.size) for path in self.masks[row]])
        return item

    def _geometry(self, size: tuple[int, int]) -> Geometry:
        if size not in self._geometries:
            self._geometries[size] = probe_geometry(self.transform, size)
        return self._geometries[size]

    def _mask(self, path: Path | None, size: tuple[int, int]) -> Tensor:
        geometry = self._geometry(size)
        if path is None:
            return torch.full(geometry.size, torch.nan)
        mask = read_image(path, "L")
        if mask.size != size:
            raise ValueError(f"the mask {path} is {mask.size} pixels and its image {size}; draw masks at the same size")
        return geometry.map_mask(torch.from_numpy(np.asarray(mask) > 0).float())


class ImageDataModule(ConceptDataModule):
    """Base of the datamodules of image files: which transform a split gets, and its annotations.

    A transform of the user's comes first; then, with ``image_size``, a plain one of that size with the pixel statistics
    of the backbone; then the backbone's own; then the plain one at 224 pixels.

    Args:
        train_transform: Your own augmentation: PIL image to tensor ``[C, H, W]``. None takes ``eval_transform`` if that
            is given, otherwise the backbone's.
        eval_transform: Your own transform for validation and test. None takes the backbone's.
        image_size: Side of the images in pixels, in place of what the backbone asks for.
        augment: Train on augmented images. Without, training images are transformed as in evaluation.
        options: ``batch_size``, ``num_workers`` and ``seed`` of `ConceptDataModule`.

    Raises:
        ValueError: Two options contradict each other.
    """

    def __init__(
        self,
        *,
        train_transform: Callable[[Any], Any] | None = None,
        eval_transform: Callable[[Any], Any] | None = None,
        image_size: int | None = None,
        augment: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
        if image_size is not None and eval_transform is not None:
            raise ValueError("image_size has no effect beside an eval_transform; resize there and leave image_size out")
        if train_transform is not None and not augment:
            raise ValueError("augment: false leaves train_transform without effect; give one or the other")
        if self.seed < 0:
            raise ValueError(f"seed: expected at least 0, got {self.seed}")
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.image_size = image_size
        self.augment = augment

    @abstractmethod
    def make_split(self, name: str) -> ImageDataset:
        """Make the dataset ``"train"``, ``"val"`` or ``"test"``."""

    def setup(self, stage: str | None = None) -> None:
        """Make the splits that a stage needs; earlier ones change to the transforms of the model now in training."""
        for name, dataset in self.splits.items():
            if isinstance(dataset, ImageDataset):
                dataset.use(self.transform_of(name), self.is_augmented(name))
        super().setup(stage)

    def is_augmented(self, split: str) -> bool:
        """Whether the images of a split are transformed at random; never when each is encoded a single time."""
        return split == "train" and self.augment and self.encoder is None

    def transform_of(self, split: str) -> Transform:
        """The transform of a split under the model now in training."""
        train = self.is_augmented(split)
        own = (self.train_transform if train else None) or self.eval_transform
        if own is not None:
            return own
        backbone = self.backbone()
        if backbone is not None and self.image_size is None:
            theirs = (backbone.train_transform() if train else None) or backbone.eval_transform()
            if theirs is not None:
                return theirs
        stats = None if backbone is None else backbone.image_stats()
        return plain_transform(self.image_size or PLAIN_SIZE, train, stats)

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])`` of a split without reading an image; call after `setup`."""
        tensors = self.splits[split].tensors  # type: ignore[attr-defined]
        return tensors["concepts"], tensors["label"]


def stratified_split(
    labels: Tensor, fractions: Mapping[str, float], seed: int, units: Tensor | None = None
) -> dict[str, Tensor]:
    """Hold out parts of the rows, in each class by the same fraction and without cutting a unit in two.

    Args:
        labels: ``[N]`` class indices.
        fractions: Name of each part to its share of the units of a class, in [0, 1). A class of enough units has at
            least one in every part of a share above zero.
        seed: Seed of the draw.
        units: ``[N]`` integers; rows of equal value stay together (frames of one object, photographs of one patient).
            None lets every row stand alone. A unit of several classes counts for the smallest.

    Returns:
        Ascending row indices of each part and of ``"train"``, the rest.

    Raises:
        ValueError: The fractions leave nothing to train on.
    """
    if any(not 0 <= fraction < 1 for fraction in fractions.values()) or sum(fractions.values()) >= 1:
        raise ValueError(f"split fractions: expected each in [0, 1) and a sum below 1, got {dict(fractions)}")
    units = torch.arange(len(labels)) if units is None else units
    _, unit_of_row = torch.unique(units, return_inverse=True)
    n_units = int(unit_of_row.max()) + 1 if len(labels) else 0
    unit_labels = labels.new_zeros(n_units).scatter_reduce(0, unit_of_row, labels, "amin", include_self=False)
    shuffled = torch.randperm(n_units, generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[unit_labels[shuffled].argsort(stable=True)]
    counts = torch.bincount(unit_labels)
    rank = torch.arange(n_units) - (counts.cumsum(0) - counts)[unit_labels[shuffled]]
    part_of_unit = torch.full((n_units,), len(fractions))
    taken = torch.zeros_like(counts)
    for part, fraction in enumerate(fractions.values()):
        share = (fraction * counts).round().long()
        share = share.clamp(min=1).where((counts > len(fractions)) & (fraction > 0), share)
        chosen = (rank >= taken[unit_labels[shuffled]]) & (rank < (taken + share)[unit_labels[shuffled]])
        part_of_unit[shuffled[chosen]] = part
        taken += share
    part_of_row = part_of_unit[unit_of_row]
    return {name: (part_of_row == part).nonzero()[:, 0] for part, name in enumerate([*fractions, "train"])}
