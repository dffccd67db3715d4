from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_models import load
from torch import Tensor, nn

from cbm_lightning.saliency.faithfulness import Curve, average_drop, blurred, deletion, insertion, shifted

NAN = float("nan")


@pytest.fixture
def official(shared: Path) -> dict[str, Tensor]:
    return load(shared, "slcbm_faithfulness")


def tiny_network(data: dict[str, Tensor]) -> nn.Module:
    """The network of the fixture, with its weights."""
    layers = {
        "c1": nn.Conv2d(3, 6, 3, padding=1),
        "relu1": nn.ReLU(),
        "c2": nn.Conv2d(6, 8, 3, stride=2, padding=1),
        "relu2": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(8, 4),
    }
    network = nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    prefix = "param__"
    network.load_state_dict({k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)})
    return network


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def identity(logits: Tensor) -> Tensor:
    return logits


def patch_reader(images: Tensor) -> Tensor:
    """Two concepts: the mean of the 2x2 pixels at the top left, and at the bottom right."""
    corners = [images[:, :, :2, :2], images[:, :, -2:, -2:]]
    return 10 * torch.stack([corner.mean((1, 2, 3)) for corner in corners], 1) - 5


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


@pytest.mark.parametrize(("measure", "name"), [(deletion, "del"), (insertion, "ins")])
def test_curves_of_sl_cbm(official: dict[str, Tensor], measure: Callable[..., Curve], name: str) -> None:
    network = tiny_network(official)
    maps, targets = official["del_ins_saliency"], official["del_ins_target"]
    # 16 points of 6 images in batches of 7, which the official code refuses
    curve = measure(
        network,
        official["images"],
        maps,
        torch.arange(6),
        targets,
        step=10,
        substrate="zero",
        activation=softmax,
        batch_size=7,
    )
    torch.testing.assert_close(curve.scores, official[f"{name}_scores_step10_zero"], rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(curve.auc, official[f"{name}_auc_step10_zero"], rtol=2e-3, atol=1e-5)


def shown_shares(data: dict[str, Tensor], image: int) -> Tensor:
    """The maps, brought to [0, 1], that the official code multiplied an image by."""
    return (data[f"masked_images_{image}"] / data["images"][image]).mean(1)


def test_average_drop_of_sl_cbm_where_map_and_concept_match(official: dict[str, Tensor]) -> None:
    network = tiny_network(official)
    active = [row.nonzero()[:, 0] for row in official["active"]]
    maps = torch.cat([shown_shares(official, i) for i in range(6)])
    rows = torch.arange(6).repeat_interleave(2)
    effect = average_drop(network, official["images"], maps, rows, torch.cat(active), batch_size=5)
    found = torch.stack(effect, 1).view(6, 2, 3).mean(1)
    torch.testing.assert_close(found, official["adi_matched_diagonal"], rtol=2e-3, atol=1e-5)
    # averages over all maps and concepts of an image say something else
    mixed = official["OFFICIAL_adi_mean_over_all_pairs"]
    assert not torch.isclose(found[:, 2], mixed[:, 2], rtol=2e-3, atol=1e-5).any()
    assert (~torch.isclose(found[:, 0], mixed[:, 0], rtol=2e-3, atol=1e-5)).sum() == 5


def test_the_official_average_is_the_one_over_maps_of_other_concepts(official: dict[str, Tensor]) -> None:
    network = tiny_network(official)
    for i in range(6):
        active = official["active"][i].nonzero()[:, 0]
        maps = shown_shares(official, i).repeat_interleave(2, 0)
        rows = torch.full((4,), i)
        effect = average_drop(network, official["images"], maps, rows, active.repeat(2))
        full = torch.stack(effect).view(3, 2, 2)
        torch.testing.assert_close(full, official[f"adi_full_{i}"], rtol=2e-3, atol=1e-5)
        mixed = official["OFFICIAL_adi_mean_over_all_pairs"][i]
        torch.testing.assert_close(full.mean((1, 2)), mixed, rtol=2e-3, atol=1e-5)


def test_a_curve_by_hand() -> None:
    images = torch.tensor([[[[1.0, 2.0, 3.0]]], [[[4.0, 5.0, 6.0]]]])
    maps = torch.tensor([[[0.1, 0.3, 0.2]], [[3.0, -1.0, 2.0]], [[0.1, 0.3, 0.2]]])
    total = lambda x: torch.stack([x.sum((1, 2, 3)), -x.sum((1, 2, 3))], 1)  # noqa: E731
    options: dict[str, Any] = {"step": 1, "activation": identity}
    gone = deletion(total, images, maps, index(0, 1, 0), index(0, 0, 1), **options)
    assert gone.scores.T.tolist() == [[6, 4, 1, 0], [15, 11, 5, 0], [-6, -4, -1, 0]]
    assert gone.auc.tolist() == pytest.approx([8 / 3, 23.5 / 3, -8 / 3])
    come = insertion(total, images, maps, index(0, 1, 0), index(0, 0, 1), substrate="zero", **options)
    assert come.scores.T.tolist() == [[0, 2, 5, 6], [0, 4, 10, 15], [0, -2, -5, -6]]
    assert come.auc.tolist() == pytest.approx([10 / 3, 21.5 / 3, -10 / 3])


@pytest.mark.parametrize(
    ("step", "points"), [(1, 25), (5, 6), (7, 5), (23, 3), (24, 2), (100, 2), (None, 5)], ids=lambda x: str(x)
)
def test_steps_need_not_divide_the_image(step: int | None, points: int) -> None:
    images, maps = torch.rand(1, 3, 4, 6), torch.rand(1, 4, 6)
    curve = deletion(lambda x: x.mean((2, 3)), images, maps, index(0), index(2), step=step, activation=identity)
    assert curve.scores.shape == (points, 1)
    assert curve.scores[0].item() == pytest.approx(images[0, 2].mean().item())
    assert curve.scores[-1] == 0


def test_equal_values_go_in_raster_order() -> None:
    images, maps = torch.eye(4).view(4, 1, 2, 2), torch.tensor([[[1.0, 2.0], [1.0, 2.0]]]).repeat(4, 1, 1)
    everything = lambda x: x.sum((2, 3))  # noqa: E731
    curve = deletion(everything, images, maps, torch.arange(4), index(0, 0, 0, 0), step=1, activation=identity)
    # the place of image i is taken in this step: second row is 2, 4, 1, 3
    assert (curve.scores == 1).sum(0).tolist() == [3, 1, 4, 2]


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_a_right_map_collapses_at_once_and_a_shifted_one_does_not(size: tuple[int, int]) -> None:
    images = 0.8 + 0.2 * torch.rand(3, 3, *size)
    maps = torch.zeros(3, *size)
    maps[:2, :2, :2] = 1.0
    maps[2, -2:, -2:] = 1.0
    elsewhere = torch.roll(maps, (3, 4), (1, 2))
    pairs = (torch.arange(3), index(0, 0, 1))
    right = deletion(patch_reader, images, maps, *pairs, step=4)
    wrong = deletion(patch_reader, images, elsewhere, *pairs, step=4)
    assert (right.scores[0] > 0.9).all()
    assert (right.scores[1:] < 0.01).all()
    assert (wrong.scores[1] == right.scores[0]).all()
    assert (right.auc < wrong.auc - 0.1).all()
    come = insertion(patch_reader, images, maps, *pairs, step=4, substrate="zero")
    other = insertion(patch_reader, images, elsewhere, *pairs, step=4, substrate="zero")
    assert (come.scores[1:] > 0.9).all()
    assert (other.scores[1] < 0.01).all()
    assert (come.auc > other.auc + 0.1).all()
    kept, lost = (average_drop(patch_reader, images, m, *pairs) for m in (maps, elsewhere))
    assert kept.drop.tolist() == [0, 0, 0]
    assert (lost.drop > 0.99).all()


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_batches_change_nothing_and_are_never_larger(size: int) -> None:
    images, maps = torch.rand(3, 3, 5, 7), torch.randn(6, 5, 7)
    maps[2] = 1.0
    pairs = (index(0, 2, 1, 1, 0, 2), index(0, 1, 1, 0, 1, 1))
    seen = []

    def score(x: Tensor) -> Tensor:
        seen.append(len(x))
        return patch_reader(x)

    for measure in (deletion, insertion):
        whole = measure(patch_reader, images, maps, *pairs, step=4, batch_size=64)
        seen.clear()
        found = measure(score, images, maps, *pairs, step=4, batch_size=size)
        torch.testing.assert_close(found, whole, equal_nan=True, rtol=1e-6, atol=1e-7)
        # 5 maps that say something, 9 steps and the start
        assert sum(seen) == 5 * 10
        assert max(seen) == min(size, 50)
    whole_effect = average_drop(patch_reader, images, maps, *pairs)
    seen.clear()
    effect = average_drop(score, images, maps, *pairs, batch_size=size)
    torch.testing.assert_close(effect, whole_effect, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert max(seen) <= size
    assert sum(seen) == 3 + 5


@pytest.mark.parametrize("number", [0.0, 3.0, NAN])
def test_a_map_that_says_nothing_is_not_measured(number: float) -> None:
    images, maps = torch.rand(1, 3, 6, 6), torch.rand(3, 6, 6)
    maps[1] = number if number == number else maps[1].where(torch.eye(6) == 0, NAN)
    pairs = (index(0, 0, 0), index(0, 1, 1))
    for curve in (deletion(patch_reader, images, maps, *pairs), insertion(patch_reader, images, maps, *pairs)):
        assert curve.scores.isnan().all(0).tolist() == [False, True, False]
        assert curve.scores.isnan().any(0).tolist() == [False, True, False]
        assert curve.auc.isnan().tolist() == [False, True, False]
    for values in average_drop(patch_reader, images, maps, *pairs):
        assert values.isnan().tolist() == [False, True, False]


def test_no_map_says_anything() -> None:
    images, maps = torch.rand(2, 3, 6, 6), torch.ones(2, 6, 6)
    curve = deletion(patch_reader, images, maps, index(0, 1), index(0, 1))
    assert curve.scores.shape == (7, 2)
    assert curve.auc.isnan().all()
    assert all(values.isnan().all() for values in average_drop(patch_reader, images, maps, index(0, 1), index(0, 1)))


def test_no_pairs() -> None:
    images, maps, none = torch.rand(2, 3, 6, 6), torch.rand(0, 6, 6), index()
    for measure in (deletion, insertion):
        curve = measure(patch_reader, images, maps, none, none)
        assert curve.scores.shape == (7, 0)
        assert curve.auc.shape == (0,)
    assert [values.shape for values in average_drop(patch_reader, images, maps, none, none)] == [(0,)] * 3
    assert shifted(maps, torch.Generator()).shape == (0, 6, 6)


def test_what_stands_where_pixels_were_taken() -> None:
    images, maps = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6)
    pairs = (index(0, 1), index(1, 2))
    mean = lambda x: x.mean((2, 3))  # noqa: E731
    colour = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    ends = {"zero": [0.0, 0.0], 0.5: [0.5, 0.5], colour: [0.2, 0.3], "blur": blurred(images).mean((2, 3))[pairs]}
    for substrate, end in ends.items():
        gone = deletion(mean, images, maps, *pairs, substrate=substrate, activation=identity)
        come = insertion(mean, images, maps, *pairs, substrate=substrate, activation=identity)
        torch.testing.assert_close(gone.scores[-1], torch.as_tensor(end))
        torch.testing.assert_close(come.scores[0], torch.as_tensor(end))
        torch.testing.assert_close(gone.scores[0], images.mean((2, 3))[pairs])
        torch.testing.assert_close(come.scores[-1], gone.scores[0])
    default = insertion(mean, images, maps, *pairs, activation=identity)
    assert default.scores[0].equal(come.scores[0])


def test_a_blurred_image() -> None:
    image = torch.zeros(1, 2, 30, 31)
    image[0, 1, 15, 15] = 1.0
    image[0, 0] = 0.7
    blur = blurred(image)
    distance = (torch.arange(30)[:, None] - 15) ** 2 + (torch.arange(31) - 15) ** 2
    kernel = torch.exp(-distance / (2 * 5.0**2))
    kernel[:10], kernel[21:], kernel[:, :10], kernel[:, 21:] = 0.0, 0.0, 0.0, 0.0
    torch.testing.assert_close(blur[0, 1], kernel / kernel.sum())
    # the border is no frame
    torch.testing.assert_close(blur[0, 0], image[0, 0])
    assert blurred(torch.rand(1, 1, 2, 3)).shape == (1, 1, 2, 3)


def test_average_drop_by_hand() -> None:
    images = torch.tensor([[[[2.0, -1.0]]], [[[0.0, 300.0]]]])
    total = lambda x: x.sum((2, 3))  # noqa: E731
    maps = torch.tensor([[[5.0, 1.0]], [[1.0, 5.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    effect = average_drop(total, images, maps, index(0, 0, 1, 1), index(0, 0, 0, 0))
    before, left, right = (torch.tensor(x).sigmoid().item() for x in (1.0, 2.0, -1.0))
    assert effect.drop.tolist() == pytest.approx([0.0, (before - right) / before, 0.5, 0.0])
    assert effect.increase.tolist() == [1.0, 0.0, 0.0, 0.0]
    # what has probability 1 in single precision can gain nothing
    expected = [(left - before) / (1 - before), 0.0, NAN, NAN]
    assert effect.gain.tolist() == pytest.approx(expected, nan_ok=True)
    # and what has probability 0 cannot lose any
    lost = average_drop(total, -images, maps, index(0, 0, 1, 1), index(0, 0, 0, 0)).drop
    assert lost.isnan().tolist() == [False, False, True, True]


def test_shifted_maps_are_the_maps_in_another_place() -> None:
    maps = torch.rand(20, 5, 7)
    moved = shifted(maps, torch.Generator().manual_seed(3))
    offsets = []
    for before, after in zip(maps, moved, strict=True):
        rolls = [(y, x) for y in range(5) for x in range(7) if torch.roll(before, (y, x), (0, 1)).equal(after)]
        assert len(rolls) == 1
        offsets += rolls
    assert len(set(offsets)) > 10
    assert moved.equal(shifted(maps, torch.Generator().manual_seed(3)))
    assert not moved.equal(shifted(maps, torch.Generator().manual_seed(4)))


def test_offsets_are_uniform_over_the_torus() -> None:
    maps = torch.zeros(6000, 3, 4)
    maps[:, 0, 0] = 1.0
    shares = shifted(maps, torch.Generator().manual_seed(0)).mean(0)
    # four standard deviations of a share of 1/12 in 6000 draws
    torch.testing.assert_close(shares, torch.full((3, 4), 1 / 12), rtol=0, atol=0.0143)


def test_shifting_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    shifted(torch.rand(0, 4, 4), torch.Generator())
    shifted(torch.ones(5, 4, 4), torch.Generator())
    assert torch.get_rng_state().equal(state)


def test_under_inference_mode_and_with_a_model_that_learns() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    images, maps, pairs = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6), (index(0, 1), index(1, 0))
    for measure in (deletion, insertion, average_drop):
        here = measure(network, images, maps, *pairs)
        assert not any(values.requires_grad for values in here)
        with torch.inference_mode():
            there = measure(network, images, maps, *pairs)
        assert all(a.equal(b) for a, b in zip(here, there, strict=True))
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


@pytest.mark.parametrize(
    ("images", "logits", "result"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_precision(images: torch.dtype, logits: torch.dtype, result: torch.dtype) -> None:
    x, maps, pairs = torch.rand(2, 3, 6, 6).to(images), torch.rand(2, 6, 6), (index(0, 1), index(1, 0))
    for measure in (deletion, insertion, average_drop):
        found = measure(lambda x: patch_reader(x).to(logits), x, maps, *pairs)
        assert {values.dtype for values in found} == {result}
        assert not any(values.isnan().any() for values in found)


def test_sigmoids_are_taken_in_single_precision() -> None:
    x, maps, pairs = torch.rand(2, 3, 6, 6), torch.rand(2, 6, 6), (index(0, 1), index(1, 0))
    half = lambda x: patch_reader(x).bfloat16()  # noqa: E731
    expected = half(x).float().sigmoid()[pairs]
    assert deletion(half, x, maps, *pairs).scores[0].equal(expected)


GOOD: dict[str, Any] = {
    "score": patch_reader,
    "images": torch.rand(2, 3, 6, 6),
    "maps": torch.rand(3, 6, 6),
    "rows": index(0, 1, 1),
    "concepts": index(0, 1, 0),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.rand(3, 6, 6)}, r"^images: expected \[B, C, H, W\], got \[3, 6, 6\]"),
        ({"maps": torch.rand(3, 6, 5)}, r"^maps: expected \[P, 6, 6\], got \[3, 6, 5\]"),
        ({"maps": torch.rand(3, 1, 6, 6)}, r"^maps: expected \[P, 6, 6\]"),
        ({"rows": index(0, 1)}, r"^rows: expected \[3\], one a map, got \[2\]"),
        ({"rows": index(0, 2, 1)}, "^rows: expected indices below 2, got 2"),
        ({"rows": index(0, -1, 1)}, "^rows: expected no negative index, got -1"),
        ({"concepts": index(0)}, r"^concepts: expected \[3\], one a map, got \[1\]"),
        ({"concepts": index(0, 2, 1)}, "^concepts: expected indices below 2, got 2"),
        ({"concepts": index(0, -3, 1)}, "^concepts: expected no negative index, got -3"),
        ({"score": lambda x: x.mean((1, 2, 3))}, r"^score: expected logits \[\d+, K\] of \d+ images, got \["),
        ({"score": lambda x: patch_reader(x[:1])}, r"^score: expected logits .* got \[1, 2\]"),
        ({"score": lambda x: [x]}, "^score: expected logits .* got list"),
        ({"activation": lambda z: z.amax(1)}, r"^activation: expected \[\d+, 2\] as it was given, got \["),
        ({"batch_size": 0}, "^batch_size: expected a positive number, got 0"),
    ],
)
@pytest.mark.parametrize("measure", [deletion, insertion, average_drop])
def test_bad_input(measure: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**{**GOOD, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 0}, "^step: expected a positive number, got 0"),
        ({"step": -3}, "^step: "),
        ({"substrate": "black"}, "^substrate: expected 'zero', 'blur', .* got 'black'"),
        ({"substrate": torch.zeros(3)}, r"^substrate: expected a tensor \[3, 1, 1\], got \[3\]"),
        ({"substrate": torch.zeros(1, 6, 6)}, "^substrate: "),
    ],
)
@pytest.mark.parametrize("measure", [deletion, insertion])
def test_bad_settings_of_curves(measure: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**GOOD, **changes)


def test_shifting_what_is_no_map() -> None:
    with pytest.raises(ValueError, match=r"^maps: expected \[P, H, W\], got \[2, 1, 4, 4\]"):
        shifted(torch.rand(2, 1, 4, 4), torch.Generator())
