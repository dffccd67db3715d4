"""The picture of concept exemplars: a row a concept, the images that activate it most, lit where it was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cbm_lightning.callbacks.prediction_figure import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches
TILE, GAP, LINE, NAME, MARGIN = 0.95, 0.05, 0.2, 1.5, 0.15
DPI = 110
INK, FAINT = "#222222", "#777777"
# how bright an image stays where its concept was not found
DARK = 0.3


class Exemplars(NamedTuple):
    """The images that activate a concept most.

    Attributes:
        name: Of the concept; a line break makes two lines.
        images: ``[n, 3, H, W]`` uint8, the strongest first.
        values: ``[n]``, how strong, as written under the images.
        maps: ``[n, h, w]`` where the concept was found, or None.
    """

    name: str
    images: Tensor
    values: Tensor
    maps: Tensor | None = None


def draw_exemplars(rows: Sequence[Exemplars], columns: int = 2) -> Figure:
    """Draw a row of images a concept.

    Where there are maps an image keeps its brightness where the concept was found most, and is dark elsewhere; each
    map is scaled by its own largest value, and negative values count as nothing.

    Args:
        rows: The concepts, all of whose images have one size; a concept may have none.
        columns: Concepts beside each other; they are listed downwards first.

    Returns:
        A figure that pyplot does not know of.

    Example:
        >>> some = Exemplars("red", torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0.9, 0.8]))
        >>> len(draw_exemplars([some]).axes)
        2
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(rows))
    lines = math.ceil(len(rows) / columns)
    shape = next((row.images.shape for row in rows if len(row.images)), (0, 3, 1, 1))
    tall = TILE * shape[2] / shape[3]
    across = NAME + max(len(row.images) for row in rows) * (TILE + GAP) + MARGIN
    width, height = MARGIN + columns * across, 2 * MARGIN + lines * (tall + LINE)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    for i, row in enumerate(rows):
        left, top = MARGIN + i // lines * across, MARGIN + i % lines * (tall + LINE)
        name = "\n".join(shorten(part) for part in row.name.split("\n"))
        label = figure.text(left / width, 1 - (top + tall / 2) / height, name, size=8, color=INK, va="center")
        label.set_parse_math(False)
        for place, image in enumerate(row.images):
            start = left + NAME + place * (TILE + GAP)
            axes = figure.add_axes((start / width, 1 - (top + tall) / height, TILE / width, tall / height))
            _draw(axes, image if row.maps is None else lit(image, row.maps[place]), f"{row.values[place]:.2f}")
    return figure


def lit(image: Tensor, found: Tensor) -> Tensor:
    """An image ``[3, H, W]`` (uint8), dark where its map ``[h, w]`` is low."""
    # the map of a model that diverged shows nothing
    heat = found.float().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)[None, None]
    heat = interpolate(heat, size=image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
    heat = heat / heat.amax().clamp(min=1e-12)
    return (image * (DARK + (1 - DARK) * heat)).round().to(torch.uint8)


def _draw(axes: Axes, image: Tensor, value: str) -> None:
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlabel(value, size=6.5, color=FAINT, labelpad=1)
