"""Which maps are measured: those of concepts that are to be seen, in the resolution of their masks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate
from torch.testing import assert_close

from cbm_lightning.saliency import upsample, visible_pairs

NAN = float("nan")


def masks_of(batch: int = 2, concepts: int = 3, size: int = 8) -> torch.Tensor:
    """Masks of which the first concept of the first image and the last of the last are to be seen."""
    masks = torch.zeros(batch, concepts, size, size)
    masks[0, 0, 1:3, 2:5] = 1
    masks[-1, -1, 7, 0] = 1
    return masks


def test_pairs_in_the_resolution_of_the_masks() -> None:
    maps = torch.randn(2, 3, 4, 4)
    rows, concepts = torch.tensor([0, 1]), torch.tensor([0, 2])
    for masks in (masks_of(), masks_of().bool(), masks_of().to(torch.uint8), 0.51 * masks_of()):
        pairs = visible_pairs(maps, masks)
        assert torch.equal(pairs.rows, rows)
        assert torch.equal(pairs.concepts, concepts)
        assert pairs.masks.dtype == torch.bool
        assert torch.equal(pairs.masks, masks_of().bool()[rows, concepts])
        assert_close(pairs.maps, upsample(maps, (8, 8))[rows, concepts])


def test_maps_of_that_resolution_stay_as_they_are() -> None:
    maps = torch.randn(2, 3, 8, 8)
    assert torch.equal(visible_pairs(maps, masks_of()).maps, maps[[0, 1], [0, 2]])
    assert upsample(maps, (8, 8)) is maps


def test_masks_that_are_empty_or_unknown_make_no_pair() -> None:
    masks = masks_of()
    masks[0, 1] = NAN
    masks[0, 2] = 0.5
    masks[1, 2, :4] = NAN
    pairs = visible_pairs(torch.rand(2, 3, 4, 4), masks)
    assert list(zip(pairs.rows.tolist(), pairs.concepts.tolist(), strict=True)) == [(0, 0), (1, 2)]
    assert pairs.masks[1].sum() == 1
    for nothing in (torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), NAN), torch.zeros(0, 3, 8, 8)):
        none = visible_pairs(torch.rand(len(nothing), 3, 4, 4), nothing)
        assert none.maps.shape == none.masks.shape == (0, 8, 8)
        assert none.rows.shape == none.concepts.shape == (0,)


def test_only_pairs_that_count() -> None:
    counted = torch.tensor([[True, True, True], [True, True, False]])
    pairs = visible_pairs(torch.rand(2, 3, 4, 4), masks_of(), counted)
    assert (pairs.rows.tolist(), pairs.concepts.tolist()) == ([0], [0])
    pairs = visible_pairs(torch.rand(2, 3, 4, 4), masks_of(), ~counted)
    assert (pairs.rows.tolist(), pairs.concepts.tolist()) == ([1], [2])


@pytest.mark.parametrize(
    ("maps", "masks"),
    [((2, 3, 4, 4), (2, 2, 8, 8)), ((2, 3, 4, 4), (1, 3, 8, 8)), ((2, 3, 4), (2, 3, 8)), ((2, 3, 4, 4), (2, 8, 8))],
)
def test_maps_and_masks_of_other_images_or_concepts(maps: tuple[int, ...], masks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"maps, masks: expected \[B, K, h, w\] and \[B, K, H, W\], got \[2, 3, 4"):
        visible_pairs(torch.rand(maps), torch.rand(masks))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_upsampling_of_any_number_of_maps(mode: str) -> None:
    maps = torch.randn(2, 3, 4, 5)
    expected = interpolate(maps, (9, 16), mode=mode, align_corners=False)
    assert_close(upsample(maps, (9, 16), mode), expected)
    assert_close(upsample(maps[0, 1], (9, 16), mode), expected[0, 1])
    assert_close(upsample(maps[None], (9, 16), mode), expected[None])
    assert upsample(maps[:0], (9, 16), mode).shape == (0, 3, 9, 16)


def test_what_modes_do_to_values() -> None:
    maps = torch.tensor([[0.0, 0.0, 1.0, 0.0]]).expand(4, 4)
    assert set(upsample(maps, (8, 8), "nearest").flatten().tolist()) == {0.0, 1.0}
    bilinear = upsample(maps, (8, 8))
    assert bilinear.min() >= 0
    assert bilinear.max() < 1
    bicubic = upsample(maps, (8, 8), "bicubic")
    assert bicubic.min() < -0.01
    # the middle of a cell, not its corner, is where its value is
    assert_close(upsample(maps, (12, 12))[:, 7], torch.ones(12))


def test_maps_in_half_precision_become_float() -> None:
    maps = torch.randn(1, 2, 4, 4)
    assert_close(upsample(maps.bfloat16(), (8, 8)), upsample(maps.bfloat16().float(), (8, 8)))


def test_maps_in_double_precision_stay_double() -> None:
    maps = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert upsample(maps, (8, 8)).dtype == torch.float64
    assert_close(upsample(maps, (8, 8)), interpolate(maps, (8, 8), mode="bilinear", align_corners=False))
