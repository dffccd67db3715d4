"""Draw the README's picture from a checkpoint of the quickstart recipe: explained birds, and corrections by a person.

One bird that the model got right and the mistakes that one corrected concept mends best, found among the test images.

    cbm fit --config quickstart
    python benchmarks/readme_figure.py runs/quickstart/version_0/checkpoints/best.ckpt readme.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from cbm_lightning import CBMModule, Prediction
from cbm_lightning.callbacks.prediction_figure import (
    FAINT,
    INK,
    LINE,
    RIGHT,
    WRONG,
    Bar,
    BarLayout,
    bars_of,
    draw_bars,
    draw_picture,
    draw_title,
)
from cbm_lightning.callbacks.prediction_table import annotate, displayable
from cbm_lightning.data.rendered_birds import RenderedBirds
from cbm_lightning.types import Batch

SHOWN_CONCEPTS = 5
# inches
PICTURE, ROW, HEADER, MARGIN, GAP, PERSON, TRACK = 1.62, 1.98, 0.5, 0.25, 0.22, 2.05, 1.35


class Correction(NamedTuple):
    """A concept that a person corrects, and the class probabilities ``[L]`` that follow."""

    concept: str
    value: bool
    probabilities: Tensor


class Bird(NamedTuple):
    """What is drawn of one image."""

    title: pd.Series
    image: Tensor
    bars: list[Bar]
    probabilities: Tensor
    label: int
    correction: Correction | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint of the quickstart recipe")
    parser.add_argument("output", type=Path, help="PNG file to write")
    parser.add_argument("--corrected", type=int, default=2, help="birds to show with one corrected concept")
    arguments = parser.parse_args()

    model = CBMModule.load_from_checkpoint(str(arguments.checkpoint)).eval()
    batch = test_batch(model)
    figure = draw(find_birds(model, batch, arguments.corrected), list(model.class_names or []))
    draft = arguments.output.with_name(f".{arguments.output.name}.draft")
    figure.savefig(draft, format="png", dpi=200)
    draft.replace(arguments.output)


def test_batch(model: CBMModule) -> Batch:
    """All test images of the recipe, as the model reads them."""
    data = RenderedBirds(num_train=1, num_val=1).follow(model)
    data.setup("test")
    rows = data.splits["test"]
    return rows.__getitems__(list(range(len(rows))))


@torch.no_grad()
def find_birds(model: CBMModule, batch: Batch, number: int) -> list[Bird]:
    """The first bird that is surely right in every respect, then those whose class one correction helps most.

    Mistakes that a correction mends come first, then the largest gains in the probability of the true class.
    """
    prediction = model(batch)
    label, concepts = batch["label"], batch["concepts"]
    wrong = (prediction.concepts.probs >= 0.5) != (concepts >= 0.5)
    is_right = prediction.logits.argmax(1) == label
    corrected = {k: correct(model, prediction, concepts, k) for k in wrong.any(0).nonzero().flatten().tolist()}
    before = model.probabilities(prediction.logits)
    found: dict[int, tuple[bool, float, int]] = {}
    for i, k in wrong.nonzero().tolist():
        after, truth = corrected[k][i], label[i]
        mends = bool(after.argmax() == truth) and not is_right[i]
        found[i] = max(found.get(i, (False, -1.0, k)), (mends, float(after[truth] - before[i, truth]), k))
    best = sorted(found, key=lambda i: found[i], reverse=True)[:number]
    mended = sum(mends for mends, _, _ in found.values())
    print(f"{len(label)} test images, {int((~is_right).sum())} mistakes, one correction mends {mended} of them")
    first = int(((before.amax(1) >= 0.9) & is_right & ~wrong.any(1)).nonzero()[0])
    fixes = {i: (found[i][2], corrected[found[i][2]][i]) for i in best}
    return [make_bird(model, batch, i, fixes.get(i)) for i in [first, *best]]


def correct(model: CBMModule, prediction: Prediction, concepts: Tensor, k: int) -> Tensor:
    """Class probabilities ``[B, L]`` with the true value of one concept."""
    name = model.concept_set.names[k]
    return model.probabilities(model.intervene(prediction, {name: concepts[:, k]}).logits)


def make_bird(model: CBMModule, batch: Batch, i: int, fix: tuple[int, Tensor] | None) -> Bird:
    one = {name: value[i : i + 1] for name, value in batch.items()}
    table = annotate(model.explain(one, len(model.concept_set)), one, model.concept_set, model.class_names)
    correction = None
    kept = list(table["concept"][:SHOWN_CONCEPTS])
    if fix is not None:
        name = model.concept_set.names[fix[0]]
        correction = Correction(name, bool(one["concepts"][0, fix[0]]), fix[1])
        kept = kept if name in kept else [*kept[:-1], name]
    # whatever is not shown joins the rows in angle brackets
    table["concept"] = [name if name in kept else f"<{name}>" for name in table["concept"]]
    with torch.no_grad():
        probabilities = model.probabilities(model(one).logits)[0]
    image = displayable(one["image"], model.backbone.image_stats())[0]
    return Bird(table.iloc[0], image, bars_of(table), probabilities, int(one["label"]), correction)


def draw(birds: list[Bird], classes: list[str]) -> Figure:
    """A row a bird: the image, what decided, the correction, and the class before and after it."""
    layout = BarLayout.of([bar for bird in birds for bar in bird.bars])
    lefts = [MARGIN, MARGIN + PICTURE + GAP]
    lefts += [lefts[1] + layout.width + GAP]
    lefts += [lefts[2] + PERSON + GAP]
    size = (lefts[3] + TRACK + 1.55, HEADER + len(birds) * ROW + MARGIN / 2)
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    heads = ["image", "concepts decide the class", "a person corrects one", "the class follows"]
    for left, head in zip(lefts, heads, strict=True):
        axes.text(left, HEADER / 2, head, size=9.5, color=FAINT, va="center", weight="bold")
    for row, bird in enumerate(birds):
        top = HEADER + row * ROW
        axes.plot([MARGIN, size[0] - MARGIN], [top - 0.08, top - 0.08], color="#e4e7ec", lw=0.8)
        draw_picture(axes, bird.image, lefts[0], top + 0.1, PICTURE)
        draw_title(axes, bird.title, lefts[1], top + 0.14)
        draw_bars(axes, bird.bars, lefts[1], top + 0.4, layout)
        draw_correction(axes, bird, lefts[2], top + 0.4 + 2.5 * LINE)
        draw_probabilities(axes, bird, classes, lefts[3], top + 0.4)
    axes.set(xlim=(0, size[0]), ylim=(size[1], 0), aspect="auto")
    return figure


def draw_correction(axes: Axes, bird: Bird, left: float, y: float) -> None:
    if bird.correction is None:
        axes.text(left, y, "nothing to correct", size=9, color=FAINT, va="center", style="italic")
        return
    said, true = ("no", "yes") if bird.correction.value else ("yes", "no")
    axes.text(left, y - 0.13, bird.correction.concept, size=10, color=INK, va="center", weight="bold")
    parts = [(said, WRONG, 0.0), ("→", INK, 0.36), (true, RIGHT, 0.62)]
    for text, colour, offset in parts:
        axes.text(left + offset, y + 0.12, text, size=10, color=colour, va="center", weight="bold")
    arrow = {"arrowstyle": "-|>", "color": FAINT, "lw": 1.2}
    axes.annotate("", (left + PERSON + 0.08, y), (left + PERSON - 0.32, y), arrowprops=arrow)


def draw_probabilities(axes: Axes, bird: Bird, classes: list[str], left: float, top: float) -> None:
    """The two classes that compete, before the correction (pale) and after it."""
    after = bird.probabilities if bird.correction is None else bird.correction.probabilities
    rival = next(k for k in bird.probabilities.argsort(descending=True).tolist() if k != bird.label)
    for i, k in enumerate((bird.label, rival)):
        y = top + 0.28 + i * 0.62
        colour = RIGHT if k == bird.label else WRONG
        axes.text(left, y - 0.2, classes[k], size=9, color=INK, va="center", weight="bold" if i == 0 else "normal")
        axes.barh(y, TRACK, 0.17, left=left, color="#f0f2f5")
        axes.barh(y, TRACK * float(after[k]), 0.17, left=left, color=colour)
        shown = f"{float(after[k]):.0%}"
        if bird.correction is not None:
            was = float(bird.probabilities[k])
            axes.plot([left + TRACK * was] * 2, [y - 0.12, y + 0.12], color=INK, lw=1.3)
            shown = f"{was:.0%} → {shown}"
        axes.text(left + TRACK + 0.1, y, shown, size=9, color=colour, va="center", weight="bold")


if __name__ == "__main__":
    main()
