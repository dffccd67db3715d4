"""The picture of `locality.py`: birds, and where the concepts of their beak and tail look under two models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cbm_lightning.callbacks.prediction_figure import FAINT, INK
from cbm_lightning.callbacks.saliency_figure import COLOURS

# inches
TILE, GAP, BETWEEN, MARGIN, HEADER, CAPTION, FOOTER = 1.62, 0.1, 0.34, 0.14, 0.6, 0.42, 0.3
OWN, PARTNER = "#4dd2ff", "#ffffff"
HEADS = {
    "tied": ("tied", "beak and tail always change together"),
    "separable": ("separable", "beak and tail are independent"),
}


class Look(NamedTuple):
    """Where a concept looks.

    Attributes:
        name: Of the concept.
        map: ``[H, W]`` signed saliency.
        own: ``[H, W]`` bool, its mask.
        partner: ``[H, W]`` bool, the mask of the concept that always comes with it in the tied birds.
        energy: Share of the positive saliency in its mask.
        elsewhere: The same for the partner's mask.
        other: The part that the partner is of.
    """

    name: str
    map: Tensor
    own: Tensor
    partner: Tensor
    energy: float
    elsewhere: float
    other: str


class Bird(NamedTuple):
    """A test image.

    Attributes:
        name: What it shows.
        image: ``[3, H, W]`` in [0, 1].
        areas: Part to its share of the image.
        looks: Model to where the two concepts look under it.
    """

    name: str
    image: Tensor
    areas: dict[str, float]
    looks: dict[str, list[Look]]


def draw(birds: Sequence[Bird]) -> Figure:
    """A row a bird, two maps a model; pyplot does not know of the figure."""
    lefts = [MARGIN]
    for space in (BETWEEN, GAP, BETWEEN, GAP):
        lefts.append(lefts[-1] + TILE + space)
    width, line = lefts[-1] + TILE + MARGIN, TILE + CAPTION
    height = HEADER + len(birds) * line + FOOTER
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")

    def say(text: str, left: float, top: float, **style: object) -> None:
        figure.text(left / width, 1 - top / height, text, va="center", **style)

    for column, (title, meaning) in zip((1, 3), HEADS.values(), strict=True):
        middle = lefts[column] + TILE + GAP / 2
        say(title, middle, 0.19, size=10.5, weight="bold", color=INK, ha="center")
        say(meaning, middle, 0.41, size=8.5, color=FAINT, ha="center")
    for row, bird in enumerate(birds):
        top = HEADER + row * line
        looks = [look for model in HEADS for look in bird.looks[model]]
        for column, left in enumerate(lefts):
            axes = figure.add_axes((left / width, 1 - (top + TILE) / height, TILE / width, TILE / height))
            if column == 0:
                _picture(axes, bird.image)
                say(bird.name, left + TILE / 2, top + TILE + 0.12, size=8, color=INK, ha="center")
                areas = ", ".join(f"{part} {area:.1%}" for part, area in bird.areas.items())
                say(f"area: {areas}", left + TILE / 2, top + TILE + 0.27, size=7.5, color=FAINT, ha="center")
                continue
            look = looks[column - 1]
            _map(axes, bird.image, look)
            say(look.name, left + TILE / 2, top + TILE + 0.12, size=8, color=INK, weight="bold", ha="center")
            shares = f"{look.energy:.0%} on it, {look.elsewhere:.0%} on the {look.other}"
            say(shares, left + TILE / 2, top + TILE + 0.27, size=7.5, color=INK, ha="center")
    note = "bright: evidence for the concept, its share below   blue line: its own mask   white line: its partner's"
    say(note, MARGIN, height - FOOTER / 2, size=7.5, color=FAINT)
    return figure


def _picture(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="bilinear")
    axes.axis("off")


def _map(axes: Axes, image: Tensor, look: Look) -> None:
    axes.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
    heat = look.map.clamp(min=0)
    heat = heat / heat.max().clamp(min=1e-12)
    # the bird stays visible where nothing is found
    axes.imshow(heat.numpy(), cmap=COLOURS, vmin=0, vmax=1, alpha=(0.3 + 0.6 * heat).numpy(), interpolation="bilinear")
    for mask, colour, width in ((look.partner, PARTNER, 0.8), (look.own, OWN, 1.4)):
        axes.contour(mask.float().numpy(), levels=[0.5], colors=colour, linewidths=width)
    axes.axis("off")
