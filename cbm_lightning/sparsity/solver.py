"""Exact sparse linear classifiers: accelerated proximal gradient steps in the metric of the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cbm_lightning.sparsity.design import Design
from cbm_lightning.sparsity.families import Family
from cbm_lightning.sparsity.penalties import Penalty

# an outer step costs two products with the data, an inner one a product of K x K
INNER_STEPS = 200
INNER_CHECK = 5
# the inner problem is solved to a tenth of what is wrong outside, and to a third of what is asked for at the end
INNER_SHARE, INNER_FLOOR = 0.1, 0.3
# how fast the estimate of the curvature is tried lower, and how low it may get
CURVATURE_DECAY, LOWEST_CURVATURE = 0.8, 1e-4


@dataclass(frozen=True)
class Point:
    """Weights of a linear classifier.

    Attributes:
        weight: ``[L, K]``.
        bias: ``[L]``.
        curvature: The solver's estimate of the curvature there, a good start for a neighbouring problem.
    """

    weight: Tensor
    bias: Tensor
    curvature: float


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


class Problem:
    """The smooth part: the mean loss of a linear classifier on a design.

    Args:
        design: Rows of this process.
        targets: Of these rows, as the family wants them.
        family: The loss.
        intercept: Whether there is an unpenalised bias a class; if so, the design must be centred.
        prevalence: ``[L]`` how often each class occurs over all processes.
    """

    def __init__(self, design: Design, targets: Tensor, family: Family, prevalence: Tensor, intercept: bool) -> None:
        self.design, self.targets, self.family, self.intercept = design, targets, family, intercept
        self.prevalence = prevalence.to(design.device, design.dtype)

    @cached_property
    def gram(self) -> Tensor:
        """``[K, K]``, computed once."""
        return self.design.gram()

    @cached_property
    def largest(self) -> float:
        """Largest eigenvalue of the Gram matrix."""
        return max(float(torch.linalg.eigvalsh(self.gram)[-1]), torch.finfo(self.gram.dtype).tiny)

    def null(self) -> Point:
        """No weights, and the biases that are best without them."""
        classes = len(self.prevalence)
        zeros = self.gram.new_zeros(classes, self.design.columns)
        bias = self.family.null_logits(self.prevalence) if self.intercept else zeros.new_zeros(classes)
        return Point(zeros, bias, self.family.curvature)

    def logits(self, point: Point) -> Tensor:
        """``[n, L]`` logits of this process's rows."""
        out = self.gram.new_empty(self.design.local_rows, len(point.bias))
        for rows, x in self.design.chunks():
            torch.addmm(point.bias, x, point.weight.T, out=out[rows])
        return out

    def gradient(self, logits: Tensor, ahead: Tensor | None = None, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
        """Gradient by weights ``[L, K]`` and biases ``[L]`` at ``logits + momentum * (logits - ahead)``."""
        classes = logits.shape[1]
        total = self.gram.new_zeros(classes, self.design.columns + 1)
        for rows, x in self.design.chunks():
            at = extrapolate(logits, ahead, momentum, rows)
            derivative = self.family.derivative(at, self.targets[rows])
            total[:, :-1].addmm_(derivative.T, x)
            total[:, -1] += derivative.sum(0)
        total = self.design.sum(total) / self.design.rows
        return total[:, :-1], total[:, -1] * self.intercept

    def advance(self, point: Point, logits: Tensor, ahead: Tensor, momentum: float) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at a point, and how they moved from the extrapolated ones.

        Returns:
            ``[n, L]`` logits; the mean Bregman divergence; the mean squared change of the logits of a sample.
        """
        out = torch.empty_like(logits)
        moved = logits.new_zeros(2)
        for rows, x in self.design.chunks():
            torch.addmm(point.bias, x, point.weight.T, out=out[rows])
            at = extrapolate(logits, ahead, momentum, rows)
            step = out[rows] - at
            moved += torch.stack([self.family.divergence(at, step), step.square().sum()])
        divergence, square = self.design.sum(moved) / self.design.rows
        return out, divergence, square

    def objective(self, point: Point, logits: Tensor, penalty: Penalty, strength: float) -> float:
        """Mean loss plus penalty."""
        loss = sum(self.family.value(logits[rows], self.targets[rows]).double() for rows in self.design.slices())
        mean = self.design.sum(torch.as_tensor(loss, device=logits.device)) / self.design.rows
        return float(mean + strength * penalty.value(point.weight.double()))


def extrapolate(now: Tensor, before: Tensor | None, momentum: float, rows: slice) -> Tensor:
    """Rows of ``now + momentum * (now - before)``."""
    if before is None or momentum == 0.0:
        return now[rows]
    return torch.lerp(before[rows], now[rows], 1.0 + momentum)


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
        tol: Largest violation of the optimality conditions.
        steps: Give up after as many.
    """
    now = before = start or problem.null()
    logits = logits_before = problem.logits(now)
    curvature, bound = now.curvature, problem.family.curvature
    clock, momentum, kkt = 1.0, 0.0, float("inf")
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
