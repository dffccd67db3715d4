"""Newton steps on the weights that are not zero, which end what proximal steps have begun."""

from __future__ import annotations

import torch
from torch import Tensor

from cbm_lightning.sparsity.penalties import Penalty
from cbm_lightning.sparsity.problem import Point, Problem

# a Hessian may cost as much time as so many steps of the first order, and have so many entries
AFFORDABLE, ENTRIES = 50, 2**21
# of the mean of its diagonal; equal shifts of all biases change no probability, so it is singular without
DAMPING = 1e-6
HALVINGS = 3


def newton_step(
    problem: Problem,
    penalty: Penalty,
    strength: float,
    point: Point,
    logits: Tensor,
    gradient: tuple[Tensor, Tensor] | None,
) -> tuple[Point, Tensor] | None:
    """Minimise loss and penalty as if the zeros were known: a step of Newton's method in the other weights.

    Weights that would change their sign become zero.

    Args:
        problem: Loss and data.
        penalty: Of the weights.
        strength: Of the penalty.
        point: Where.
        logits: ``[n, L]`` there.
        gradient: Of the loss there, by weights and biases, if it is known.

    Returns:
        A better point and its logits, or None if there is none, the penalty has no faces or the Hessian costs too much.
    """
    face = penalty.face(point.weight)
    if face is None:
        return None
    classes, columns = point.weight.shape
    free = torch.cat([face.free, face.free.new_full((classes, 1), problem.intercept)], 1)
    size = int(free.sum())
    if size == 0 or size**2 > min(2 * AFFORDABLE * classes * columns, ENTRIES):
        return None
    gradient = problem.gradient(logits) if gradient is None else gradient
    hessian = problem.hessian(logits, free).double()
    diagonal = torch.cat([free.new_full((columns,), True), free.new_zeros(1)])[free.nonzero()[:, 1]]
    hessian.diagonal().add_(strength * face.curvature * diagonal + DAMPING * hessian.diagonal().mean())
    slope = torch.cat([gradient[0] + strength * face.gradient, gradient[1][:, None]], 1)[free].double()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        return None
    move = torch.zeros(classes, columns + 1, dtype=point.weight.dtype, device=point.weight.device)
    move[free] = -torch.cholesky_solve(slope[:, None], factor)[:, 0].to(move.dtype)
    before = problem.objective(point, logits, penalty, strength)
    for halving in range(HALVINGS):
        weight = point.weight + move[:, :-1] / 2**halving
        if face.signed:
            weight = torch.where(weight.sign() == point.weight.sign(), weight, 0.0)
        new = Point(weight, point.bias + move[:, -1] / 2**halving, point.curvature)
        new_logits = problem.logits(new)
        if problem.objective(new, new_logits, penalty, strength) < before:
            return new, new_logits
    return None
