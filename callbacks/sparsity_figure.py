"""The picture of accuracy over the number of effective concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbm_lightning.sparsity.study import NECResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by people with any kind of colour vision; grey is kept for random concepts
COLOURS = {"path": "#0072B2", "pruned": "#D55E00", "random": "#808080"}
LABELS = {"path": "elastic-net path", "pruned": "own head, pruned", "random": "path on random concepts"}
REFIT = "_refit"


def draw_nec_curves(result: NECResult, title: str | None = None) -> Figure:
    """Accuracy against the number of effective concepts, a line a kind of head; refitted weights are dashed.

    Beside it the number of classes that rest on 0, 1, 2, ... concepts of the model's own head, where it has one.

    Args:
        result: The curves.
        title: Above the curves.

    Returns:
        A figure that pyplot does not know of.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = 1 if result.own is None else 2
    figure = Figure(figsize=(5.6 + 3.0 * (columns - 1), 4.2), dpi=150, facecolor="white", layout="constrained")
    both = figure.subplots(1, columns, squeeze=False, width_ratios=[2, 1][:columns])[0]
    axes = both[0]
    for name, curve in result.curves.items():
        kind = name.removesuffix(REFIT)
        refit = name.endswith(REFIT)
        axes.plot(
            curve.nec,
            curve.accuracy,
            "--" if refit else "-",
            color=COLOURS.get(kind, "#000000"),
            marker="^" if refit else "o",
            ms=4,
            lw=1.6,
            label=LABELS.get(kind, kind) + (", refitted" if refit else ""),
        )
    axes.set_xlabel("effective concepts a class (NEC)")
    axes.set_ylabel("label accuracy")
    axes.set_xlim(left=0)
    axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    axes.grid(axis="y", lw=0.4, alpha=0.6)
    axes.legend(frameon=False, fontsize=8)
    if title:
        axes.set_title(title, size=10)
    if result.own is not None:
        bars = result.own.histogram()
        both[1].bar(range(len(bars)), bars.tolist(), color=COLOURS["pruned"], width=0.8)
        both[1].set_xlabel("concepts a class")
        both[1].set_ylabel("classes")
        both[1].set_title(f"own head: NEC {result.own.nec:.3g}", size=10)
        for axis in (both[1].xaxis, both[1].yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    for one in both:
        one.spines[["top", "right"]].set_visible(False)
    return figure
