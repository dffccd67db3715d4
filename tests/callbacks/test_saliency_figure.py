"""What the picture of concept saliency shows: which concepts and classes, what it says of them, and what is drawn."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor
from torch.testing import assert_close
from toy_images import CLASSES, NAMES, batch_of, looker, toy_model

from cbm_lightning import CBMModule, EmbeddingBottleneck
from cbm_lightning.callbacks.loggers import rasterize
from cbm_lightning.callbacks.prediction_figure import RIGHT, UNKNOWN, WRONG
from cbm_lightning.callbacks.saliency_figure import OUTLINE, Panel, draw_saliency
from cbm_lightning.callbacks.saliency_panels import panels
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.saliency import Auto, class_maps, concept_maps
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import Batch

HEIGHT, WIDTH = 12, 20


def image() -> Tensor:
    return torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8)


def drawn(*found: Panel) -> list[Axes]:
    """The tiles of one image, after all has been drawn."""
    figure = draw_saliency([(image(), found)])
    rasterize(figure)
    return figure.axes


def tile(*, right: bool | None = None, **options: Any) -> Axes:
    [axes] = drawn(Panel(**{"name": "red", "note": "", "right": right, "map": None, **options}))
    return axes


# ---------------------------------------------------------------- drawing


def test_a_row_an_image_and_a_tile_a_panel() -> None:
    rows = [(image(), [Panel(f"{i} {k}", "note", None, None) for k in range(i)]) for i in (3, 1, 2)]
    before = plt.get_fignums()
    figure = draw_saliency(rows)
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == before
    assert [axes.get_title() for axes in figure.axes] == [f"{i} {k}\nnote" for i in (3, 1, 2) for k in range(i)]
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 < 1 for box in boxes)
    assert len({round(box.y0, 6) for box in boxes}) == 3
    assert len({round(box.x0, 6) for box in boxes}) == 3
    # pixels are square
    width, height = figure.get_size_inches()
    for box in boxes:
        assert box.width * width / (box.height * height) == pytest.approx(WIDTH / HEIGHT)
    pixels = rasterize(figure)
    assert pixels.shape == (3, round(height * figure.dpi), round(width * figure.dpi))
    assert pixels.float().std() > 20


@pytest.mark.parametrize(("right", "colour"), [(True, RIGHT), (False, WRONG), (None, UNKNOWN)])
def test_titles_say_whether_the_prediction_is_right(right: bool | None, colour: str) -> None:
    axes = tile(right=right, note="54%, present")
    assert axes.get_title() == "red\n54%, present"
    assert to_rgba(axes.title.get_color()) == to_rgba(colour)
    assert len(tile(name="a concept of very many words indeed").get_title()) < 35


@pytest.mark.filterwarnings("ignore:Glyph .* missing")
@pytest.mark.parametrize("name", ["$\\frac$", "5$ to 10$", "a_{b", "x^", "<e>", "naïve café 鳥"])
def test_names_are_shown_as_they_are(name: str) -> None:
    """No formulas are read into them."""
    title = tile(name=name).title
    text = title.get_text()
    assert text.split("\n")[0].replace("\\$", "$") == name
    assert not title.get_parse_math() or "$" not in text.replace("\\$", "")


def test_the_brightest_pixel_is_the_largest_of_the_map() -> None:
    found = torch.linspace(-3, 2, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).flip(0)
    plain, grey = tile(), tile(map=found)
    assert [len(axes.images) for axes in (plain, grey)] == [1, 2]
    assert plain.images[0].get_array().shape == (HEIGHT, WIDTH, 3)
    assert grey.images[0].get_array().shape == (HEIGHT, WIDTH)
    heat, alpha = (torch.tensor(np.asarray(x)) for x in (grey.images[1].get_array(), grey.images[1].get_alpha()))
    assert heat.max() == heat.flatten()[found.argmax()] == 1
    assert_close(heat, found.clamp(min=0) / found.max())
    assert alpha.min() < alpha.max() <= 1
    # the scale of a map says nothing
    assert_close(torch.tensor(np.asarray(tile(map=found * 100).images[1].get_array())), heat)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_maps_that_show_nothing(value: float) -> None:
    """Of a concept without evidence, and of a model that diverged."""
    everywhere, here = torch.full((HEIGHT, WIDTH), value), torch.rand(HEIGHT, WIDTH)
    here[3, 4] = value
    axes, _ = drawn(Panel("red", "", None, everywhere), Panel("red", "", None, here))
    if value <= 0:
        assert not np.asarray(axes.images[1].get_array()).any()


def test_masks_have_an_outline() -> None:
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[3:7, 5:11] = True
    lines = [each for each in tile(mask=mask).collections if each.get_paths()]
    edge = np.concatenate([path.vertices for each in lines for path in each.get_paths()])
    assert (edge.min(0).tolist(), edge.max(0).tolist()) == ([4.5, 2.5], [10.5, 6.5])
    assert to_rgba(OUTLINE) in {tuple(colour) for each in lines for colour in each.get_edgecolor()}
    for nothing in (mask & False, mask | True, None):
        assert not tile(mask=nothing).collections


def test_points_are_marked() -> None:
    [mark] = tile(point=torch.tensor([7.0, 2.0])).lines
    assert (mark.get_xdata().tolist(), mark.get_ydata().tolist()) == ([7.0], [2.0])
    for nothing in (torch.tensor([torch.nan, 2.0]), torch.tensor([torch.nan] * 2), None):
        axes = tile(point=nothing)
        assert not axes.lines
    # a mark at the edge does not move the picture
    edge = tile(point=torch.tensor([WIDTH - 1.0, 0.0]))
    assert edge.get_xlim() == (-0.5, WIDTH - 0.5)
    assert edge.get_ylim() == (HEIGHT - 0.5, -0.5)


# ---------------------------------------------------------------- panels


def found(model: CBMModule, batch: Batch, concepts: int | list[str]) -> list[list[Panel]]:
    with torch.no_grad():
        return panels(Subject(model), Auto(), batch, model.eval()(batch), concepts)


def test_predicted_concepts_go_first_by_what_they_weigh() -> None:
    model, batch = looker(), batch_of(8)
    with torch.no_grad():
        prediction = model(batch)
    weighs = Subject(model).importance(prediction).abs()
    for b, row in enumerate(found(model, batch, 3)):
        there = [k for k in weighs[b].argsort(descending=True).tolist() if batch["concepts"][b, k] > 0.5]
        absent = [k for k in weighs[b].argsort(descending=True).tolist() if batch["concepts"][b, k] < 0.5]
        assert [panel.name for panel in row[2:]] == [NAMES[k] for k in there + absent]
    assert [len(row) for row in found(model, batch, 2)] == [4] * 8
    assert [len(row) for row in found(model, batch, 99)] == [5] * 8


def test_what_is_said_of_concepts() -> None:
    model, batch = looker((0, 2, 1)), batch_of(6, "masks points")
    batch["concepts"][0, 0] = torch.nan
    with torch.no_grad():
        probs = model(batch).concepts.probs
    maps = concept_maps(model, batch["image"])
    for b, row in enumerate(found(model, batch, ["blue", "red"])):
        assert [panel.name for panel in row[2:]] == ["blue", "red"]
        for panel, k in zip(row[2:], (2, 0), strict=True):
            truth = batch["concepts"][b, k]
            said = "" if truth.isnan() else ", present" if truth > 0.5 else ", absent"
            assert panel.note == f"{probs[b, k]:.0%}{said}"
            assert panel.right == (None if truth.isnan() else bool((probs[b, k] >= 0.5) == (truth > 0.5)))
            assert_close(panel.map, maps[b, k])
            assert torch.equal(panel.mask, batch["concept_masks"][b, k])
            assert torch.equal(panel.point.isnan(), batch["concept_points"][b, k].isnan())
    assert {panel.right for row in found(model, batch, ["blue", "red"]) for panel in row[2:]} == {True, False, None}


def test_what_is_said_of_classes() -> None:
    model, batch = looker(), batch_of(6)
    with torch.no_grad():
        prediction = model(batch)
    classes, sure = prediction.logits.argmax(1), prediction.logits.softmax(1)
    weight, maps = model.head.concept_weight()[..., 0], concept_maps(model, batch["image"])
    expected = class_maps(maps, weight, classes)
    for b, (first, second, *_) in enumerate(found(model, batch, 3)):
        truth, label = int(batch["label"][b]), int(classes[b])
        assert first == Panel(CLASSES[truth], "true class", None, None)
        assert second[:3] == (CLASSES[label], f"{sure[b, label]:.0%}, predicted", truth == label)
        assert_close(second.map, expected[b])
    # a map of chosen concepts would be no map of the class
    assert all(row[1].map is None for row in found(model, batch, ["red"]))
    assert all(row[1].map is None for row in found(toy_model(EmbeddingBottleneck(2)), batch, 3))
    del batch["label"], batch["concepts"], batch["concept_masks"]
    for first, second, third in found(model, batch, 1):
        assert first == Panel("image", "", None, None)
        assert (second.right, third.right, third.mask, third.point) == (None,) * 4


def test_other_labels() -> None:
    batch = batch_of(6)
    assert [row[0].name for row in found(toy_model(task="multilabel"), batch, 1)] == ["image"] * 6
    assert [len(row) for row in found(toy_model(task="multilabel"), batch, 1)] == [2] * 6
    model = toy_model(task="binary", num_classes=2, class_names=["no", "yes"])
    batch["label"] = (batch["label"] > 1).float()[:, None]
    with torch.no_grad():
        yes = model.eval()(batch).logits[:, 0].sigmoid().tolist()
    for share, label, (first, second, _) in zip(yes, batch["label"].flatten(), found(model, batch, 1), strict=True):
        assert first.name == ("yes" if label else "no")
        assert second.name == ("yes" if share >= 0.5 else "no")
        assert second.note == f"{max(share, 1 - share):.0%}, predicted"
        assert second.right == ((share >= 0.5) == bool(label))


def test_real_valued_concepts_are_neither_right_nor_wrong() -> None:
    batch = batch_of(4)
    batch["concepts"][:, 1] = 7.5
    model = toy_model(concepts=ConceptSet(NAMES, kinds=["binary", "real", "binary"]))
    for *_, panel in found(model, batch, ["green"]):
        assert panel.right is None
        assert "present" not in panel.note
        assert "%" not in panel.note
