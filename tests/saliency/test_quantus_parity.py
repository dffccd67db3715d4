"""Localisation as official code measures it: Quantus, SL-CBM, and formulas that no code was found for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import load
from torch import Tensor

from cbm_lightning.saliency.localisation import (
    Overlap,
    energy_in_mask,
    half_max_overlap,
    iou_at_mass,
    keypoint_distance,
    pixel_auroc,
    pointing_game,
    rank_accuracy,
    top_k_intersection,
)

CLOSE = {"rtol": 0, "atol": 1e-6, "equal_nan": True}


@pytest.fixture
def quantus(shared: Path) -> dict[str, Tensor]:
    return load(shared, "quantus_localisation")


@pytest.fixture
def sl_cbm(shared: Path) -> dict[str, Tensor]:
    return load(shared, "slcbm_faithfulness")


@pytest.fixture
def derived(shared: Path) -> dict[str, Tensor]:
    return load(shared, "derived_formula_only")


def test_the_measures_of_quantus(quantus: dict[str, Tensor]) -> None:
    maps, masks = quantus["attribution"][:, 0], quantus["mask"][:, 0].bool()
    found = {
        "pointing_game": pointing_game(maps, masks),
        "relevance_mass_accuracy_positive": energy_in_mask(maps, masks),
        "attribution_localisation_positive": energy_in_mask(maps, masks),
        "relevance_rank_accuracy": rank_accuracy(maps, masks),
        "topk_intersection_5": top_k_intersection(maps, masks, 5),
        "topk_intersection_20": top_k_intersection(maps, masks, 20),
        "auc": pixel_auroc(maps, masks),
    }
    for name, scores in found.items():
        torch.testing.assert_close(scores.values, quantus[name], **CLOSE)


def test_signed_mass_is_not_reproduced(quantus: dict[str, Tensor]) -> None:
    """Negative saliency in the denominator leads out of [0, 1]."""
    signed = quantus["relevance_mass_accuracy_signed"]
    assert signed.min() < -5
    assert signed.max() > 1.1
    shares = energy_in_mask(quantus["attribution"][:, 0], quantus["mask"][:, 0]).values
    assert shares.min() >= 0
    assert shares.max() <= 1


def test_an_empty_mask_is_no_hit_as_in_quantus(quantus: dict[str, Tensor]) -> None:
    maps, masks = quantus["attribution"][:, 0], quantus["mask_with_empty_first"][:, 0]
    assert not masks[0].any()
    official, found = quantus["OFFICIAL_BUG_pointing_game_empty_mask"], pointing_game(maps, masks)
    assert official[0] == 1
    assert found.values[0].isnan()
    assert found.chance[0].isnan()
    assert torch.equal(found.values[1:], official[1:])
    torch.testing.assert_close(
        rank_accuracy(maps, masks).values, quantus["relevance_rank_accuracy_empty_mask"], **CLOSE
    )


@pytest.mark.parametrize(("kind", "name"), [("iou", "iou"), ("dice", "dice"), ("precision", "prec_iou")])
@pytest.mark.parametrize(("soft", "cut"), [(False, "bin1"), (True, "bin0")])
def test_overlaps_at_half_the_maximum(
    sl_cbm: dict[str, Tensor], kind: Overlap, name: str, soft: bool, cut: str
) -> None:
    found = half_max_overlap(sl_cbm["attribution"][:, 0], sl_cbm["mask"][:, 0], kind, soft)
    torch.testing.assert_close(found.values, sl_cbm[f"{name}__{cut}"], **CLOSE)


def test_shares_and_overlaps_by_formula(derived: dict[str, Tensor]) -> None:
    maps, masks = derived["sal"], derived["mask"]
    torch.testing.assert_close(energy_in_mask(maps, masks).values, derived["epg"], **CLOSE)
    for mass in (0.25, 0.5, 0.75, 0.95):
        torch.testing.assert_close(iou_at_mass(maps, masks, mass).values, derived[f"iou_mass{mass}"], **CLOSE)


def test_distances_by_formula(derived: dict[str, Tensor]) -> None:
    maps, points = derived["sal"], derived["keypoint_rc"].flip(1)
    torch.testing.assert_close(keypoint_distance(maps, points).values, derived["argmax_distance"], **CLOSE)
    # a keypoint is a mask of one pixel
    masks = torch.zeros_like(maps)
    rows, columns = derived["keypoint_rc"].T
    masks[torch.arange(len(maps)), rows, columns] = 1
    assert derived["pointing_tol2"].any()
    assert torch.equal(pointing_game(maps, masks, tolerance=2).values, derived["pointing_tol2"].float())
