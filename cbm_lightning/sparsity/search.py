"""The search for the penalty that leaves a wanted number of effective concepts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

from cbm_lightning.sparsity.problem import Point
from cbm_lightning.sparsity.solution import SparseSolution

# a solution counts as having a level from the level itself up to this share more
TOLERANCE = 0.02
# penalties closer than this share are one: the number of concepts jumps between them
RESOLUTION = 1e-3
# how far to go down where nothing is known of what lies there
STRIDE = 0.5

Solve = Callable[[float, Point], tuple[SparseSolution, Point]]


def find_levels(solve: Solve, levels: Sequence[float], largest: float, eps: float, null: Point) -> list[SparseSolution]:
    """Solve for as few penalties as it takes to meet every level.

    Args:
        solve: The solution for a penalty, from a start.
        levels: Numbers of effective concepts, rising.
        largest: The penalty that allows no weight.
        eps: Smallest share of it to try.
        null: The solution for the largest.

    Returns:
        All solutions on the way. Where the number of concepts jumps over a level, the one above it; the densest where
        even the smallest penalty leaves too few, with a warning.
    """
    tried: dict[float, tuple[float, SparseSolution | None, Point]] = {largest: (0.0, None, null)}

    def attempt(lam: float) -> float:
        nearest = min(tried, key=lambda other: abs(math.log(other / lam)))
        solution, point = solve(lam, tried[nearest][2])
        tried[lam] = (solution.nec, solution, point)
        return solution.nec

    for level in levels:
        while True:
            above = min((lam for lam, (found, *_) in tried.items() if found < level), default=largest)
            dense = [lam for lam, (found, *_) in tried.items() if found >= level and lam < above]
            if not dense:
                if above <= largest * eps:
                    warnings.warn(
                        f"nec: the smallest penalty ({above:.2g}) leaves {tried[above][0]:.4g} concepts a class, "
                        f"fewer than the {level:g} asked for; lower eps or ask for fewer",
                        UserWarning,
                        stacklevel=4,
                    )
                    break
                attempt(max(STRIDE * above, largest * eps))
                continue
            below = max(dense)
            if tried[below][0] <= level * (1 + TOLERANCE) or above / below <= 1 + RESOLUTION:
                break
            attempt(_between(above, tried[above][0], below, tried[below][0], level * (1 + TOLERANCE / 2)))
    return [solution for _, solution, _ in tried.values() if solution is not None]


def _between(above: float, few: float, below: float, many: float, wanted: float) -> float:
    """A penalty between two, where a straight line through their logarithms expects the wanted number."""
    share = 0.5
    if few > 0:
        share = (math.log(wanted) - math.log(few)) / (math.log(many) - math.log(few))
    # away from the ends, so that the bracket shrinks from both sides
    return float(above * (below / above) ** min(max(share, 0.1), 0.9))
