"""The picture of concept saliency: images, and where their concepts look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cbm_lightning.callbacks.prediction_figure import RIGHT, UNKNOWN, WRONG, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# inches
TILE, GAP, TITLE, MARGIN, NOTE = 1.5, 0.1, 0.4, 0.15, 0.28
DPI = 110
COLOURS = "inferno"
OUTLINE = "#4dd2ff"


class Panel(NamedTuple):
    """A tile of the picture.

    Attributes:
        name: Of the concept or class.
        note: What is said of it in a few words.
        right: Whether that is true, None where not known.
        map: ``[H, W]`` signed saliency, or None for the image alone.
        mask: ``[H, W]`` bool, where the concept is, or None.
        point: ``(x, y)`` in pixels, NaN where it is not to be seen, or None.
    """

    name: str
    note: str
    right: bool | None
    map: Tensor | None
    mask: Tensor | None = None
    point: Tensor | None = None


def draw_saliency(rows: Sequence[tuple[Tensor, Sequence[Panel]]]) -> Figure:
    """Draw a row an image, with its panels side by side.

    Positive saliency is laid over the grey image, bright where it is largest in that panel. A green title belongs to a
    right prediction, a red one to a wrong one, a grey one where the truth is not known.

    Args:
        rows: An image ``[3, H, W]`` (uint8) with its panels.

    Returns:
        A figure that pyplot does not know of.
    """
    from matplotlib.figure import Figure

    columns = max(len(line) for _, line in rows)
    width = MARGIN * 2 + columns * TILE + (columns - 1) * GAP
    heights = [TILE * image.shape[1] / image.shape[2] for image, _ in rows]
    height = MARGIN + sum(heights) + len(rows) * TITLE + NOTE
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    top = MARGIN
    for (image, line), tall in zip(rows, heights, strict=True):
        for column, panel in enumerate(line):
            left = MARGIN + column * (TILE + GAP)
            box = (left / width, 1 - (top + TITLE + tall) / height, TILE / width, tall / height)
            _draw(figure.add_axes(box), image, panel)
        top += TITLE + tall
    note = "bright: evidence for the concept; line: its mask; green: predicted right, red: wrong"
    figure.text(MARGIN / width, 0.35 * NOTE / height, note, size=7, color=UNKNOWN, va="bottom")
    return figure


def _draw(axes: Axes, image: Tensor, panel: Panel) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    pixels = image.permute(1, 2, 0).numpy()
    if panel.map is None:
        axes.imshow(pixels)
    else:
        grey = pixels.mean(-1)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=255)
        # the map of a model that diverged shows nothing
        heat = panel.map.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        heat = heat / heat.max().clamp(min=1e-12)
        # the image shows through where little is found
        axes.imshow(heat.numpy(), cmap=COLOURS, vmin=0, vmax=1, alpha=(0.9 * heat.sqrt()).numpy())
    if panel.mask is not None and bool(panel.mask.any()) and not bool(panel.mask.all()):
        axes.contour(panel.mask.float().numpy(), levels=[0.5], colors=OUTLINE, linewidths=0.9)
    if panel.point is not None and not bool(panel.point.isnan().any()):
        axes.plot(*panel.point.tolist(), marker="+", color=OUTLINE, ms=7)
    colour = UNKNOWN if panel.right is None else RIGHT if panel.right else WRONG
    title = f"{shorten(panel.name)}\n{panel.note}"
    axes.set_title(title, size=7, color=colour, pad=3, linespacing=1.2, parse_math=False)
