"""Penalties that make weights exactly zero, and their proximal operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

PenaltyName = Literal["l1", "group"]


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Move every entry towards zero by ``threshold``, and no further: the proximal operator of the l1 norm.

    Args:
        x: Any shape.
        threshold: At least 0; a number or anything that broadcasts.

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2., 0., -1.])
    """
    # a difference, where sign times size would leave negative zeros
    return x - torch.clamp(x, -threshold, threshold)  # type: ignore[arg-type]


def group_soft_threshold(x: Tensor, threshold: float | Tensor, dim: int = 1, groups: Tensor | None = None) -> Tensor:
    """Shorten every group by ``threshold``, and no further: the proximal operator of the sum of the groups' 2-norms.

    A group is all that shares an index of a dimension: a column of a head's weights, which is a concept for all
    classes. A group of length zero stays zero.

    Args:
        x: Any shape.
        threshold: At least 0; a number or one a group.
        dim: The dimension that tells the groups apart.
        groups: ``[x.shape[dim]]`` int64, the group of each index where several indices form one (an embedding).

    Example:
        >>> group_soft_threshold(torch.tensor([[3.0, 0.0], [4.0, 0.0]]), 1.0)
        tensor([[2.4000, 0.0000],
                [3.2000, 0.0000]])
    """
    norms = group_norms(x, dim, groups)
    scale = (norms - threshold).clamp(min=0.0) / norms.clamp(min=torch.finfo(x.dtype).tiny)
    shape = [1] * x.ndim
    shape[dim] = -1
    return x * (scale if groups is None else scale[groups.to(x.device)]).view(shape)


def group_norms(x: Tensor, dim: int = 1, groups: Tensor | None = None) -> Tensor:
    """``[G]`` 2-norm of each group; arguments as in `group_soft_threshold`."""
    others = [d for d in range(x.ndim) if d != dim % x.ndim]
    if not others:
        squares = x.square()
        return (
            x.abs() if groups is None else squares.new_zeros(int(groups.max()) + 1).index_add(0, groups, squares).sqrt()
        )
    if groups is None:
        norms: Tensor = torch.linalg.vector_norm(x, dim=others)
        return norms
    squares = x.square().sum(others)
    return squares.new_zeros(int(groups.max()) + 1).index_add(0, groups.to(x.device), squares).sqrt()


class Face(NamedTuple):
    """Where a penalty is smooth around some weights: as long as these stay on one side of zero, and the others zero.

    Attributes:
        free: Bool, the weights that may move.
        gradient: Of the penalty, by all weights.
        curvature: Its second derivative by each of them.
        signed: Whether the weights must keep their signs.
    """

    free: Tensor
    gradient: Tensor
    curvature: float
    signed: bool


class Penalty(ABC):
    """A convex penalty ``strength * p(W)`` of weights ``W``.

    Methods take the strength (the lambda of the literature) beside the weights, so that one object serves a whole path.
    """

    @abstractmethod
    def value(self, weight: Tensor) -> Tensor:
        """``p(W)``, a scalar."""

    @abstractmethod
    def prox(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """The ``V`` that minimises ``strength * p(V) + |V - W|^2 / 2``; a strength an entry is allowed."""

    @abstractmethod
    def residual(self, weight: Tensor, gradient: Tensor, strength: float) -> Tensor:
        """By how much the optimality conditions of ``loss + strength * p`` are missed, the largest over all entries.

        Args:
            weight: Where.
            gradient: Of the loss, at ``weight``.
            strength: At least 0.
        """

    @abstractmethod
    def null_strength(self, gradient: Tensor) -> float:
        """The smallest strength at which ``W = 0`` is optimal, given the gradient of the loss at 0."""

    def face(self, weight: Tensor) -> Face | None:
        """Where the penalty is a parabola around ``weight``, for Newton steps; None, the default, where it never is."""
        return None


class ElasticNet(Penalty):
    """``alpha * |W|_1 + (1 - alpha) / 2 * |W|_2^2`` (Zou and Hastie 2005).

    Args:
        alpha: Share of the l1 norm, in [0, 1].

    Raises:
        ValueError: ``alpha`` lies outside [0, 1].

    Example:
        >>> ElasticNet(alpha=1.0).prox(torch.tensor([3.0, -0.5]), 1.0)
        tensor([2., 0.])
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a share of the l1 norm in [0, 1], got {alpha}")
        self.alpha = alpha

    def value(self, weight: Tensor) -> Tensor:
        """The penalty."""
        return self.alpha * weight.abs().sum() + (1 - self.alpha) / 2 * weight.square().sum()

    def prox(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """Soft threshold, then shrink."""
        return soft_threshold(weight, strength * self.alpha) / (1 + strength * (1 - self.alpha))

    def residual(self, weight: Tensor, gradient: Tensor, strength: float) -> Tensor:
        """Distance of the negative gradient from the subdifferential, the largest over all entries."""
        pull, l1 = gradient + strength * (1 - self.alpha) * weight, strength * self.alpha
        at_zero = (pull.abs() - l1).clamp(min=0.0)
        return torch.where(weight == 0, at_zero, (pull + l1 * weight.sign()).abs()).max()

    def null_strength(self, gradient: Tensor) -> float:
        """The largest entry of the gradient over ``alpha`` (at least .001, as glmnet does for a ridge)."""
        return float(gradient.abs().max()) / max(self.alpha, 1e-3)

    def face(self, weight: Tensor) -> Face:
        """The non-zero weights, with their signs."""
        ridge = 1 - self.alpha
        return Face(weight != 0, self.alpha * weight.sign() + ridge * weight, ridge, self.alpha > 0)


class GroupElasticNet(Penalty):
    """``alpha * sum_k |W_k|_2 + (1 - alpha) / 2 * |W|_2^2`` over groups ``W_k`` (Yuan and Lin 2006).

    Whole groups become zero: with the columns of a head as groups, a concept goes for all classes at once.

    Args:
        alpha: Share of the group norms, in [0, 1].
        dim: See `group_soft_threshold`.
        groups: See `group_soft_threshold`.

    Raises:
        ValueError: ``alpha`` lies outside [0, 1].

    Example:
        >>> GroupElasticNet().prox(torch.tensor([[3.0, 0.1], [4.0, 0.2]]), 1.0)
        tensor([[2.4000, 0.0000],
                [3.2000, 0.0000]])
    """

    def __init__(self, alpha: float = 1.0, dim: int = 1, groups: Tensor | None = None) -> None:
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a share of the group norms in [0, 1], got {alpha}")
        self.alpha, self.dim, self.groups = alpha, dim, groups

    def value(self, weight: Tensor) -> Tensor:
        """The penalty."""
        return self.alpha * self._norms(weight).sum() + (1 - self.alpha) / 2 * weight.square().sum()

    def prox(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """Shorten the groups, then shrink; of strengths that differ within a group their harmonic mean counts.

        An entry without a gradient, whose step an optimizer may let grow without bound, does not drag its group along.
        """
        if isinstance(strength, Tensor) and strength.ndim:
            strength = self._group_mean(strength.expand_as(weight))
        scale = self._spread(1 + torch.as_tensor(strength, dtype=weight.dtype) * (1 - self.alpha), weight)
        return group_soft_threshold(weight, strength * self.alpha, self.dim, self.groups) / scale

    def residual(self, weight: Tensor, gradient: Tensor, strength: float) -> Tensor:
        """2-norm of what misses the subdifferential, the largest over all groups."""
        pull, l1 = gradient + strength * (1 - self.alpha) * weight, strength * self.alpha
        norms = self._norms(weight)
        unit = weight / self._spread(norms.clamp(min=torch.finfo(weight.dtype).tiny), weight)
        at_zero = (self._norms(pull) - l1).clamp(min=0.0)
        return torch.where(norms == 0, at_zero, self._norms(pull + l1 * unit)).max()

    def null_strength(self, gradient: Tensor) -> float:
        """The largest norm of a group of the gradient over ``alpha``."""
        return float(self._norms(gradient).max()) / max(self.alpha, 1e-3)

    def _norms(self, x: Tensor) -> Tensor:
        return group_norms(x, self.dim, self.groups)

    def _spread(self, by_group: Tensor, like: Tensor) -> Tensor:
        """A number a group, shaped to broadcast over the weights."""
        if by_group.ndim == 0:
            return by_group
        shape = [1] * like.ndim
        shape[self.dim] = -1
        return (by_group if self.groups is None else by_group[self.groups.to(by_group.device)]).view(shape)

    def _group_mean(self, x: Tensor) -> Tensor:
        others = [d for d in range(x.ndim) if d != self.dim % x.ndim]
        means = x.reciprocal().mean(others) if others else x.reciprocal()
        if self.groups is None:
            return means.reciprocal()
        zeros = means.new_zeros(int(self.groups.max()) + 1)
        groups = self.groups.to(means.device)
        counts = zeros.index_add(0, groups, torch.ones_like(means))
        return counts / zeros.index_add(0, groups, means)


class KeptRidge(Penalty):
    """``|W|_2^2 / 2`` with every weight outside a mask fixed at zero: refits the kept weights of a sparse solution.

    Args:
        mask: Bool, of the shape of the weights; True is kept.

    Example:
        >>> KeptRidge(torch.tensor([True, False])).prox(torch.tensor([2.0, 2.0]), 1.0)
        tensor([1., 0.])
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def value(self, weight: Tensor) -> Tensor:
        """The penalty."""
        return weight.square().sum() / 2

    def prox(self, weight: Tensor, strength: float | Tensor) -> Tensor:
        """Shrink what is kept."""
        return weight * self.mask / (1 + strength)

    def residual(self, weight: Tensor, gradient: Tensor, strength: float) -> Tensor:
        """The largest gradient of the sum over the kept entries."""
        return ((gradient + strength * weight) * self.mask).abs().max()

    def null_strength(self, gradient: Tensor) -> float:
        """Infinity, unless the gradient is zero: a ridge alone never reaches zero."""
        return float("inf") if bool((gradient * self.mask).any()) else 0.0

    def face(self, weight: Tensor) -> Face:
        """The kept weights, whatever their signs."""
        return Face(self.mask, weight * self.mask, 1.0, False)


def make_penalty(name: PenaltyName, alpha: float, dim: int = 1, groups: Tensor | None = None) -> Penalty:
    """A penalty by name: `ElasticNet` for ``"l1"``, `GroupElasticNet` for ``"group"``.

    Raises:
        ValueError: There is no such penalty, or ``alpha`` lies outside [0, 1].
    """
    if name not in get_args(PenaltyName):
        raise ValueError(f"penalty: expected one of {get_args(PenaltyName)}, got {name!r}")
    return ElasticNet(alpha) if name == "l1" else GroupElasticNet(alpha, dim, groups)
