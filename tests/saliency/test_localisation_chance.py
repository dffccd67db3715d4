"""What chance scores, stood beside every measure, is what it does score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from saliency.measures import BY_AREA, MEASURES, dilated, every_measure, pairs
from scipy.stats import hypergeom

from cbm_lightning.saliency.localisation import (
    energy_in_mask,
    iou_at_mass,
    pixel_auroc,
    pixel_average_precision,
    pointing_game,
)


@every_measure
def test_random_maps_score_what_chance_does(name: str) -> None:
    """The pixels of one map in random places, for one mask."""
    measure, _ = MEASURES[name]
    trials, height, width = 4000, 8, 8
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[2:5, 1:6] = True
    values = torch.randn(height * width)
    maps = torch.stack([values[torch.randperm(height * width)] for _ in range(trials)]).unflatten(1, (height, width))
    found = measure(maps, mask.expand_as(maps))
    error = float(found.values.std()) / math.sqrt(trials)
    chance = float(found.chance.mean())
    assert found.chance.std() < 1e-6
    # the expected intersection stands in for that of each map, and the fraction is convex in it
    convexity = 0.02 if name.startswith(("iou", "mass")) else 0.0
    assert -4 * error <= float(found.values.mean()) - chance <= 4 * error + convexity
    assert 0 < chance < 1
    assert error > 0 or name == "mass 1"


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_the_chance_level_of_an_overlap_is_just_below_its_expectation(mass: float) -> None:
    maps, masks = pairs(8, 24, 32)
    chance = iou_at_mass(maps, masks, mass).chance
    pixels = 24 * 32
    for s, a, level in zip(maps.double(), masks, chance.tolist(), strict=True):
        ordered = s.clamp(min=0).flatten().sort(descending=True).values
        size, area = 1 + int((ordered.cumsum(0) < mass * ordered.sum()).sum()), int(a.sum())
        inside = np.arange(min(size, area) + 1)
        overlap = inside / (size + area - inside)
        expected = (hypergeom(pixels, area, size).pmf(inside) * overlap).sum()
        assert expected - 0.003 < level < expected


def test_the_chance_level_of_other_measures() -> None:
    maps, masks = pairs()
    area = masks.flatten(1).float().mean(1)
    for name in BY_AREA:
        torch.testing.assert_close(MEASURES[name][0](maps, masks).chance, area)
    for tolerance in (1, 2, 2.5, 3.7, 40):
        expected = [dilated(a.numpy(), tolerance).mean() for a in masks]
        assert pointing_game(maps, masks, tolerance).chance.tolist() == pytest.approx(expected)
    assert set(pixel_auroc(maps, masks).chance.tolist()) == {0.5}
    precision = pixel_average_precision(*pairs(4, 100, 120))
    torch.testing.assert_close(precision.chance, energy_in_mask(*pairs(4, 100, 120)).chance, atol=0.02, rtol=0)


def test_the_chance_level_of_average_precision_over_all_orders() -> None:
    every = torch.cartesian_prod(*[torch.arange(5.0)] * 5)
    orders = every[(every.sort(1).values == torch.arange(5.0)).all(1)][:, None]
    assert len(orders) == 120
    for area in (1, 2, 4):
        masks = (torch.arange(5) < area).expand_as(orders)
        found = pixel_average_precision(orders, masks)
        assert float(found.values.mean()) == pytest.approx(float(found.chance[0]), abs=1e-6)
        assert float(found.chance[0]) > area / 5
