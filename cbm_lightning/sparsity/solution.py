"""A sparse linear head as the path found it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cbm_lightning.sparsity.nec import nec
from cbm_lightning.sparsity.pruning import keep_largest


@dataclass(frozen=True)
class SparseSolution:
    """Weights on standardised concepts, and how they were found.

    Attributes:
        weight: ``[L, V]``, of standardised concept scores, so that sizes compare.
        bias: ``[L]``, for standardised scores.
        mean: ``[V]`` what standardising subtracts.
        scale: ``[V]`` what it divides by, infinite for constant scores.
        lam: Strength of the penalty (lambda).
        objective: Mean loss plus penalty at the solution; after pruning still that before.
        kkt: By how much the solution missed the optimality conditions; after pruning still that before.
        iterations: Steps of the solver.
        whole_concepts: Whether a concept is kept for all classes or for none.
        group_size: Consecutive columns that belong to one concept; ``V = K * group_size``.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor
    lam: float
    objective: float
    kkt: float
    iterations: int
    group_size: int = 1
    whole_concepts: bool = False

    @property
    def by_concept(self) -> Tensor:
        """``[L, K, m]`` weights of standardised scores."""
        weight: Tensor = self.weight.unflatten(1, (-1, self.group_size))
        return weight

    @property
    def nec(self) -> float:
        """Mean number of concepts a class."""
        return nec(self.by_concept)

    @property
    def coef(self) -> Tensor:
        """``[L, V]`` weights of scores as they came."""
        return self.weight / self.scale

    @property
    def intercept(self) -> Tensor:
        """``[L]`` biases for scores as they came."""
        return self.bias - self.coef @ self.mean

    def pruned(self, level: float) -> SparseSolution:
        """With the largest weights only, ``level`` concepts a class on average (whole concepts rounded); biases stay.

        Raises:
            ValueError: ``level`` is negative or above the number of concepts.
        """
        weight = self.by_concept
        if self.whole_concepts:
            norms = torch.linalg.vector_norm(weight, dim=(0, 2))[None]
            mask = keep_largest(norms, round(level)).expand(len(weight), -1)
        else:
            mask = keep_largest(weight, level)
        return replace(self, weight=self.by_concept.where(mask.unsqueeze(-1), 0.0).flatten(1))

    def logits(self, x: Tensor) -> Tensor:
        """``[n, L]`` of scores ``[n, V]`` as they came."""
        return x @ self.coef.T + self.intercept
