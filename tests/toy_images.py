"""Pictures of coloured spots, of which it is known where each concept is, and models that look at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones.base import Backbone
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.saliency import GradCAM
from cbm_lightning.types import FeatureDims, Features

SIZE, SPOT = 16, 4
NAMES = ["red", "green", "blue"]
CLASSES = ["none", "one", "more"]
SPLITS = ["train", "val", "test"]
Rows = dict[str, Tensor]


def spots(n: int, seed: int = 0) -> Rows:
    """A spot of its colour in a quarter of its own for each concept that holds; the label counts the spots, up to two.

    With ``concept_masks``, ``concept_boxes`` and ``concept_points``: no pixel and NaN where a concept does not hold.
    """
    generator = torch.Generator().manual_seed(seed)
    concepts = (torch.rand(n, len(NAMES), generator=generator) < 0.5).float()
    corners = 2 * torch.randint(0, 3, (n, len(NAMES), 2), generator=generator)
    image = 0.1 * torch.rand(n, 3, SIZE, SIZE, generator=generator)
    masks = torch.zeros(n, len(NAMES), SIZE, SIZE, dtype=torch.bool)
    boxes = torch.full((n, len(NAMES), 4), torch.nan)
    for i, k in concepts.nonzero().tolist():
        x, y = (corners[i, k] + torch.tensor([8 * (k % 2), 8 * (k // 2)])).tolist()
        masks[i, k, y : y + SPOT, x : x + SPOT] = True
        boxes[i, k] = torch.tensor([x, y, x + SPOT, y + SPOT])
    image[masks] = 1.0
    # pixel centres lie at whole numbers
    points = (boxes[..., :2] + boxes[..., 2:] - 1) / 2
    label = concepts.sum(1).long().clamp(max=2)
    where = {"concept_masks": masks, "concept_boxes": boxes, "concept_points": points}
    return {"image": image, "concepts": concepts, "label": label, **where}


def batch_of(n: int = 6, where: str = "masks", seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A batch with ``masks``, ``boxes``, ``points``, or several of them with spaces between; None takes a key out."""
    rows = spots(n, seed)
    kept = {"image", "concepts", "label", *(f"concept_{name}" for name in where.split())}
    changed = {name: value for name, value in rows.items() if name in kept} | changes
    return {name: value for name, value in changed.items() if value is not None}


class ToyImages(ConceptDataModule):
    """Spots under the contract of our datamodules.

    Args:
        where: See `batch_of`.
        change: Takes and returns the rows of a split.
    """

    def __init__(
        self,
        n: int = 12,
        n_eval: int = 9,
        where: str = "masks",
        change: Callable[[Rows], Rows] | None = None,
        *,
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.sizes = {"train": n, "val": n_eval, "test": n_eval}
        self.where, self.change = where, change

    @property
    def concept_set(self) -> ConceptSet:
        return ConceptSet(NAMES)

    @property
    def class_names(self) -> list[str]:
        return CLASSES

    def tensors(self, name: str) -> Rows:
        rows = batch_of(self.sizes[name], self.where, SPLITS.index(name))
        return rows if self.change is None else self.change(rows)

    def make_split(self, name: str) -> TensorDataset:
        return TensorDataset(self.tensors(name))

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        rows = self.tensors(split)
        return rows["concepts"], rows["label"]


class ForeignImages(LightningDataModule):
    """A user's own datamodule that knows of no annotations beforehand.

    Args:
        form: ``"dict"``, ``"tuple"`` (``(x, concepts, y)``), or ``"several"`` for two loaders a stage.
        options: Of `ToyImages`.
    """

    def __init__(self, form: str = "dict", **options: Any) -> None:
        super().__init__()
        self.form, self.rows = form, ToyImages(**options)

    def _loader(self, name: str) -> Any:
        rows, size = self.rows.tensors(name), self.rows.batch_size
        if self.form == "tuple":
            columns = [rows[key] for key in ("image", "concepts", "label")]
            return DataLoader(torch.utils.data.TensorDataset(*columns), batch_size=size)
        return DataLoader(TensorDataset(rows), batch_size=size, collate_fn=TensorDataset.collate)

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return [self._loader("val"), self._loader("train")] if self.form == "several" else self._loader("val")

    def test_dataloader(self) -> Any:
        return [self._loader("test"), self._loader("train")] if self.form == "several" else self._loader("test")


class ToyConv(Backbone):
    """Images to a map of 8 x 8 cells, with BatchNorm and dropout; counts its calls and the images it saw."""

    def __init__(
        self, width: int = 8, dropout: float = 0.2, *, frozen: bool = False, freeze_norm: bool = False
    ) -> None:
        super().__init__(frozen=frozen, freeze_norm=freeze_norm)
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.dims = FeatureDims(width, width, (8, 8))
        self.calls = self.images = 0
        self.freeze()

    def encode(self, x: Tensor) -> Features:
        self.calls, self.images = self.calls + 1, self.images + len(x)
        cells = self.layers(x)
        tokens = cells.flatten(2).transpose(1, 2)
        return Features(tokens.mean(1), tokens, grid=(cells.shape[2], cells.shape[3]))


class Asked(GradCAM):
    """Grad-CAM that remembers which images it was given, and which pairs it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[int] = []
        self.pairs: list[list[tuple[int, int]]] = []

    def attribute(self, subject: Any, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        self.images.append(len(image))
        self.pairs.append(list(zip(rows.tolist(), concepts.tolist(), strict=True)))
        return super().attribute(subject, image, rows, concepts)


def toy_model(bottleneck: Any = None, backbone: Any = None, **options: Any) -> CBMModule:
    """A model with drawn weights, the same for a function that makes the backbone; a bare one takes toy images."""
    torch.manual_seed(3)
    made = backbone if isinstance(backbone, nn.Module) else (backbone or ToyConv)()
    if not isinstance(made, Backbone):
        made = ModuleBackbone(made, (3, SIZE, SIZE))
    options = {"concepts": ConceptSet(NAMES), "num_classes": len(CLASSES), "class_names": CLASSES, **options}
    return CBMModule(made, bottleneck, **options)


def looker(order: tuple[int, ...] = (0, 1, 2)) -> CBMModule:
    """A model whose concept ``k`` sees the colour ``order[k]``, and sees it where it is."""
    model = toy_model(LinearBottleneck("logits"), nn.AvgPool2d(2))
    with torch.no_grad():
        model.bottleneck.scores.weight.copy_(50 * torch.eye(3)[list(order)])
        model.bottleneck.scores.bias.fill_(-4.5)
    return model.eval()
