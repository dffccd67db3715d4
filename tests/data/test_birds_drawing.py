"""Pictures show what they are said to show, where they are said to show it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbm_lightning.data.birds import canvas
from cbm_lightning.data.birds.attributes import ATTRIBUTES, EVENTS, NUISANCES, Part
from cbm_lightning.data.birds.bird import Drawing, draw
from cbm_lightning.data.birds.canvas import Canvas, Ink, Pose, ellipse
from cbm_lightning.data.birds.captions import captions, listing, mention
from cbm_lightning.data.birds.population import Birds
from cbm_lightning.data.birds.render import visible_groups
from cbm_lightning.data.birds.scene import Nuisances, Scene, animate, class_background, happening
from cbm_lightning.data.birds.style import Style
from cbm_lightning.randomness import Randomness

NAMES = [group.name for group in ATTRIBUTES]
RGB = {"red": 0, "yellow": 1, "blue": 2}


def randomness(number: int) -> Randomness:
    return Randomness(0, "train", torch.arange(number))


def scene_of(values: Tensor, **nuisances: float) -> Scene:
    """Birds of class 0 with the given values ``[N, G]``."""
    zeros = torch.zeros(len(values), dtype=torch.long)
    birds = Birds(zeros, values, values, zeros - 1)
    groups = [*ATTRIBUTES, *EVENTS][: values.shape[1]]
    return Nuisances(**{"occlusion": 0.0, **nuisances}).sample(birds, groups, randomness(len(values)))


def random_values(number: int, groups: int = 10) -> Tensor:
    sizes = torch.tensor([len(group.values) for group in [*ATTRIBUTES, *EVENTS][:groups]])
    return (randomness(number).uniform("values", groups) * sizes).long()


def drawn(values: Tensor, size: int = 64, **nuisances: float) -> Drawing:
    return draw(scene_of(values, **nuisances), size)


def test_pictures_are_in_range_and_vary() -> None:
    picture = drawn(random_values(40))
    assert picture.colours.shape == (40, 3, 64, 64)
    assert picture.parts.shape == (40, 64, 64)
    assert picture.colours.min() >= 0
    assert picture.colours.max() <= 1
    assert picture.colours.flatten(1).std(1).min() > 0.05


@pytest.mark.parametrize("size", [64, 96])
def test_every_part_is_large_enough_to_be_seen(size: int) -> None:
    values = random_values(120)
    areas = drawn(values, size).left / size**2
    for position, group in enumerate(ATTRIBUTES):
        for value in group.shown_values:
            share = areas[values[:, position] == value][:, list(group.parts)].sum(1)
            assert share.median() > 0.004, (group.name, group.values[value])


@pytest.mark.parametrize("group", ["body colour", "wing colour", "head colour"])
def test_part_has_the_colour_that_its_group_says(group: str) -> None:
    position = NAMES.index(group)
    values = random_values(200)
    picture = drawn(values)
    on = (picture.parts == ATTRIBUTES[position].parts[0]).float()[:, None]
    red, green, blue = ((picture.colours * on).sum((2, 3)) / on.sum((2, 3))).T
    said = [values[:, position] == value for value in range(4)]
    assert (red[said[0]] > 2 * torch.maximum(green, blue)[said[0]]).all()
    assert (torch.minimum(red, green)[said[1]] > 2 * blue[said[1]]).all()
    assert (blue[said[2]] > 1.3 * torch.maximum(red, green)[said[2]]).all()
    assert torch.stack([red, green, blue])[:, said[3]].max() < 0.35


def test_values_of_two_change_the_area_of_their_part() -> None:
    values = random_values(60)
    for group in ("legs", "crest", "wing bar", "eye ring"):
        position = NAMES.index(group)
        off, on = values.clone(), values.clone()
        off[:, position], on[:, position] = 0, 1
        part = ATTRIBUTES[position].parts[0]
        less, more = (drawn(v).left[:, part] for v in (off, on))
        assert (more > 1.4 * less).all(), group
        if group != "legs":
            assert (less == 0).all()


def test_shapes_differ_between_values_of_a_group() -> None:
    values = random_values(30)
    for group in ("beak", "tail", "belly pattern"):
        position = NAMES.index(group)
        pictures = []
        for value in range(3):
            values[:, position] = value
            pictures.append(drawn(values).colours)
        for a, b in ((0, 1), (0, 2), (1, 2)):
            changed = ((pictures[a] - pictures[b]).abs().amax(1) > 0.15).flatten(1).sum(1)
            assert changed.min() > 12, (group, a, b)


def test_windows_hold_their_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(random_values(24, 13), occlusion=1.0)
    ongoing, progress = happening([*ATTRIBUTES, *EVENTS], torch.ones(24, 13).long(), 7, randomness(24))
    clip = animate(scene, ongoing, progress, randomness(24))
    tight = draw(clip, 64)
    window = Canvas._window
    monkeypatch.setattr(canvas.Canvas, "_window", lambda self, pose, at, radius: window(self, pose, at, 2 * radius))
    wide = draw(clip, 64)
    assert torch.equal(tight.colours, wide.colours)
    assert torch.equal(tight.parts, wide.parts)


def test_ellipse_is_exact_on_the_edge_and_antialiased() -> None:
    angle = torch.linspace(0, 6.2, 50)
    on_edge = ellipse(0.5 * angle.cos(), 0.2 * angle.sin(), 0.5, 0.2)
    torch.testing.assert_close(on_edge, torch.zeros(50), atol=1e-6, rtol=0)
    board = Canvas(torch.zeros(1, 64, 64, 3))
    one = torch.ones(1)
    pose = Pose(torch.tensor([0]), torch.zeros(1, 2), one, 0 * one, one)
    white = torch.ones(1, 3)
    board.paint(lambda x, y: Ink(ellipse(x, y, 0.5, 0.5), torch.ones_like(x)), pose, (0, 0), 0.55, white, one.byte())
    area = torch.pi * 16**2
    assert board.colours[:, 0].sum() == pytest.approx(area, rel=0.005)
    assert board.parts.sum() == pytest.approx(area, rel=0.02)
    assert ((board.colours[:, 0] > 0.02) & (board.colours[:, 0] < 0.98)).sum() > 40


def test_mirror_turns_the_picture_about_its_middle() -> None:
    scene = scene_of(random_values(6))
    mirrored = {field: getattr(scene, field) for field in scene.__dataclass_fields__}
    mirrored |= {
        "mirror": -scene.mirror,
        "angle": -scene.angle,
        "centre": scene.centre * torch.tensor([-1.0, 1.0]),
    }
    parts, flipped = draw(scene, 64).parts, draw(Scene(**mirrored), 64).parts.flip(-1)
    assert (parts == flipped).float().mean() > 0.995


def test_occluder_hides_and_is_counted() -> None:
    values = random_values(150)
    clear, covered = drawn(values), drawn(values, occlusion=1.0)
    leaf = covered.parts == Part.OCCLUDER
    assert leaf.flatten(1).any(1).all()
    assert torch.equal(clear.parts[~leaf], covered.parts[~leaf])
    assert torch.equal(clear.left, covered.bare)
    nothing = torch.full((150,), -1)
    groups = [*ATTRIBUTES, *NUISANCES]
    assert visible_groups(clear.bare, clear.left, groups, nothing).all()
    visible = visible_groups(covered.bare, covered.left, groups, nothing)
    assert 0.02 < (~visible[:, :10]).float().mean() < 0.3
    heads = covered.left[:, Part.HEAD] / covered.bare[:, Part.HEAD]
    assert torch.equal(visible[:, 2], heads >= 0.25)


def test_hidden_group_leaves_no_pixel_of_its_part() -> None:
    scene = scene_of(random_values(150), hide_part=1.0)
    picture = draw(scene, 64)
    visible = visible_groups(picture.bare, picture.left, ATTRIBUTES, scene.hidden)
    assert scene.hidden.unique().tolist() == list(range(10))
    for position, group in enumerate(ATTRIBUTES):
        rows = scene.hidden == position
        assert picture.left[rows][:, list(group.parts)].sum() == 0, group.name
        assert not visible[rows, position].any()
        assert visible[~rows, position].all()


def test_hidden_group_gives_no_hint_of_its_value() -> None:
    values = random_values(150)
    scene = scene_of(values, hide_part=1.0)
    other = values.clone()
    rows = torch.arange(150)
    sizes = torch.tensor([len(group.values) for group in ATTRIBUTES])
    other[rows, scene.hidden] = (values[rows, scene.hidden] + 1) % sizes[scene.hidden]
    again = scene_of(other, hide_part=1.0)
    assert torch.equal(scene.hidden, again.hidden)
    assert torch.equal(draw(scene, 64).colours, draw(again, 64).colours)


def test_ambiguous_scene_lies_between_its_two_values() -> None:
    scene = scene_of(random_values(300), ambiguity=1.0)
    torch.testing.assert_close(scene.weights.sum(-1), torch.ones(300, 10))
    split = (scene.weights > 0).sum(-1)
    assert torch.equal((split == 2).sum(1), torch.ones(300).long())
    sizes = torch.tensor([len(group.values) for group in ATTRIBUTES])
    assert all((scene.weights[:, g, size:] == 0).all() for g, size in enumerate(sizes.tolist()))
    larger = scene.weights[split == 2].amax(1)
    assert 0.5 <= larger.min() < 0.55
    assert larger.max() > 0.95


def test_background_follows_the_class_at_the_rate_asked_for() -> None:
    labels = torch.arange(4000) % 12
    birds = Birds(labels, torch.zeros(4000, 10).long(), torch.zeros(4000, 10).long(), labels * 0 - 1)
    for rate in (0.0, 0.25, 0.9, 1.0):
        nuisances = Nuisances(background_match=rate)
        scene = nuisances.sample(birds, ATTRIBUTES, randomness(4000))
        agrees = (scene.background == class_background(labels)).double().mean()
        assert agrees == pytest.approx(rate, abs=0.02)
        law = nuisances.background_law(12)
        for label in (0, 7):
            share = torch.bincount(scene.background[labels == label], minlength=4) / (labels == label).sum()
            torch.testing.assert_close(share.double(), law[label], atol=0.06, rtol=0)


def test_events_happen_within_their_frames_only() -> None:
    groups = [*ATTRIBUTES, *EVENTS]
    values = random_values(40, 13)
    ongoing, progress = happening(groups, values, 9, randomness(40))
    assert ongoing.shape == (40, 9, 3)
    assert torch.equal(ongoing.any(1), values[:, 10:] == 1)
    assert not ongoing[:, 0].any()
    assert torch.equal(ongoing.sum(1), 3 * (values[:, 10:] == 1).long())
    assert (progress[ongoing] > 0).all()
    assert (progress[ongoing] < 1).all()

    scene = scene_of(values)
    still = draw(scene, 64)
    clip = draw(animate(scene, ongoing, progress, randomness(40)), 64)
    colours, parts = (x.reshape(40, 9, *x.shape[1:]) for x in (clip.colours, clip.parts))
    same = (colours == still.colours[:, None]).flatten(2).all(2)
    assert torch.equal(same, ~ongoing.any(2))
    passing = (parts == Part.PASSER).flatten(2).any(2)
    assert torch.equal(passing, ongoing[..., 2])


@pytest.mark.parametrize(
    "options", [{"hue": 0.6}, {"blur": 1.0}, {"noise": 0.1}, {"contrast": 0.5}], ids=lambda options: next(iter(options))
)
def test_styles_change_pictures_and_stay_in_range(options: dict[str, float]) -> None:
    plain = drawn(random_values(8)).colours
    styled = Style.make(options).apply(plain, randomness(8))
    assert styled.min() >= 0
    assert styled.max() <= 1
    assert (styled - plain).abs().mean() > 0.004
    assert torch.equal(Style().apply(plain, randomness(8)), plain)


def test_styles_do_what_they_say() -> None:
    plain = 0.3 + 0.4 * drawn(random_values(8)).colours
    random = randomness(8)
    torch.testing.assert_close(Style(hue=2 * torch.pi).apply(plain, random), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(Style(hue=0.6).apply(plain, random).mean(1), plain.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(Style(contrast=0.5).apply(plain, random).std(), plain.std() / 2)
    grey = torch.full((8, 3, 64, 64), 0.5)
    torch.testing.assert_close(Style(blur=2.0).apply(grey, random), grey)
    noisy = Style(noise=0.1).apply(grey, random)
    assert noisy.std() == pytest.approx(0.1, rel=0.02)
    dot = torch.zeros(1, 3, 33, 33)
    dot[..., 16, 16] = 1.0
    spread = Style(blur=1.5).apply(dot, random)
    axis = torch.arange(33) - 16.0
    assert (spread[0, 0].sum(0) * axis**2).sum() == pytest.approx(1.5**2, rel=0.03)
    small = scene_of(random_values(8), scale=0.5)
    assert (draw(small, 64).left[:, Part.BODY] < 0.4 * drawn(random_values(8)).left[:, Part.BODY]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hew": 1.0}, "did you mean"),
        ({"blur": -1.0}, "blur"),
        ({"noise": -0.1}, "noise"),
        ({"contrast": -1.0}, "contrast"),
        ({"scale": 9.0}, "scale"),
    ],
)
def test_bad_styles(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Style.make(options)


def test_captions_name_some_of_what_is_visible() -> None:
    values = random_values(200)
    visible = randomness(200).uniform("visible", 10) < 0.7
    said = mention(visible, randomness(200))
    assert said.any(1).all()
    assert not (said & ~visible)[visible.any(1)].any()
    assert 0.4 < said[visible].float().mean() < 0.6
    texts = captions(ATTRIBUTES, values, said, torch.arange(200))
    assert len({text.split(" with ")[0].split(" has ")[0].split(" that ")[0] for text in texts}) == 4
    for text, row, keep in zip(texts, values.tolist(), said.tolist(), strict=True):
        for group, value, named in zip(ATTRIBUTES, row, keep, strict=True):
            assert (group.phrases[value] in text.replace("no " + group.name, "")) == named or group.phrases[
                value
            ].startswith("no")
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
