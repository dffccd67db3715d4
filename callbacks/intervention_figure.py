"""The picture of intervention curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cbm_lightning.interventions.study import StudyResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito: told apart by people with any kind of colour vision; grey is kept for the random baseline
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
RANDOM = "#808080"
SMALLEST_SPAN = 0.02
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def draw_curves(result: StudyResult, unit: str, title: str | None = None) -> Figure:
    """Score against budget, a line a policy; a band spans all trials of policies that draw.

    Args:
        result: The curves.
        unit: What one step of the budget asks about, ``"concept"`` or ``"group"``.
        title: Above the axes.

    Returns:
        A figure that pyplot does not know of.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 4.4), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    informed, used = 0, list[str]()
    for policy in result.curves:
        trials = result.scores(policy).cpu()
        if len(trials) > 1 and RANDOM not in used:
            colour, style, marker = RANDOM, "--", ""
        else:
            # a ninth policy has the first one's colour, in another style
            style = "--" if len(trials) > 1 else "-" if informed < len(COLOURS) else "-."
            colour, marker = COLOURS[informed % len(COLOURS)], MARKERS[informed % len(MARKERS)]
            informed += 1
        used.append(colour)
        if len(trials) > 1:
            axes.fill_between(result.budgets, trials.amin(0), trials.amax(0), color=colour, alpha=0.25, lw=0)
        label = f"{policy} ({len(trials)} seeds)" if len(trials) > 1 else policy
        every = max(len(result.budgets) // 8, 1)
        axes.plot(
            result.budgets,
            trials.mean(0),
            style,
            color=colour,
            marker=marker,
            markevery=every,
            ms=4,
            lw=1.6,
            label=label,
        )
    start = float(result.scores(next(iter(result.curves)))[:, 0].mean())
    axes.axhline(start, color=RANDOM, lw=0.8, ls=":")
    axes.annotate(
        "no correction", (1, start), xycoords=("axes fraction", "data"), ha="right", va="top", size=8, color=RANDOM
    )
    axes.set_xlabel(f"{unit}s corrected a sample")
    axes.set_ylabel(result.score_name.replace("label_acc", "label accuracy").replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, max(result.budgets[-1], 1))
    low, high = axes.get_ylim()
    if high - low < SMALLEST_SPAN:
        # a narrower window would make mountains of single samples
        low, high = (low + high - SMALLEST_SPAN) / 2, (low + high + SMALLEST_SPAN) / 2
    best = max(float(result.scores(policy).max()) for policy in result.curves)
    # no room above a perfect share, beyond that of a marker
    excess = max(high - 1.0 - 0.05 * (high - low), 0.0) if best <= 1.0 else 0.0
    axes.set_ylim(low - excess, high - excess)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", lw=0.4, alpha=0.6)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=min(len(result.curves), 5))
    if title:
        axes.set_title(title, size=10)
    return figure
