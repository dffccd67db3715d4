"""Explained predictions as a picture: inputs, classes, and the concepts that decided them as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RIGHT, WRONG, UNKNOWN, REST = "#2e8b57", "#c8384a", "#7d8ca3", "#d5d9e0"
INK, FAINT = "#22262e", "#868d99"

# inches
PICTURE, LETTER, VALUES, BARS, NUMBER = 1.3, 0.066, 0.4, 0.95, 0.4
GAP, TITLE, LINE, MARGIN, NOTE = 0.16, 0.24, 0.212, 0.28, 0.2
LONGEST_NAME = 28
OTHERS = "all the rest"
DPI = 110

Bar = dict[str, Any]
"""``concept``, ``contribution``, and for named concepts ``concept_probability`` and ``concept_right``."""


class BarLayout(NamedTuple):
    """Where names, values and bars lie, in inches from the left edge.

    Attributes:
        values: Right edge of the predicted values, behind the names.
        zero: The zero line of the bars.
        scale: Length of a contribution of 1.
        width: Of all, with the numbers at the ends of the bars.
    """

    values: float
    zero: float
    scale: float
    width: float

    @classmethod
    def of(cls, bars: Sequence[Bar]) -> BarLayout:
        """The layout that takes all bars; room is left for negative ones only where there are some."""
        contributions = [bar["contribution"] for bar in bars]
        low, high = min(0.0, *contributions), max(0.0, *contributions)
        scale = BARS / max(high - low, 1e-12)
        values = LETTER * max(len(shorten(bar["concept"])) for bar in bars) + VALUES
        zero = values + GAP / 2 - low * scale + (NUMBER if low < 0 else 0.0)
        return cls(values, zero, scale, zero + high * scale + (NUMBER if high > 0 else 0.0))


def draw_predictions(table: pd.DataFrame, images: Sequence[Tensor] | None = None, columns: int = 3) -> Figure:
    """Draw a cell a sample: its picture, the predicted class, and a bar a concept, all bars on one scale.

    A green bar belongs to a concept that was predicted right, a red one to a wrong one, a grey one to a concept without
    annotation. The last bar of a cell is all the rest (other concepts, bias), so that bars add up to the logit.

    Args:
        table: What `PredictionTable` logs.
        images: A picture ``[3, H, W]`` (uint8 or floats in [0, 1]) a sample, or None to draw the bars alone.
        columns: Cells beside each other.

    Returns:
        A figure that pyplot does not know of.
    """
    from matplotlib.figure import Figure

    titles = [lines.iloc[0] for _, lines in table.groupby("sample")]
    bars = [bars_of(lines) for _, lines in table.groupby("sample")]
    layout = BarLayout.of([bar for cell in bars for bar in cell])
    picture = 0.0 if images is None else PICTURE + GAP
    width = picture + layout.width + MARGIN
    height = TITLE + max(max(map(len, bars)) * LINE, 0.0 if images is None else PICTURE) + MARGIN
    columns = min(columns, len(bars))

    size = (MARGIN + columns * width, MARGIN + math.ceil(len(bars) / columns) * height + NOTE)
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for i, (title, cell) in enumerate(zip(titles, bars, strict=True)):
        left, top = MARGIN + i % columns * width, MARGIN + i // columns * height
        draw_title(axes, title, left, top)
        if images is not None:
            draw_picture(axes, images[i], left, top + TITLE)
        draw_bars(axes, cell, left + picture, top + TITLE, layout)
    _draw_note(axes, MARGIN, size[1] - NOTE)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    return figure


def bars_of(lines: pd.DataFrame) -> list[Bar]:
    """The named concepts of a sample, and the sum of the rows in angle brackets."""
    is_rest = lines["concept"].str.startswith("<")
    bars: list[Bar] = [{str(name): value for name, value in row.items()} for row in lines[~is_rest].to_dict("records")]
    if is_rest.any():
        bars.append({"concept": OTHERS, "contribution": float(lines.loc[is_rest, "contribution"].sum())})
    return bars


def draw_picture(axes: Axes, image: Tensor, left: float, top: float, size: float = PICTURE) -> None:
    """Draw ``[3, H, W]`` with its longer side ``size`` inches long."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    height, width = (side * size / max(pixels.shape[:2]) for side in pixels.shape[:2])
    # small pictures keep their pixels, large ones are averaged
    interpolation = "nearest" if max(pixels.shape[:2]) < size * DPI else "antialiased"
    axes.imshow(pixels, extent=(left, left + width, top + height, top), interpolation=interpolation)


def draw_title(axes: Axes, line: pd.Series[Any], left: float, top: float) -> None:
    """Predicted class and probability, marked as right or wrong where the true class is known."""
    truth = line.get("true")
    known = truth is not None and truth == truth
    right = known and truth == line["predicted"]
    colour = INK if not known else RIGHT if right else WRONG
    mark = "" if not known else "✓ " if right else "✗ "
    title = f"{mark}{shorten(str(line['predicted']))}  {line['probability']:.0%}"
    text = axes.annotate(title, (left, top + 0.08), color=colour, weight="bold", size=10, va="center")
    if known and not right:
        axes.annotate(f"   is {shorten(str(truth))}", (1, 0.5), xycoords=text, color=INK, size=10, va="center")


def draw_bars(axes: Axes, bars: list[Bar], left: float, top: float, layout: BarLayout) -> None:
    """Names with the predicted value, then a bar from a zero line that is the same for all bars."""
    values, zero = left + layout.values, left + layout.zero
    for row, bar in enumerate(bars):
        y = top + (row + 0.5) * LINE
        length = layout.scale * bar["contribution"]
        number = f"{bar['contribution']:+.2f}".replace("-", "−")
        beyond, side = zero + length + math.copysign(0.04, length), "left" if length >= 0 else "right"
        axes.text(beyond, y, number, size=6.5, color=FAINT, va="center", ha=side)
        if bar["concept"] == OTHERS:
            colour = REST
            axes.text(left, y, OTHERS, size=8, color=FAINT, va="center", style="italic")
        else:
            colour = _colour(bar["concept_right"])
            axes.text(left, y, shorten(bar["concept"]), size=8, color=INK, va="center")
            axes.text(values, y, f"{bar['concept_probability']:.2f}", size=8, color=colour, va="center", ha="right")
        axes.barh(y, length, LINE * 0.68, left=zero, color=colour)
    axes.plot([zero, zero], [top, top + len(bars) * LINE], color=FAINT, lw=0.6)


def shorten(name: str) -> str:
    """A name that fits in its place."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1].rstrip()}…"


def _draw_note(axes: Axes, left: float, y: float) -> None:
    keys = [(RIGHT, "concept right"), (WRONG, "concept wrong"), (UNKNOWN, "not annotated"), (REST, OTHERS)]
    for i, (colour, meaning) in enumerate(keys):
        x = left + i * 1.12
        axes.barh(y, 0.12, 0.12, left=x, color=colour)
        axes.text(x + 0.17, y, meaning, size=7.5, color=FAINT, va="center")
    meaning = "   numbers: predicted value of the concept, and what it adds to the logit of the predicted class"
    axes.text(left + len(keys) * 1.12, y, meaning, size=7.5, color=FAINT, va="center")


def _colour(right: float) -> str:
    return UNKNOWN if right != right else RIGHT if right else WRONG
