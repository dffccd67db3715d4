"""Exact sparse linear classifiers: accelerated proximal gradient steps in the metric of the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cbm_lightning.sparsity.newton import newton_step
from cbm_lightning.sparsity.penalties import Penalty
from cbm_lightning.sparsity.problem import Point, Problem

# after so many proximal steps a Newton step is tried, after twice as many each time that it is of no use; where it
# helps, another follows at once
NEWTON_PAUSE = 5
# an outer step costs two products with the data, an inner one a product of K x K
INNER_STEPS = 200
INNER_CHECK = 5
# the inner problem is solved to a tenth of what is wrong outside, and to a third of what is asked for at the end
INNER_SHARE, INNER_FLOOR = 0.1, 0.3
# how fast the estimate of the curvature is tried lower, and how low it may get
CURVATURE_DECAY, LOWEST_CURVATURE = 0.8, 1e-4


@dataclass(frozen=True)
class Solved:
    """What the solver found.

    Attributes:
        point: The weights.
        objective: Mean loss plus penalty.
        kkt: By how much the optimality conditions are missed, the largest over all weights and biases.
        iterations: Outer steps; each reads the data twice.
    """

    point: Point
    objective: float
    kkt: float
    iterations: int


def solve(
    problem: Problem,
    penalty: Penalty,
    strength: float,
    start: Point | None = None,
    tol: float = 1e-5,
    steps: int = 1000,
) -> Solved:
    """Minimise ``mean loss + strength * penalty`` over weights and biases.

    FISTA (Beck and Teboulle 2009) with the restart of O'Donoghue and Candès (2015). A step is measured by what it does
    to the logits, ``|X D|^2``, where the usual one bounds that by the largest eigenvalue of the Gram matrix: the
    number of passes over the data then depends on how curved the loss is, and not on how the concepts correlate. The
    proximal step has no closed form in this metric; it is solved on the Gram matrix, without the data. The curvature is
    found by backtracking below its bound.

    Args:
        problem: Loss and data.
        penalty: Of the weights; biases are free.
        strength: Of the penalty, at least 0.
        start: Where to begin, at best the solution for a neighbouring strength.
        tol: Largest violation of the optimality conditions, see `tolerance`.
        steps: Give up after as many.
    """
    now = before = start or problem.null()
    logits = logits_before = problem.logits(now)
    tol = tolerance(tol, strength, problem.gram.dtype)
    curvature, bound = now.curvature, problem.family.curvature
    clock, momentum, kkt = 1.0, 0.0, float("inf")
    next_newton = pause = NEWTON_PAUSE
    for step in range(steps + 1):
        gradient = problem.gradient(logits, logits_before, momentum)
        # with momentum this is the gradient nearby, enough to tell when a look at the point itself is worth a pass
        kkt = violation(penalty, now, gradient, strength)
        if momentum and (kkt <= tol or step == steps):
            before, logits_before, clock, momentum = now, logits, 1.0, 0.0
            gradient = problem.gradient(logits)
            kkt = violation(penalty, now, gradient, strength)
        if kkt <= tol or step == steps:
            break
        if step == next_newton:
            found = newton_step(problem, penalty, strength, now, logits, None if momentum else gradient)
            if found is not None:
                before, logits_before = now, logits = found
                clock, momentum, next_newton, pause = 1.0, 0.0, step + 1, NEWTON_PAUSE
                continue
            next_newton, pause = step + pause, 2 * pause
        ahead = Point(
            torch.lerp(before.weight, now.weight, 1.0 + momentum),
            torch.lerp(before.bias, now.bias, 1.0 + momentum),
            curvature,
        )
        accuracy = max(INNER_SHARE * kkt, INNER_FLOOR * tol)
        while True:
            new = proximal_point(problem, penalty, strength, ahead, now, gradient, curvature, accuracy)
            new_logits, divergence, square = problem.advance(new, logits, logits_before, momentum)
            if curvature >= bound or bool(divergence <= curvature / 2 * square * (1 + 1e-3)):
                break
            curvature = min(max(2 * curvature, float(2 * divergence / square)), bound)
        drop, move = ahead.weight - new.weight, new.weight - now.weight
        uphill = ((drop @ problem.gram) * move).sum() + ((ahead.bias - new.bias) * (new.bias - now.bias)).sum()
        before, now, logits_before, logits = now, new, logits, new_logits
        if bool(uphill > 0):
            before, logits_before, clock, momentum = now, logits, 1.0, 0.0
        else:
            later = (1 + (1 + 4 * clock * clock) ** 0.5) / 2
            clock, momentum = later, (clock - 1) / later
        curvature = max(CURVATURE_DECAY * curvature, LOWEST_CURVATURE)
    point = Point(now.weight, now.bias, curvature)
    return Solved(point, problem.objective(point, logits, penalty, strength), kkt, step)


def tolerance(tol: float, strength: float, dtype: torch.dtype) -> float:
    """The violation of the optimality conditions that is let pass: ``tol``, but no more than 1 % of a small strength.

    Where classes are many or rare, gradients and the strengths of interest are small, and what is small beside one is
    not beside the other. Rounding sets a floor.
    """
    return max(min(tol, 1e-2 * strength) if strength else tol, 4 * torch.finfo(dtype).eps)


def violation(penalty: Penalty, point: Point, gradient: tuple[Tensor, Tensor], strength: float) -> float:
    """By how much the optimality conditions are missed."""
    weight, bias = gradient
    return float(torch.maximum(penalty.residual(point.weight, weight, strength), bias.abs().max()))


def proximal_point(
    problem: Problem,
    penalty: Penalty,
    strength: float,
    ahead: Point,
    guess: Point,
    gradient: tuple[Tensor, Tensor],
    curvature: float,
    accuracy: float,
) -> Point:
    """Minimise the quadratic model of the loss at ``ahead`` plus the penalty, by FISTA on the Gram matrix.

    Args:
        problem: Has the Gram matrix.
        penalty: Of the weights.
        strength: Of the penalty.
        ahead: Where the gradient was taken.
        guess: Where to begin.
        gradient: By weights and biases.
        curvature: Of the model.
        accuracy: Largest violation of the model's optimality conditions.
    """
    by_weight, by_bias = gradient
    rate = 1.0 / (curvature * problem.largest)
    # the model's gradient at W is constant + curvature * W @ gram
    constant = by_weight - curvature * (ahead.weight @ problem.gram)
    now = before = at = guess.weight
    clock = 1.0
    for step in range(1, INNER_STEPS + 1):
        slope = torch.addmm(constant, at, problem.gram, alpha=curvature)
        new = penalty.prox(at - rate * slope, rate * strength)
        drop = at - new
        restart = bool((drop * (new - now)).sum() > 0)
        before, now = now, new
        later = 1.0 if restart else (1 + (1 + 4 * clock * clock) ** 0.5) / 2
        at = now if restart else torch.lerp(before, now, 1 + (clock - 1) / later)
        clock = later
        if step % INNER_CHECK == 0 and float(drop.abs().max()) <= accuracy * rate:
            break
    return Point(now, ahead.bias - by_bias / curvature, curvature)
