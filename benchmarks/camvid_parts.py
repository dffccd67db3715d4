"""Not a benchmark: the street scenes of `camvid.py`, maps to compare with, and how maps are drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from cbm_lightning.callbacks.saliency_figure import COLOURS, OUTLINE
from cbm_lightning.saliency import SaliencyMethod
from cbm_lightning.saliency.subject import Subject

FRAME_PIXELS = (240, 320)
# pixels a cell of the feature maps
STRIDE = 16
# square pieces of a frame of 180x240 pixels: how many, their sides, and the size to which they are enlarged
TILES, SIDES, TILE_PIXELS = 6, (60, 120), 128


class Scenes(NamedTuple):
    """Images in the order of time, the tiles of a frame after one another.

    Attributes:
        image: ``[N, 3, H, W]`` uint8.
        objects: ``[N, H, W]`` uint8, which object a pixel shows; ``K`` and more for none of them.
        concepts: ``[N, K]`` 1 for present, 0 for absent, NaN for what is too small to count.
        val: ``[N]`` bool.
        drive: ``[N]`` int64, which of the drives.
    """

    image: Tensor
    objects: Tensor
    concepts: Tensor
    val: Tensor
    drive: Tensor

    def of(self, rows: Tensor) -> Scenes:
        """Some of the images."""
        return Scenes(*(field[rows] for field in self))

    def masks(self) -> Tensor:
        """``[N, K, H, W]`` bool."""
        return self.objects[:, None] == torch.arange(self.concepts.shape[1])[:, None, None]

    def mean_masks(self) -> Tensor:
        """``[K, H, W]``, one object at a time: all masks together would fill the memory."""
        return torch.stack([(self.objects == k).float().mean(0) for k in range(self.concepts.shape[1])])


def read_scenes(folder: Path, least: float, held_out: str) -> tuple[Scenes, Scenes, list[str]]:
    """Whole frames, tiles of them at random places, and the names of the objects.

    Args:
        folder: With the arrays and their description.
        least: Share of the pixels of an image from which an object counts as present.
        held_out: The drive to validate on, of which nothing is trained on; ``"file"`` for the split of the file.
    """
    names: list[str] = json.loads((folder / "meta.json").read_text())["classes"]
    names.remove("unlabelled")
    with np.load(folder / "camvid240.npz", allow_pickle=False) as file:
        held = dict(file)
    drives, drive = np.unique([name.split("_")[0] for name in held["name"]], return_inverse=True)
    if held_out == "file":
        rows, val = np.arange(len(drive)), held["split"] == 1
    else:
        # the validation frames of the file are a few seconds, frame by frame
        rows = (held["split"] == 0).nonzero()[0]
        val = (drives[drive] == held_out)[rows]
    files = [held["jpeg"][held["offset"][row] : held["offset"][row + 1]].tobytes() for row in rows]
    pixels = np.stack([np.asarray(Image.open(BytesIO(jpeg)).convert("RGB")) for jpeg in files])
    image, objects = torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.from_numpy(held["mask"][rows])
    frame_drive, frame_val = torch.from_numpy(drive[rows]), torch.from_numpy(val)

    whole = _resized(image, objects, FRAME_PIXELS)
    boxes = [(n, *_random_box(objects.shape[1:], generator)) for n in range(len(image)) for generator in _draws(n)]
    pieces = [
        _resized(image[n : n + 1, :, rows, columns], objects[n : n + 1, rows, columns], (TILE_PIXELS, TILE_PIXELS))
        for n, rows, columns in boxes
    ]
    tiles = tuple(torch.cat(part) for part in zip(*pieces, strict=True))
    frame = torch.tensor([n for n, *_ in boxes])
    return (
        Scenes(*whole, _present(objects, len(names), least), frame_val, frame_drive),
        Scenes(tiles[0], tiles[1], _present(tiles[1], len(names), least), frame_val[frame], frame_drive[frame]),
        names,
    )


def _draws(frame: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(frame * TILES + piece) for piece in range(TILES)]


def _random_box(size: Sequence[int], generator: torch.Generator) -> tuple[slice, slice]:
    """Rows and columns of a square of random side and place."""
    side = int(torch.randint(SIDES[0], SIDES[1] + 1, (), generator=generator))
    starts = [int(torch.randint(length - side + 1, (), generator=generator)) for length in size]
    return slice(starts[0], starts[0] + side), slice(starts[1], starts[1] + side)


def _resized(image: Tensor, objects: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    enlarged = interpolate(image.float(), size, mode="bilinear", antialias=True).round().to(torch.uint8)
    return enlarged, interpolate(objects[:, None], size, mode="nearest-exact")[:, 0]


def _present(objects: Tensor, number: int, least: float) -> Tensor:
    area = torch.stack([(objects == k).float().mean((1, 2)) for k in range(number)], 1)
    return torch.where(area >= least, 1.0, torch.nan).masked_fill(area == 0, 0.0)


# ---------------------------------------------------------------- maps to compare with


class Remembered(SaliencyMethod):
    """Maps of another method, made once for the same pairs.

    Args:
        method: The other method, of one model.
    """

    def __init__(self, method: SaliencyMethod) -> None:
        self.method = method
        self.made: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """New ones only where there are none."""
        wanted = (image, rows, concepts)
        for known, maps in self.made:
            if all(torch.equal(a, b) for a, b in zip(known, wanted, strict=True)):
                return maps
        self.made.append((wanted, self.method.attribute(subject, *wanted)))
        return self.made[-1][1]


class OnGrid(SaliencyMethod):
    """Maps of another method, averaged over the cells of the feature map.

    Args:
        method: The other method.
    """

    def __init__(self, method: SaliencyMethod) -> None:
        self.method = method

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """As coarse as Grad-CAM."""
        grid = [math.ceil(side / STRIDE) for side in image.shape[-2:]]
        return adaptive_avg_pool2d(self.method.attribute(subject, image, rows, concepts)[:, None], grid)[:, 0]


class OfAnotherImage(SaliencyMethod):
    """The map of the next image of the batch that shows the concept; NaN where there is none.

    Args:
        method: Makes the maps.
    """

    def __init__(self, method: SaliencyMethod) -> None:
        self.method = method

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """The maps of a concept, handed on by one image."""
        maps = self.method.attribute(subject, image, rows, concepts)
        for k in concepts.unique():
            pairs = (concepts == k).nonzero()[:, 0]
            maps[pairs] = maps[pairs.roll(1)] if len(pairs) > 1 else torch.nan
        return maps


class TrainingMask(SaliencyMethod):
    """The same map for every image: where the concept is on average.

    Args:
        masks: ``[K, H, W]``.
    """

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Whatever the image."""
        return self.masks[concepts]


# ---------------------------------------------------------------- drawing


class Example(NamedTuple):
    """An image and an object that it shows.

    Attributes:
        image: ``[3, H, W]`` uint8.
        mask: ``[H, W]`` bool.
        title: Over the photograph.
        maps: ``[H, W]`` each.
    """

    image: Tensor
    mask: Tensor
    title: str
    maps: list[Tensor]


def draw_maps(examples: list[Example], headings: list[str], note: str, blocks: int = 2) -> Figure:
    """A line of panels an example, in blocks side by side: the photograph, then its maps.

    Args:
        examples: What to draw.
        headings: Of the maps.
        note: What is said in the place after the last example.
        blocks: How many examples share a line.
    """
    lines, wide = -(-(len(examples) + 1) // blocks), 1 + len(headings)
    panel, gap, margin, title, head = 1.6, 0.06, 0.15, 0.22, 0.1
    tall = panel * examples[0].image.shape[1] / examples[0].image.shape[2]
    block = wide * (panel + gap) + margin
    width, height = blocks * block + margin, head + lines * (tall + title) + margin
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def corner(place: int, column: int) -> tuple[float, float]:
        line = place % lines
        return margin + place // lines * block + column * (panel + gap), height - head - (line + 1) * (tall + title)

    for place, example in enumerate(examples):
        for column, heat in enumerate([None, *example.maps]):
            x, y = corner(place, column)
            axes = figure.add_axes((x / width, y / height, panel / width, tall / height))
            _draw_panel(axes, example, heat)
            if heat is None:
                axes.set_title(example.title, size=9, pad=3, loc="left")
            elif place % lines == 0:
                axes.set_title(headings[column - 1], size=9, pad=3, color="#555555")
    x, y = corner(len(examples), 0)
    figure.text(x / width, (y + tall) / height, note, size=9, color="#555555", va="top", linespacing=1.4)
    return figure


def _draw_panel(axes: Axes, example: Example, heat: Tensor | None) -> None:
    axes.set_axis_off()
    pixels = example.image.permute(1, 2, 0).numpy()
    if heat is None:
        axes.imshow(pixels)
    else:
        axes.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
        # a single pixel would leave the rest of the map in the dark
        top = heat.clamp(min=0).quantile(0.995).clamp(min=1e-12)
        shown = (heat / top).clamp(0, 1)
        # the photograph stays visible where nothing is found
        axes.imshow(shown.numpy(), cmap=COLOURS, vmin=0, vmax=1, alpha=(0.2 + 0.7 * shown).numpy())
    axes.contour(example.mask.float().numpy(), levels=[0.5], colors=OUTLINE, linewidths=0.7)
