"""The picture of what concepts make up a class, and of which concepts go together within one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# inches a row or column; names are left out where they would not be legible
CELL, SMALLEST_CELL, LONGEST_SIDE = 0.2, 0.03, 11.0
LETTER, EDGE, TITLE, LEGIBLE = 0.07, 0.9, 0.8, 0.1
COLOURS = "viridis"
UNKNOWN = "#d5d9e0"


def draw_conditionals(
    marginal: Tensor, pairs: Tensor, class_names: Sequence[str], concept_names: Sequence[str], label: int
) -> Figure:
    """Two heat maps of probabilities on one scale.

    Args:
        marginal: ``[L, K]`` ``p(c_k | y)``.
        pairs: ``[K, K]`` ``p(c_k | y, c_j)`` of one class, ``c_j`` in rows; NaN, which is grey, where ``c_j`` never
            holds.
        class_names: ``L`` names.
        concept_names: ``K`` names.
        label: The class of ``pairs``.

    Returns:
        A figure that pyplot does not know of.
    """
    from matplotlib.figure import Figure

    classes, concepts = marginal.shape
    cell = max(min(CELL, LONGEST_SIDE / max(classes, concepts)), SMALLEST_CELL)
    named = cell >= LEGIBLE
    margin = EDGE + (LETTER * max(map(len, [*class_names, *concept_names])) if named else 0.0)
    height = margin + TITLE + cell * max(classes, concepts)
    figure = Figure(
        figsize=(2 * margin + 2 * cell * concepts + 1.0, height), dpi=110, facecolor="white", layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    _heat_map(left, marginal, class_names if named else None, concept_names if named else None)
    left.set_title("p(concept | class)", size=10)
    image = _heat_map(right, pairs, concept_names if named else None, concept_names if named else None)
    right.set_title(f"p(concept | row's concept, {class_names[label]})", size=10)
    figure.colorbar(image, ax=[left, right], shrink=0.6)
    return figure


def _heat_map(axes: Axes, values: Tensor, rows: Sequence[str] | None, columns: Sequence[str] | None) -> AxesImage:
    image = axes.imshow(values.float().cpu().numpy(), vmin=0.0, vmax=1.0, cmap=COLOURS, interpolation="nearest")
    axes.set_facecolor(UNKNOWN)
    axes.set_xticks([] if columns is None else range(len(columns)))
    axes.set_yticks([] if rows is None else range(len(rows)))
    if columns is not None:
        axes.set_xticklabels(columns, rotation=90, size=7)
    if rows is not None:
        axes.set_yticklabels(rows, size=7)
    axes.tick_params(length=0)
    return image
