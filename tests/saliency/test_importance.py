"""Importance, existence and location of concepts, against the reference numbers and by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cbm_lightning.saliency import importance as module
from cbm_lightning.saliency.importance import (
    GlobalImportance,
    concept_activation_maps,
    concept_density,
    concept_existence,
    concept_global_importance,
    concept_location,
    global_importance_chance,
    local_importance,
)

NAN = float("nan")


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    with np.load(shared / "golden" / "dev" / "derived_formula_only.npz", allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def important(golden: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Local importance and annotations of the reference."""
    return local_importance(golden["theta"].T, golden["concept_scores"], golden["predictions"]), golden["concepts"]


def test_global_importance_agrees_with_the_reference(golden: dict[str, Tensor]) -> None:
    # there, classes without a correctly classified sample have scores of zero instead of none
    found = concept_global_importance(golden["theta"].T, golden["V"].T, golden["U_star"].T)
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, golden[name], rtol=0, atol=1e-6)


def test_a_class_without_a_correct_sample_is_left_out(golden: dict[str, Tensor]) -> None:
    theta, frequency, scores = (golden[name].T.clone() for name in ("theta", "V", "U_star"))
    right = golden["class_labels"][golden["class_labels"] == golden["predictions"]]
    without = torch.tensor([k not in right for k in range(4)])
    assert without.tolist() == [False, True, True, False]
    scores[without] = NAN
    found = concept_global_importance(theta, frequency, scores)
    torch.testing.assert_close(found.cgim1, golden["cgim1"], rtol=0, atol=1e-6)
    few = concept_global_importance(theta[~without], frequency[~without], scores[~without])
    assert torch.equal(found.cgim2, few.cgim2)
    assert torch.equal(found.cgim3, few.cgim3)
    assert (found.cgim2 - golden["cgim2"]).abs().max() > 0.1


def test_local_importance_and_existence_agree_with_the_reference(golden: dict[str, Tensor]) -> None:
    found, present = important(golden)
    torch.testing.assert_close(found, golden["local_importance"], rtol=0, atol=1e-6)
    assert torch.equal(found.argsort(dim=1, descending=True, stable=True), golden["ranking"])
    for top in (1, 3, 5):
        torch.testing.assert_close(concept_existence(found, present, top), golden[f"cem_{top}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1, 3, 6])
@pytest.mark.parametrize("top", [1, 3])
def test_location_agrees_with_the_reference(golden: dict[str, Tensor], top: int, alpha: int) -> None:
    maps = concept_activation_maps(golden["features"], golden["cav"])
    torch.testing.assert_close(maps, golden["coam"], rtol=0, atol=1e-6)
    points = golden["locations_rc"].flip(2).double()
    expected = golden[f"clm_{top}_alpha{alpha}"]
    found = concept_location(golden["coam_upsampled_bilinear"], points, *important(golden), top, alpha)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    from_cells = concept_location(maps, points, *important(golden), top, alpha, size=(16, 16))
    torch.testing.assert_close(from_cells, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("per", ["concept", "class"])
def test_each_cosine_is_that_of_its_own_two_vectors(per: str, center: bool) -> None:
    weight, frequency, scores = torch.randn(7, 5), torch.rand(7, 5), torch.randn(7, 5)
    frequency[1, 0] = scores[4] = NAN
    found = concept_global_importance(weight, frequency, scores, center, per)
    chance = global_importance_chance(weight, frequency, scores, center, per)

    def cosine(x: Tensor, y: Tensor) -> float:
        both = ~(x.isnan() | y.isnan())
        if not both.any():
            return NAN
        if center:
            return float(np.corrcoef(x[both], y[both])[0, 1])
        return float(torch.nn.functional.cosine_similarity(x[both], y[both], dim=0))

    vectors = GlobalImportance(weight, scores, weight * scores)
    for value, expected, held in zip(found, chance, vectors, strict=True):
        columns, others = (held.T, frequency.T) if per == "concept" else (held, frequency)
        table = torch.tensor([[cosine(x, y) for y in others] for x in columns])
        torch.testing.assert_close(value, table.diagonal(), equal_nan=True)
        torch.testing.assert_close(expected, table.fill_diagonal_(NAN).nanmean(1), equal_nan=True)


def test_centring_takes_off_what_all_cosines_share() -> None:
    frequency = torch.rand(200, 30)
    unrelated = torch.rand(200, 30)
    raw, centred = (concept_global_importance(unrelated, frequency, unrelated, c).cgim2 for c in (False, True))
    by_chance = global_importance_chance(unrelated, frequency, unrelated).cgim2
    assert raw.mean() > 0.7
    assert centred.mean().abs() < 0.05
    torch.testing.assert_close(raw.mean(), by_chance.mean(), rtol=0, atol=0.02)
    own = concept_global_importance(frequency, frequency, frequency, center=True).cgim2
    torch.testing.assert_close(own, torch.ones(30))


def test_vectors_without_a_direction_have_no_cosine() -> None:
    weight, frequency = torch.rand(6, 3) + 0.1, torch.rand(6, 3)
    frequency[:, 1] = 0.0
    scores = torch.full((6, 3), 1 / 3) + 1e-8 * torch.rand(6, 3)
    raw, centred = (concept_global_importance(weight, frequency, scores, center=c) for c in (False, True))
    assert raw.cgim1.isnan().tolist() == [False, True, False]
    # a concept of which the model says the same whatever the class goes with no class
    assert raw.cgim2.isnan().tolist() == [False, True, False]
    assert centred.cgim2.isnan().all()
    assert centred.cgim3.isnan().tolist() == [False, True, False]
    one = global_importance_chance(weight[:, :1], frequency[:, :1], scores[:, :1])
    assert one.cgim1.isnan().all()


def test_existence_by_hand() -> None:
    importance = torch.tensor([[0.9, 0.1, 0.5, -2.0], [1.0, 1.0, 1.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    present = torch.tensor([[1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0], [NAN, 0.6, 0.4, NAN]])
    assert concept_existence(importance, present, 1).tolist()[:2] == [1.0, 0.0]
    assert concept_existence(importance, present, 2).tolist() == [0.5, 0.5, 1.0]
    assert concept_existence(importance, present, 3)[2] == 0.5
    # the most important concept of the last is not annotated
    assert concept_existence(importance, present, 1)[2].isnan()
    # all there are, with fewer concepts than asked for
    torch.testing.assert_close(concept_existence(importance, present, 99), concept_density(present))
    assert concept_density(torch.tensor([[NAN, NAN]])).isnan().all()
    assert torch.equal(concept_existence(importance[:2], present[:2].bool(), 2), torch.tensor([0.5, 0.5]))


def test_importance_drawn_at_random_exists_as_often_as_concepts_do() -> None:
    present = (torch.rand(4000, 12) < 0.3).float()
    present[torch.rand(4000, 12) < 0.1] = NAN
    found, chance = concept_existence(torch.randn(4000, 12), present, 3), concept_density(present)
    kept = ~found.isnan()
    torch.testing.assert_close(found[kept].mean(), chance[kept].mean(), rtol=0, atol=0.02)


def peak(x: int, y: int, height: int = 6, width: int = 9) -> Tensor:
    """A map that falls off with the distance from a pixel."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    return -((columns - x) ** 2 + (rows - y) ** 2).float()


def test_a_point_is_x_then_y_with_pixel_centres_at_whole_numbers() -> None:
    maps = peak(7, 2)[None, None]
    ones = torch.ones(1, 1)

    def hit(x: float, y: float) -> float:
        return float(concept_location(maps, torch.tensor([[[x, y]]]), ones, ones, alpha=1, parts=54))

    assert hit(7.0, 2.0) == hit(6.6, 2.4) == hit(6.5, 1.5) == 1.0
    assert hit(2.0, 5.0) == hit(6.4, 2.0) == hit(7.0, 2.6) == 0.0
    assert hit(-0.5, 5.4) == hit(8.4, -0.5) == 0.0


def test_the_most_important_concepts_that_are_present_and_seen_count() -> None:
    maps = torch.stack([peak(1, 1), peak(2, 2), peak(3, 3), peak(4, 4), peak(5, 5)])[None]
    on, off = [1.0, 1.0], [8.0, 0.0]
    points = torch.tensor([[on, off, [3.0, 3.0], [NAN, NAN], off]])
    importance = torch.tensor([[1.0, 5.0, 4.0, 3.0, 2.0]])
    present = torch.tensor([[1.0, NAN, 1.0, 1.0, 0.7]])
    # by importance: 1 is not annotated, 2 is hit, 3 is not to be seen, 4 is missed, 0 is hit
    for top, expected in ((1, 1.0), (2, 1 / 2), (3, 2 / 3), (9, 2 / 3)):
        assert concept_location(maps, points, importance, present, top).item() == pytest.approx(expected)
    nothing = torch.zeros_like(present)
    assert concept_location(maps, points, importance, nothing).isnan().all()
    assert concept_location(maps, points * NAN, importance, present).isnan().all()


def test_maps_that_point_nowhere_do_not_count() -> None:
    maps = torch.stack([peak(1, 1), torch.zeros(6, 9), torch.full((6, 9), NAN)])[None]
    points, ones = torch.ones(1, 3, 2), torch.ones(1, 3)
    assert concept_location(maps, points, ones, ones).item() == 1.0
    assert concept_location(maps[:, 1:], points[:, 1:], ones[:, 1:], ones[:, 1:]).isnan().all()


def test_as_many_pixels_as_alpha_says_whatever_ties() -> None:
    height, width = 4, 6
    maps = torch.zeros(1, 1, height, width)
    maps[..., -1, -1] = 1.0  # all others are equal: the first in raster order follow
    ones = torch.ones(1, 1)
    for alpha, quota in ((1, 2), (3, 6), (6, 12), (12, 24), (0.1, 1)):
        hits = []
        for y in range(height):
            for x in range(width):
                points = torch.tensor([[[float(x), float(y)]]])
                hits.append(concept_location(maps, points, ones, ones, alpha=alpha).item())
        assert sum(hits) == quota
        assert hits[-1] == 1.0
        assert all(hits[: quota - 1])


def test_random_points_are_hit_by_chance() -> None:
    maps = torch.rand(3000, 2, 10, 12)
    points = torch.rand(3000, 2, 2) * torch.tensor([11.0, 9.0])
    found = concept_location(maps, points, torch.rand(3000, 2), torch.ones(3000, 2), alpha=3)
    assert found.mean().item() == pytest.approx(3 / 12, abs=0.02)


def test_maps_are_brought_to_the_size_of_the_image_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = torch.zeros(2, 2, 3, 3)
    cells[0, :, 0, 2] = cells[1, :, 2, 0] = 1.0
    points = torch.tensor([[28.0, 3.0], [3.0, 18.0]])[:, None].expand(2, 2, 2)
    ones = torch.ones(2, 2)
    assert concept_location(cells, points, ones, ones, size=(22, 33), alpha=1).tolist() == [1.0, 1.0]
    assert concept_location(cells, points.flip(0), ones, ones, size=(22, 33), alpha=1).tolist() == [0.0, 0.0]
    many = torch.randn(9, 4, 3, 3), torch.rand(9, 4, 2) * 20, torch.rand(9, 4), (torch.rand(9, 4) > 0.4).float()
    whole = concept_location(*many, size=(22, 33))
    monkeypatch.setattr(module, "_PIXELS_AT_ONCE", 22 * 33 * 2)
    assert torch.equal(concept_location(*many, size=(22, 33)), whole)


def test_half_precision_and_no_image() -> None:
    maps, points = peak(1, 1)[None, None].half(), torch.ones(1, 1, 2)
    found = concept_location(maps, points, torch.ones(1, 1).half(), torch.ones(1, 1), size=(12, 18))
    assert found.dtype == torch.float32
    assert concept_location(maps[:0], points[:0], torch.ones(0, 1), torch.ones(0, 1)).shape == (0,)
    assert concept_existence(torch.ones(0, 4), torch.ones(0, 4)).shape == (0,)


def test_the_mean_of_an_activation_map_is_the_score() -> None:
    tokens, vectors = torch.randn(3, 4, 5, 16), torch.randn(7, 16)
    maps = concept_activation_maps(tokens, vectors)
    assert maps.shape == (3, 7, 4, 5)
    torch.testing.assert_close(maps.mean((2, 3)), tokens.mean((1, 2)) @ vectors.T / 16)


ONE = torch.ones(2, 3)
POINTS = torch.ones(2, 3, 2)
MAPS = torch.rand(2, 3, 5, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: local_importance(ONE[0], ONE, torch.zeros(2).long()), r"^weight: expected \[L, K\]"),
        (lambda: local_importance(ONE, ONE[:, :2], torch.zeros(2).long()), r"^scores: expected \[B, 3\], got \[2, 2\]"),
        (lambda: local_importance(ONE, ONE, torch.zeros(2)), r"^classes: expected \[2\] class indices"),
        (lambda: local_importance(ONE, ONE, torch.zeros(3).long()), r"^classes: expected \[2\] class indices"),
        (lambda: local_importance(ONE, ONE, torch.tensor([0, 2])), "^classes: .* from 0 to 1, got 0 to 2"),
        (lambda: local_importance(ONE, ONE, torch.tensor([-1, 0])), "^classes: .* from 0 to 1, got -1 to 0"),
        (lambda: concept_existence(ONE, ONE[:1]), r"^importance, present: expected \[B, K\]"),
        (lambda: concept_existence(ONE * NAN, ONE), "^importance: expected finite"),
        (lambda: concept_existence(ONE, ONE * 2), "^present: expected annotations in"),
        (lambda: concept_existence(ONE, ONE, top=0), "^top: expected at least 1"),
        (lambda: concept_location(MAPS[:1], POINTS, ONE, ONE), "^maps: expected"),
        (lambda: concept_location(MAPS[0], POINTS, ONE, ONE), "^maps: expected"),
        (lambda: concept_location(MAPS, POINTS[..., :1], ONE, ONE), "^points: expected floats"),
        (lambda: concept_location(MAPS, POINTS.long(), ONE, ONE), "^points: expected floats"),
        (lambda: concept_location(MAPS, POINTS * 5.5, ONE, ONE), r"^points: .* 6 wide and 5 high, or NaN, got \(5.5"),
        (lambda: concept_location(MAPS, POINTS * -1, ONE, ONE), r"^points: .* got \(-1, -1\)"),
        (lambda: concept_location(MAPS, POINTS, ONE, ONE, top=0), "^top: expected at least 1"),
        (lambda: concept_location(MAPS, POINTS, ONE, ONE, alpha=0), "^alpha, parts: expected 0 < alpha"),
        (lambda: concept_location(MAPS, POINTS, ONE, ONE, alpha=13), "^alpha, parts: expected 0 < alpha"),
        (lambda: concept_activation_maps(MAPS, ONE), "^tokens, vectors: expected"),
        (lambda: concept_global_importance(ONE, ONE.T, ONE), "^weight, frequency, scores: expected"),
        (lambda: concept_global_importance(ONE * NAN, ONE, ONE), "^weight: expected finite"),
        (lambda: concept_global_importance(ONE, ONE * 2, ONE), "^frequency: expected shares"),
        (lambda: concept_global_importance(ONE, ONE, ONE / 0), "^scores: expected finite"),
        (lambda: global_importance_chance(ONE, ONE, ONE, per="image"), "^per: expected one of"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
