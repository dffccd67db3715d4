"""A convex solver, batched: the concept loss within a confidence region, on one side of the prediction."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# where on the central path to start, in units in which slopes are about 1; higher is safer and slower
START = 100.0
# 15 to 30 are usual
ITERATIONS = 60
TOLERANCE = 1e-8


@dataclass(frozen=True)
class Region:
    """Minimise the concept loss over ``u >= 0`` with ``|whiten u| <= 1``, where ``eta = start + step u``.

    Attributes:
        start: ``[B, n]`` predicted logits.
        step: ``[B, n]`` standard deviations, with the sign of the side.
        whiten: ``[B, n, n]``, zero in columns that are not valid.
        target: ``[B, n]`` in [0, 1].
        valid: ``[B, n]`` bool; the other entries are padding.
    """

    start: Tensor
    step: Tensor
    whiten: Tensor
    target: Tensor
    valid: Tensor

    def derivatives(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature of the loss in each coordinate, ``[B, n]``; 0 in the padding."""
        logits = self.start + self.step * u
        absent, present = (-logits).sigmoid(), logits.sigmoid()
        # sigmoid(eta) - c without cancellation where it is tiny
        slope = (1.0 - self.target) * present - self.target * absent
        return self.step * slope * self.valid, self.step.square() * absent * present * self.valid

    def cone(self, u: Tensor) -> Tensor:
        """``[B, 1 + n]`` inside the second-order cone where ``u [B, n]`` is inside the region."""
        return torch.cat([torch.ones_like(u[:, :1]), times(self.whiten, u)], -1)

    def solve(self) -> Tensor:
        """``[B, n]`` the best point; where double precision does not suffice, the last feasible one."""
        tiny = torch.finfo(self.step.dtype).tiny
        u = 0.5 / self.whiten.sum(-1).norm(dim=-1, keepdim=True).clamp(min=tiny)
        u = torch.where(self.valid, u, 1.0)
        # losses of well predicted concepts are tiny: in units of their slopes, one tolerance fits all
        scale = torch.maximum(*(x.abs().amax(-1, keepdim=True) for x in self.derivatives(torch.zeros_like(u))))
        iterate = Iterate(self, scale.clamp(min=tiny), u, START / u * self.valid, START * inverse(self.cone(u)))
        for _ in range(ITERATIONS):
            unsolved = iterate.error() > TOLERANCE
            if not unsolved.any():
                break
            iterate = iterate.improved(unsolved)
        return iterate.u


@dataclass(frozen=True)
class Iterate:
    """A point of a primal-dual interior point method with Nesterov-Todd scaling; ``u`` is always feasible.

    Attributes:
        region: The problem.
        scale: ``[B, 1]`` unit of the loss.
        u: ``[B, n]``, strictly inside.
        sides: ``[B, n]`` multipliers of ``u >= 0``, positive, 0 in the padding.
        bound: ``[B, 1 + n]`` multiplier of the region, strictly inside the cone.
    """

    region: Region
    scale: Tensor
    u: Tensor
    sides: Tensor
    bound: Tensor

    def gap(self) -> Tensor:
        """``[B, 1]`` how much better the optimum can be, once the slopes balance."""
        return dot(self.sides, self.u) + dot(self.bound, self.region.cone(self.u))

    def error(self) -> Tensor:
        """``[B, 1]`` by how much the optimality conditions fail."""
        slope = self.region.derivatives(self.u)[0] / self.scale
        slope = slope - self.sides - times(self.region.whiten.mT, self.bound[:, 1:])
        return torch.maximum(slope.abs().amax(-1, keepdim=True), self.gap())

    def improved(self, rows: Tensor) -> Iterate:
        """One Newton step in ``rows [B, 1]``, aimed further the more room a step straight to the optimum has."""
        centre = self.gap() / (self.region.valid.sum(-1, keepdim=True) + 1)
        newton = Newton.at(self)
        room = newton.direction(torch.zeros_like(centre))[-1]
        u, sides, bound, room = newton.direction(centre * (1.0 - room).clamp(min=0.2))
        # a row whose system cannot be solved in double precision stays at its last point
        length = torch.where(rows & u.isfinite().all(-1, keepdim=True), (0.99 * room).clamp(max=1.0), 0.0)

        def moved(x: Tensor, change: Tensor) -> Tensor:
            return torch.where(length > 0, x + length * change, x)

        return replace(self, u=moved(self.u, u), sides=moved(self.sides, sides), bound=moved(self.bound, bound))


@dataclass(frozen=True)
class Newton:
    """The linear system of an iterate, factorised.

    Attributes:
        iterate: Where.
        primal: ``[B, 1 + n]`` its point of the cone.
        middle: ``[B, 1 + n]`` unit vector between ``primal`` and the multiplier, of the Nesterov-Todd scaling.
        stretch: ``[B, 1]`` by which they differ in length.
        slope: ``[B, n]`` of the loss.
        factor: ``[B, n, n]`` Cholesky factor.
    """

    iterate: Iterate
    primal: Tensor
    middle: Tensor
    stretch: Tensor
    slope: Tensor
    factor: Tensor

    @classmethod
    def at(cls, iterate: Iterate) -> Newton:
        """Set up and factorise."""
        region, primal, dual = iterate.region, iterate.region.cone(iterate.u), iterate.bound
        stretch = (squared(primal) / squared(dual)).sqrt()
        unit, other = primal / squared(primal).sqrt(), dual / squared(dual).sqrt()
        middle = (unit + mirrored(other)) / (2.0 + 2.0 * dot(unit, other)).sqrt()
        slope, curvature = (x / iterate.scale for x in region.derivatives(iterate.u))
        along = times(region.whiten.mT, middle[:, 1:])
        matrix = region.whiten.mT @ region.whiten + 2.0 * along.unsqueeze(-1) * along.unsqueeze(-2)
        matrix = matrix / stretch.unsqueeze(-1)
        diagonal = torch.where(region.valid, curvature + iterate.sides / iterate.u, 1.0)
        factor = torch.linalg.cholesky_ex(matrix + torch.diag_embed(diagonal)).L
        return cls(iterate, primal, middle, stretch, slope, factor)

    def direction(self, centre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Changes of ``u``, ``sides`` and ``bound`` towards the central path at ``centre [B, 1]``, and their room.

        The room ``[B, 1]``, at most 1, is the length at which the first constraint is reached.
        """
        now, region = self.iterate, self.iterate.region
        target = centre * inverse(self.primal)
        wanted = (centre / now.u + times(region.whiten.mT, target[:, 1:]) - self.slope) * region.valid
        u = torch.cholesky_solve(wanted.unsqueeze(-1), self.factor).squeeze(-1)
        sides = ((centre - now.sides * u) / now.u - now.sides) * region.valid
        primal = torch.cat([torch.zeros_like(centre), times(region.whiten, u)], -1)
        middle = mirrored(self.middle)
        bound = target - now.bound - (2.0 * middle * dot(middle, primal) - mirrored(primal)) / self.stretch
        values, changes = torch.cat([now.u, now.sides], -1), torch.cat([u, sides], -1)
        room = torch.where(changes < 0, -values / changes, 1.0).amin(-1, keepdim=True)
        room = room.minimum(room_in_cone(self.primal, primal)).minimum(room_in_cone(now.bound, bound))
        return u, sides, bound, room.clamp(max=1.0)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """``[B, n]`` products of ``[B, n, n]`` and ``[B, n]``."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """``[B, 1]`` products of vectors ``[B, n]``."""
    return (x * y).sum(-1, keepdim=True)


def mirrored(x: Tensor) -> Tensor:
    """``[B, 1 + n]`` with the signs of all numbers but the first turned."""
    return torch.cat([x[:, :1], -x[:, 1:]], -1)


def squared(x: Tensor) -> Tensor:
    """``[B, 1]`` the first number squared minus the others squared, positive inside the second-order cone."""
    return dot(x, mirrored(x))


def inverse(x: Tensor) -> Tensor:
    """``[B, 1 + n]`` slope of the cone's logarithmic barrier ``log(squared(x)) / 2``."""
    return mirrored(x) / squared(x)


def room_in_cone(x: Tensor, change: Tensor) -> Tensor:
    """``[B, 1]`` how far from ``x``, inside the second-order cone, along ``change`` its edge lies; may be infinite."""
    curve, slope, level = squared(change), dot(x, mirrored(change)), squared(x)
    below = slope.square() - curve * level
    # the smaller positive root of curve a^2 + 2 slope a + level, in a form that does not cancel
    divisor = below.clamp(min=0.0).sqrt() - slope
    return torch.where((below >= 0) & (divisor > 0), level / divisor, torch.inf)
