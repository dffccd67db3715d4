"""The smooth half of a sparse head: the mean loss of a linear classifier on a design, and its derivatives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from cbm_lightning.sparsity.design import Design
from cbm_lightning.sparsity.families import Family
from cbm_lightning.sparsity.penalties import Penalty

HESSIAN_NUMBERS = 2**20
"""How many numbers of scaled scores a Hessian is summed from at a time."""


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

    def hessian(self, logits: Tensor, free: Tensor) -> Tensor:
        """``[a, a]`` second derivative of the mean loss by some weights and biases, in the order of ``free.nonzero()``.

        Args:
            logits: ``[n, L]``.
            free: ``[L, K + 1]`` bool; the last column are the biases.
        """
        label, column = free.nonzero().unbind(1)
        ends = torch.searchsorted(label, torch.arange(len(free) + 1, device=label.device)).tolist()
        total = self.gram.new_zeros(len(label), len(label))
        step = max(HESSIAN_NUMBERS // len(label), 1)
        for rows, x in self.design.chunks():
            for part in torch.arange(len(x), device=x.device).split(step):
                own, shared = self.family.curvatures(logits[rows][part])
                score = torch.cat([x[part], x.new_ones(len(part), 1)], 1)[:, column]
                for i, (first, last) in enumerate(pairwise(ends)):
                    block = score[:, first:last]
                    total[first:last, first:last].addmm_((block * own[:, i : i + 1]).T, block)
                if shared is not None:
                    score *= shared[:, label]
                    total.addmm_(score.T, score, alpha=-1.0)
        return self.design.sum(total) / self.design.rows

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
