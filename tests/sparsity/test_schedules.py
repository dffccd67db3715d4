"""How far a ramp has come, beside the formulas of the literature."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from cbm_lightning.sparsity.schedules import RampName, between, check_ramp, ramp

SHAPES = get_args(RampName)
# how far each shape has come at a quarter, at half and at three quarters of its way
WAYS = {
    "constant": [1.0, 1.0, 1.0],
    "linear": [0.25, 0.5, 0.75],
    "cosine": [(1 - math.sqrt(0.5)) / 2, 0.5, (1 + math.sqrt(0.5)) / 2],
    "cubic": [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3],
}


@pytest.mark.parametrize("shape", WAYS)
def test_the_way_of_each_shape(shape: RampName) -> None:
    assert [ramp(0.2 + 0.4 * way, 0.2, 0.6, shape) for way in (0.25, 0.5, 0.75)] == pytest.approx(WAYS[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_warm_up_and_hold(shape: RampName) -> None:
    assert [ramp(x, 0.2, 0.6, shape) for x in (0.0, 0.1, 0.1999)] == [0.0, 0.0, 0.0]
    assert [ramp(x, 0.2, 0.6, shape) for x in (0.6, 0.8, 1.0)] == [1.0, 1.0, 1.0]
    steps = [ramp(i / 100, 0.2, 0.6, shape) for i in range(101)]
    assert steps == sorted(steps)
    assert all(0.0 <= way <= 1.0 for way in steps)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ramp_without_a_length_jumps(shape: RampName) -> None:
    assert [ramp(x, 0.3, 0.3, shape) for x in (0.29, 0.3, 0.31)] == [0.0, 1.0, 1.0]
    assert ramp(0.0, 0.0, 0.0, shape) == 1.0


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "constant"])
def test_ramps_have_no_jump(shape: RampName) -> None:
    assert ramp(0.2, 0.2, 0.6, shape) == 0.0
    assert ramp(0.2 + 1e-6, 0.2, 0.6, shape) < 1e-4
    assert ramp(0.6 - 1e-6, 0.2, 0.6, shape) > 1 - 1e-4


def test_between_two_numbers_up_and_down() -> None:
    assert [between(4.0, 1.0, x, 0.0, 1.0, "linear") for x in (0.0, 0.5, 1.0)] == pytest.approx([4.0, 2.5, 1.0])
    assert [between(1.0, 9.0, x, 0.5, 1.0, "constant") for x in (0.4, 0.5, 1.0)] == [1.0, 9.0, 9.0]
    # gradual magnitude pruning: s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3, Zhu and Gupta 2018
    assert between(0.1, 0.9, 0.35, 0.2, 0.7, "cubic") == pytest.approx(0.9 + (0.1 - 0.9) * (1 - 0.15 / 0.5) ** 3)


def test_exponential_moves_by_equal_factors() -> None:
    # the temperature of a Gumbel bottleneck: t_0 (t_f / t_0)^(e / E), then held
    found = [between(1.0, 0.5, x, 0.0, 0.8, "exponential") for x in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    assert found == pytest.approx([0.5 ** (x / 4) for x in (0, 1, 2, 3, 4, 4)])
    assert between(0.5, 8.0, 0.5, 0.0, 1.0, "exponential") == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("begin", "end", "shape", "message"),
    [
        (0.5, 0.4, "linear", "begin, end: expected shares of the training, .* got 0.5 and 0.4"),
        (-0.1, 0.4, "linear", "begin, end: .* got -0.1 and 0.4"),
        (0.1, 1.1, "linear", "begin, end: .* got 0.1 and 1.1"),
        (float("nan"), 1.0, "linear", "begin, end:"),
        (0.0, float("nan"), "linear", "begin, end:"),
        (0.0, 1.0, "square", "mode: expected one of .*'cosine'.*, got 'square'"),
    ],
)
def test_what_is_no_ramp(begin: float, end: float, shape: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_ramp(begin, end, shape)


def test_a_ramp_of_the_whole_training_or_of_nothing() -> None:
    for begin, end in ((0.0, 1.0), (0.0, 0.0), (1.0, 1.0)):
        for shape in SHAPES:
            check_ramp(begin, end, shape)
    with pytest.raises(ValueError, match=r"mode: expected one of \('linear',\), got 'cosine'"):
        check_ramp(0.0, 1.0, "cosine", ("linear",))
