"""How many concepts each class rests on: the number of effective concepts (NEC) and what belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

THRESHOLD = 1e-5
"""A weight counts if it is larger than this, as in the code of VLG-CBM."""


def kept(weight: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """``[L, K]`` bool, which concepts a class rests on.

    Args:
        weight: ``[L, K]``, or ``[L, K, m]`` for concepts of ``m`` numbers, which count where any of these does.
        threshold: Weights count that are larger in size.

    Raises:
        ValueError: The weights have another shape, or are not finite.
    """
    if weight.ndim not in (2, 3) or 0 in weight.shape:
        raise ValueError(f"weight: expected [L, K] or [L, K, m], got {list(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got NaN or infinity")
    large = weight.abs() > threshold
    return large.any(2) if weight.ndim == 3 else large


def nec(weight: Tensor, threshold: float = THRESHOLD) -> float:
    """Number of effective concepts: how many concepts a class rests on, on average (VLG-CBM, Srivastava et al. 2024).

    The size of a weight says how much a concept matters only if concepts are scored on one scale: standardise the
    scores, or compare probabilities. Arguments and errors as in `kept`.

    Example:
        >>> nec(torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 3.0]]))
        1.5
    """
    return float(kept(weight, threshold).sum()) / len(weight)


@dataclass(frozen=True)
class Sparsity:
    """What a head's weights say about how many concepts it needs.

    Attributes:
        nec: Mean number of concepts a class.
        density: Share of weights that are not zero, in [0, 1].
        active_concepts: Concepts that any class rests on.
        max_per_class: Concepts of the class that rests on most.
        empty_classes: Classes that rest on no concept at all.
        per_class: ``[L]`` int64, concepts of each class.
    """

    nec: float
    density: float
    active_concepts: int
    max_per_class: int
    empty_classes: int
    per_class: Tensor

    @classmethod
    def of(cls, weight: Tensor, threshold: float = THRESHOLD) -> Sparsity:
        """Of weights; arguments and errors as in `kept`.

        Example:
            >>> Sparsity.of(torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]])).empty_classes
            1
        """
        used = kept(weight, threshold)
        per_class = used.sum(1)
        return cls(
            nec=float(per_class.sum()) / len(used),
            density=float(used.sum()) / used.numel(),
            active_concepts=int(used.any(0).sum()),
            max_per_class=int(per_class.max()),
            empty_classes=int((per_class == 0).sum()),
            per_class=per_class.cpu(),
        )

    def histogram(self) -> Tensor:
        """``[max_per_class + 1]`` int64, how many classes rest on 0, 1, 2, ... concepts."""
        return torch.bincount(self.per_class, minlength=self.max_per_class + 1)

    def scalars(self) -> dict[str, float]:
        """The numbers worth logging, by name."""
        names = ("nec", "density", "active_concepts", "max_per_class", "empty_classes")
        return {name: float(getattr(self, name)) for name in names}


def clip_levels(levels: Sequence[float], num_concepts: int) -> list[float]:
    """Levels of NEC in rising order, those above the number of concepts replaced by that number.

    Args:
        levels: For example 5, 10, 15, 20, 25 and 30, the protocol of VLG-CBM.
        num_concepts: ``K``.

    Raises:
        ValueError: There are none, or one is not positive.

    Example:
        >>> clip_levels([5, 10, 30], num_concepts=18)
        [5, 10, 18]
    """
    if not levels or min(levels) <= 0:
        raise ValueError(f"levels: expected one or more positive numbers of effective concepts, got {list(levels)}")
    return sorted({min(level, num_concepts) for level in levels})
