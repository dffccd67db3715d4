"""What a batch knows of where its concepts are."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from cbm_lightning.saliency.evidence import Evidence, read_evidence

NAN = float("nan")
HEIGHT, WIDTH = 8, 10


def read(batch: dict[str, Any], concepts: int = 1, images: int = 1) -> Evidence:
    return read_evidence({"image": torch.zeros(images, 3, HEIGHT, WIDTH), **batch}, concepts)


def boxed(*boxes: tuple[float, float, float, float], dtype: torch.dtype = torch.float32) -> Tensor:
    """``[K, H, W]`` the masks of boxes in one image."""
    masks = read({"concept_boxes": torch.tensor([boxes], dtype=dtype)}, len(boxes)).masks
    assert masks is not None
    return masks[0]


def pointed(*points: tuple[float, float]) -> Evidence:
    """The points of an image as they were read."""
    return read({"concept_points": torch.tensor([points])}, len(points))


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    shown = torch.rand(2, 3, HEIGHT, WIDTH) < 0.3
    given = shown.to(dtype)
    masks = read({"concept_masks": given}, 3, images=2).masks
    assert masks.dtype == torch.bool
    assert torch.equal(masks, shown)
    assert torch.equal(given, shown.to(dtype))


def test_masks_in_bytes_and_shares() -> None:
    shown = torch.rand(1, 2, HEIGHT, WIDTH) < 0.3
    assert torch.equal(read({"concept_masks": shown.byte() * 255}, 2).masks, shown)
    shares = torch.tensor([0.0, 0.49, 0.5, 0.51, 1.0, NAN]).repeat_interleave(HEIGHT * WIDTH)
    masks = read({"concept_masks": shares.reshape(1, 6, HEIGHT, WIDTH)}, 6).masks
    assert masks.flatten(2).all(2).tolist() == [[False, False, False, True, True, False]]
    assert masks.flatten(2).any(2).tolist() == [[False, False, False, True, True, False]]


def test_masks_of_another_size_are_resized_with_a_warning() -> None:
    small = torch.rand(1, 2, HEIGHT // 2, WIDTH // 2) < 0.4
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    wrong = r"concept_masks are \[4, 5\] pixels and images \[8, 10\]: the masks are resized to the nearest pixel"
    for given in (small, small.float().masked_fill(~small, NAN), small.byte()):
        with pytest.warns(UserWarning, match=wrong):
            assert torch.equal(read({"concept_masks": given}, 2).masks, large)
    thrice = large.repeat_interleave(3, 2).repeat_interleave(3, 3)
    with pytest.warns(UserWarning, match=r"\[24, 30\] pixels"):
        assert torch.equal(read({"concept_masks": thrice}, 2).masks, large)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read({"concept_masks": large}, 2)


# ---------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "box",
    [
        (2, 3, 5, 7),
        (0, 0, WIDTH, HEIGHT),
        (1.6, 0.4, 3.4, 0.6),
        (-4, -2, 3, 2),
        (7, 5, 99, 99),
        (-50, 2.6, 50, 3.4),
        (4, 4, 4, 6),
        (5, 5, 3, 7),
        (20, 1, 30, 4),
        (2, -torch.inf, 4, torch.inf),
        (NAN, NAN, NAN, NAN),
        (2, 3, NAN, 7),
    ],
)
def test_a_box_holds_the_pixels_whose_centres_lie_in_it(box: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = box
    mask = boxed(box)[0]
    for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
        assert bool(mask[y, x]) == (x0 < x + 0.5 < x1 and y0 < y + 0.5 < y1), (x, y)


def test_the_far_edges_of_a_box_are_not_included() -> None:
    mask = boxed((2, 3, 5, 7))[0]
    assert mask.nonzero().amin(0).tolist() == [3, 2]
    assert mask.nonzero().amax(0).tolist() == [6, 4]
    assert int(mask.sum()) == 12


def test_boxes_of_any_type_and_of_several_concepts() -> None:
    several = [(2, 3, 5, 7), (0, 0, 1, 1), (6, 1, 9, 2)]
    expected = boxed(*several)
    assert [int(mask.sum()) for mask in expected] == [12, 1, 3]
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        assert torch.equal(boxed(*several, dtype=dtype), expected)


# ---------------------------------------------------------------- points


def test_points_outside_the_image_are_not_seen() -> None:
    inside = [(0.0, 0.0), (9.0, 7.0), (-0.5, -0.5), (9.25, 7.25), (4.5, 3.25)]
    assert torch.equal(pointed(*inside).points, torch.tensor([inside]))
    outside = [(-0.75, 3), (3, -1), (9.75, 3), (3, 7.75), (torch.inf, 3), (3, -torch.inf), (NAN, 3), (3, NAN)]
    found = pointed(*outside)
    assert found.points.isnan().any(2).all()
    assert not found.shown().any()


def test_the_far_edge_of_an_image_lies_outside() -> None:
    """As `concept_location` counts, which refuses points outside: the pixel that holds a point is the nearest."""
    assert not pointed((9.5, 3.0), (3.0, 7.5)).shown().any()


def test_points_of_any_type() -> None:
    given = torch.tensor([[[3, 4], [12, 4]]])
    for dtype in (torch.int64, torch.float64, torch.bfloat16):
        points = read({"concept_points": given.to(dtype)}, 2).points
        assert points.dtype == torch.float32
        assert points[0, 0].tolist() == [3.0, 4.0]
        assert points[0, 1].isnan().all()


# ---------------------------------------------------------------- together


def test_what_is_shown() -> None:
    masks = torch.zeros(1, 3, HEIGHT, WIDTH)
    masks[0, 0, 2, 3] = 1
    points = torch.tensor([[[NAN, NAN], [4.0, NAN], [4.0, 4.0]]])
    assert read({"concept_masks": masks}, 3).shown().tolist() == [[True, False, False]]
    assert read({"concept_points": points}, 3).shown().tolist() == [[False, False, True]]
    both = read({"concept_masks": masks, "concept_points": points}, 3)
    assert both.shown().tolist() == [[True, False, True]]
    nothing = read({}, 3)
    assert nothing == Evidence(None, None)
    assert nothing.shown() is None


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"concept_masks": torch.zeros(1, 3, 8, 10)}, r"concept_masks: .* \[1, 2, H, W\], got \[1, 3, 8, 10\]"),
        ({"concept_masks": torch.zeros(2, 2, 8, 10)}, r"concept_masks: .* \[1, 2, H, W\], got \[2, 2, 8, 10\]"),
        ({"concept_masks": torch.zeros(1, 8, 10)}, r"concept_masks: .* \[1, 2, H, W\], got \[1, 8, 10\]"),
        ({"concept_masks": [1, 2]}, r"concept_masks: expected a tensor \[1, 2, H, W\], got list"),
        ({"concept_boxes": torch.zeros(1, 2, 5)}, r"concept_boxes: .* \[1, 2, 4\], got \[1, 2, 5\]"),
        ({"concept_boxes": torch.zeros(1, 3, 4)}, r"concept_boxes: .* \[1, 2, 4\], got \[1, 3, 4\]"),
        ({"concept_points": torch.zeros(1, 2, 3)}, r"concept_points: .* \[1, 2, 2\], got \[1, 2, 3\]"),
        ({"concept_points": torch.zeros(2)}, r"concept_points: .* \[1, 2, 2\], got \[2\]"),
        (
            {"concept_masks": torch.zeros(1, 2, 8, 10), "concept_boxes": torch.zeros(1, 2, 4)},
            "concept_masks, concept_boxes: expected one of them, got both",
        ),
    ],
)
def test_what_does_not_fit_is_named(batch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(batch, 2)
