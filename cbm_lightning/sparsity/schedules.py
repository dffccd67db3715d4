"""How a number moves over the training: warm-up, ramp and hold."""

from __future__ import annotations

import math
from typing import Literal, get_args

RampName = Literal["constant", "linear", "cosine", "cubic", "exponential"]


def ramp(fraction: float, begin: float, end: float, shape: RampName) -> float:
    """How far a ramp has come: 0 until ``begin``, 1 from ``end`` on.

    Args:
        fraction: Of the training, in [0, 1].
        begin: Where the ramp begins.
        end: Where it ends.
        shape: ``"constant"`` jumps at ``begin``; ``"linear"``; ``"cosine"`` starts and ends slowly; ``"cubic"`` starts
            fast and ends slowly, as in gradual magnitude pruning (Zhu and Gupta 2018).

    Example:
        >>> [ramp(x, 0.25, 0.75, "cubic") for x in (0.1, 0.5, 0.9)]
        [0.0, 0.875, 1.0]
    """
    if fraction < begin:
        return 0.0
    if shape == "constant" or fraction >= end:
        return 1.0
    way = (fraction - begin) / (end - begin)
    match shape:
        case "cosine":
            return (1 - math.cos(math.pi * way)) / 2
        case "cubic":
            return 1 - (1 - way) ** 3
        case _:
            return way


def between(first: float, last: float, fraction: float, begin: float, end: float, shape: RampName) -> float:
    """The number that is ``first`` before a ramp and ``last`` after it.

    Args:
        first: Before the ramp.
        last: After it.
        fraction: See `ramp`.
        begin: See `ramp`.
        end: See `ramp`.
        shape: See `ramp`; ``"exponential"`` moves by equal factors, for which both numbers must be positive.

    Example:
        >>> between(1.0, 0.25, 0.5, 0.0, 1.0, "exponential")
        0.5
    """
    if shape == "exponential":
        return float(first * (last / first) ** ramp(fraction, begin, end, "linear"))
    return first + (last - first) * ramp(fraction, begin, end, shape)


def check_ramp(begin: float, end: float, shape: str, allowed: tuple[str, ...] = get_args(RampName)) -> None:
    """Check what describes a ramp.

    Raises:
        ValueError: The shape is unknown, or not ``0 <= begin <= end <= 1``.
    """
    if shape not in allowed:
        raise ValueError(f"mode: expected one of {allowed}, got {shape!r}")
    if not 0.0 <= begin <= end <= 1.0:
        raise ValueError(f"begin, end: expected shares of the training, 0 <= begin <= end <= 1, got {begin} and {end}")
