from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from saliency.measures import MEASURES, every_measure, first_maximum, pairs
from torch import Tensor

from cbm_lightning.saliency import scores
from cbm_lightning.saliency.localisation import (
    energy_in_mask,
    half_max_overlap,
    iou_at_mass,
    keypoint_distance,
    pointing_game,
    top_k_intersection,
)

NAN = float("nan")


def blob(height: int = 5, width: int = 6) -> tuple[Tensor, Tensor]:
    """One pair, nothing on the map yet."""
    return torch.zeros(1, height, width), torch.zeros(1, height, width, dtype=torch.bool)


@every_measure
@pytest.mark.parametrize("levels", [None, 2, 1])
def test_one_pair_and_one_pixel_at_a_time(name: str, levels: int | None) -> None:
    measure, loop = MEASURES[name]
    maps, masks = pairs(levels=levels)
    expected = [loop(s.double().numpy(), a.numpy()) for s, a in zip(maps, masks, strict=True)]
    # whether a level of the mass is reached exactly is decided in another precision
    assert measure(maps, masks).values.tolist() == pytest.approx(expected, abs=2e-6)
    assert measure(maps.double(), masks).values.tolist() == pytest.approx(expected, abs=1e-9)
    assert len(set(expected)) > 1


def test_distances_one_pixel_at_a_time() -> None:
    maps, _ = pairs(levels=2)
    points = torch.rand(len(maps), 2) * torch.tensor([9.0, 6.0])
    expected, chance = [], []
    for s, (x, y) in zip(maps.numpy(), points.tolist(), strict=True):
        row, column = first_maximum(s)
        expected.append(math.hypot(column - x, row - y))
        chance.append(np.mean([math.hypot(c - x, r - y) for r, c in np.ndindex(s.shape)]))
    found, relative = (keypoint_distance(maps, points, normalised=normalised) for normalised in (False, True))
    assert found.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert found.chance.tolist() == pytest.approx(chance, abs=1e-5)
    for pixels, share in zip(found, relative, strict=True):
        torch.testing.assert_close(share, pixels / math.sqrt(6**2 + 9**2))


@every_measure
def test_a_perfect_map_and_its_opposite(name: str) -> None:
    measure, _ = MEASURES[name]
    _, masks = pairs()
    # equal values inside, so that every level of the mass is the whole mask
    best = measure(masks.float(), masks).values
    if name != "top 7":
        torch.testing.assert_close(best, torch.ones(len(masks)))
    if not name.startswith("pointing "):
        worst = measure((~masks).float() - 0.5, masks).values
        assert (worst < best).all()
        if name not in ("rank", "top 7", "ap"):
            assert worst.max() == 0


def test_the_first_of_several_maxima_counts() -> None:
    maps, masks = blob()
    maps[0, 1, 2] = maps[0, 3, 4] = 1.0
    masks[0, 3, 4] = True
    assert pointing_game(maps, masks).values.tolist() == [0]
    assert pointing_game(maps.flip(1, 2), masks.flip(1, 2)).values.tolist() == [1]
    assert keypoint_distance(maps, torch.tensor([[4.0, 3.0]])).values.tolist() == pytest.approx([math.sqrt(8)])


def test_a_tolerance_is_a_circle_around_the_mask() -> None:
    maps, masks = blob(9, 9)
    maps[0, 4, 4] = 1.0
    masks[0, 1, 2] = True
    away = math.sqrt(3**2 + 2**2)
    for tolerance, expected in ((0, 0), (0.9, 0), (3, 0), (away - 1e-3, 0), (away + 1e-3, 1), (15, 1), (1e12, 1)):
        assert pointing_game(maps, masks, tolerance).values.tolist() == [expected]
    assert pointing_game(maps, masks, 1).chance.tolist() == pytest.approx([5 / 81])
    assert pointing_game(maps, masks, 1e12).chance.tolist() == [1]


def test_negative_saliency_is_no_saliency() -> None:
    maps, masks = blob()
    maps[0, 0, 0], maps[0, 0, 1] = 3.0, 1.0
    masks[0, 0, 0] = masks[0, 4] = True
    expected = energy_in_mask(maps, masks)
    assert expected.values.tolist() == [0.75]
    maps[0, 3:] = -100.0
    for name in ("energy", "mass 0.5", "mass 1", "iou", "iou soft"):
        with_negative, without = MEASURES[name][0](maps, masks), MEASURES[name][0](maps.clamp(min=0), masks)
        assert torch.equal(with_negative.values, without.values)


def test_levels_of_the_mass_by_hand() -> None:
    maps = torch.tensor([[[4.0, 3.0, 2.0, 1.0, 0.0, -1.0]]])
    masks = torch.tensor([[[1, 0, 0, 1, 0, 0]]])
    # one to four pixels are needed, of which the first and the fourth lie in the mask
    for mass, overlap in (
        (0.3, 1 / 2),
        (0.4, 1 / 2),
        (0.41, 1 / 3),
        (0.7, 1 / 3),
        (0.9, 1 / 4),
        (0.95, 2 / 4),
        (1, 0.5),
    ):
        for scale in (1.0, 0.1, 1e-30, 3e30):
            assert iou_at_mass(maps * scale, masks, mass).values.tolist() == pytest.approx([overlap]), (mass, scale)
    ties = torch.tensor([[[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]])
    assert iou_at_mass(ties, masks, 0.1).values.tolist() == [0.5]


def test_a_level_of_the_mass_that_is_reached_exactly() -> None:
    """The first n pixels hold their own share, whatever rounding makes of it."""
    every = torch.tensor([sorted(values, reverse=True) for values in itertools.combinations(range(1, 12), 4)])
    masks = (torch.arange(4) == 0).expand(1, 1, 4)
    for values in every[:, None, None].float():
        for n in (1, 2, 3):
            mass = values[..., :n].sum().item() / values.sum().item()
            assert iou_at_mass(values, masks, mass).values.tolist() == pytest.approx([1 / n]), (values, n)


def test_a_measure_is_given_finite_maps() -> None:
    def measure(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        assert s.isfinite().all()
        return s[:, 0], a[:, 0] * 1.0

    maps, masks = pairs(3)
    maps[0, 0, 0], maps[1, 2, 2] = NAN, math.inf
    assert scores.over_pairs(measure, maps, masks).values.isnan().tolist() == [True, True, False]


def test_one_half_stays_one_half() -> None:
    maps, masks = torch.tensor([[[4.0, 2.0, 1.0, -8.0]]]), torch.tensor([[[True, True, False, False]]])
    for kind, expected in (("iou", 1.5 / 2), ("dice", 3 / 3.5), ("precision", 1)):
        assert half_max_overlap(maps, masks, kind).values.tolist() == pytest.approx([expected])
    for kind, expected in (("iou", 1.5 / 2.25), ("dice", 3 / 3.75), ("precision", 1.5 / 1.75)):
        assert half_max_overlap(maps, masks, kind, soft=True).values.tolist() == pytest.approx([expected])


@every_measure
def test_an_empty_mask_is_never_a_hit(name: str) -> None:
    maps, masks = pairs()
    masks[3] = False
    for kind in (masks, masks.float(), torch.where(masks, 1.0, NAN)):
        found = MEASURES[name][0](maps, kind)
        assert found.values.isnan().nonzero().flatten().tolist() == [3]
        assert found.chance.isnan().nonzero().flatten().tolist() == [3]


@every_measure
def test_a_full_mask(name: str) -> None:
    maps, masks = pairs(3)
    found = MEASURES[name][0](maps, torch.ones_like(masks))
    if name in ("auroc", "ap"):
        assert found.values.isnan().all()
        assert found.chance.isnan().all()
    else:
        torch.testing.assert_close(found.values, found.chance)


@every_measure
@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_a_map_that_is_no_map_is_undefined(name: str, bad: float) -> None:
    maps, masks = pairs()
    expected = MEASURES[name][0](maps, masks)
    maps[2, 0, 0], maps[5] = bad, bad
    found = MEASURES[name][0](maps, masks)
    fine = [n for n in range(len(maps)) if n not in (2, 5)]
    for after, before in zip(found, expected, strict=True):
        assert after[[2, 5]].isnan().all()
        assert torch.equal(after[fine], before[fine])


@every_measure
def test_a_map_without_a_positive_pixel(name: str) -> None:
    maps, masks = pairs()
    undefined = name == "energy" or name.startswith(("mass", "iou", "dice", "precision"))
    for blank in (maps - maps.max() - 1, torch.zeros_like(maps)):
        found = MEASURES[name][0](blank, masks)
        assert bool(found.values.isnan().all()) == bool(found.chance.isnan().all()) == undefined
        assert bool(found.values.isnan().any()) == undefined


def test_invisible_points_are_undefined() -> None:
    maps, _ = pairs(4)
    points = torch.tensor([[1.0, 2.0], [NAN, NAN], [NAN, 2.0], [math.inf, 2.0]])
    found = keypoint_distance(maps, points)
    assert found.values.isnan().tolist() == found.chance.isnan().tolist() == [False, True, True, True]


@every_measure
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e35])
def test_the_scale_of_a_map_means_nothing(name: str, scale: float) -> None:
    maps, masks = pairs()
    for scaled, plain in zip(MEASURES[name][0](maps * scale, masks), MEASURES[name][0](maps, masks), strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["pointing", "pointing far", "rank", "top 7", "auroc", "ap"])
def test_orders_see_no_monotone_change(name: str) -> None:
    maps, masks = pairs()
    for changed in (maps - 3, maps.exp(), maps**3):
        assert torch.equal(MEASURES[name][0](changed, masks).values, MEASURES[name][0](maps, masks).values)


@every_measure
def test_mirrored_images_score_the_same(name: str) -> None:
    maps, masks = pairs()
    expected = MEASURES[name][0](maps, masks)
    for change in (partial(torch.flip, dims=(1,)), partial(torch.flip, dims=(2,)), lambda x: x.transpose(1, 2)):
        for after, before in zip(MEASURES[name][0](change(maps), change(masks)), expected, strict=True):
            torch.testing.assert_close(after, before)


@every_measure
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maps, masks = pairs()
    whole = MEASURES[name][0](maps, masks)
    points = torch.rand(len(maps), 2)
    distances = keypoint_distance(maps, points).values
    for pixels in (1, 54 * 5, 54 * 12):
        monkeypatch.setattr(scores, "_PIXELS_AT_ONCE", pixels)
        for part, all_at_once in zip(MEASURES[name][0](maps, masks), whole, strict=True):
            assert torch.equal(part, all_at_once)
        assert torch.equal(keypoint_distance(maps, points).values, distances)


@every_measure
def test_types_of_numbers(name: str) -> None:
    measure, _ = MEASURES[name]
    maps, masks = pairs(levels=2)
    expected = measure(maps, masks)
    assert expected.values.dtype == expected.chance.dtype == torch.float32
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = measure(maps.to(dtype), masks.to(torch.uint8))
        assert found.values.dtype == found.chance.dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.values.float(), expected.values)
    torch.testing.assert_close(measure((2 * maps).long(), masks.float()).values, expected.values)
    # a photo editor's mask, and one that was resized
    torch.testing.assert_close(measure(maps, 255 * masks.to(torch.uint8)).values, expected.values)
    torch.testing.assert_close(measure(maps, 0.4 + 0.3 * masks).values, expected.values)


@every_measure
def test_no_pairs(name: str) -> None:
    found = MEASURES[name][0](torch.zeros(0, 6, 9), torch.zeros(0, 6, 9, dtype=torch.bool))
    assert found.values.shape == found.chance.shape == (0,)
    assert keypoint_distance(torch.zeros(0, 6, 9), torch.zeros(0, 2)).values.shape == (0,)


@every_measure
def test_inputs_stay_as_they_were(name: str) -> None:
    maps, masks = pairs()
    before = maps.clone(), masks.clone()
    with torch.inference_mode():
        MEASURES[name][0](maps, masks)
    assert torch.equal(maps, before[0])
    assert torch.equal(masks, before[1])


@every_measure
def test_shapes_that_do_not_fit(name: str) -> None:
    measure, _ = MEASURES[name]
    maps, masks = pairs(2)
    for wrong in (maps[0], maps[:, None], maps[..., :0]):
        with pytest.raises(ValueError, match=r"^maps: expected \[P, H, W\] with pixels, got"):
            measure(wrong, masks)
    for other in (masks[:1], masks[:, :3], masks[0]):
        with pytest.raises(
            ValueError, match=r"^masks: expected the shape of the maps .*; visible_pairs .* size of the"
        ):
            measure(maps, other)


def test_options_that_do_not_fit() -> None:
    maps, masks = pairs(2)
    for tolerance in (-1, NAN, math.inf):
        with pytest.raises(ValueError, match=r"^tolerance: expected a number of pixels from 0, got"):
            pointing_game(maps, masks, tolerance)
    for k in (0, -1, 55):
        with pytest.raises(ValueError, match=rf"^k: expected a number of pixels from 1 to 54 .*, got {k}"):
            top_k_intersection(maps, masks, k)
    for mass in (0, -0.5, 1.01, NAN):
        with pytest.raises(ValueError, match=r"^mass: expected a share in \(0, 1\], got"):
            iou_at_mass(maps, masks, mass)
    with pytest.raises(ValueError, match=r"^kind: expected 'iou', 'dice' or 'precision', got 'jaccard'"):
        half_max_overlap(maps, masks, "jaccard")  # type: ignore[arg-type]
    for points in (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"^points: expected \[2, 2\], \(x, y\) for every map, got"):
            keypoint_distance(maps, points)
    with pytest.raises(ValueError, match=r"^maps: expected \[P, H, W\]"):
        keypoint_distance(maps[0], torch.zeros(2, 2))
