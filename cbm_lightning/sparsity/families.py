"""Losses of linear classifiers as the solver needs them: derivative, Bregman divergence, bound of the curvature."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

FamilyName = Literal["multinomial", "ovr"]


class Family(Protocol):
    """A convex loss of class logits, summed over samples.

    Attributes:
        curvature: The second derivative by the logits of one sample is at most this number times the identity.
    """

    curvature: float

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of ``logits [n, L]``, a scalar."""

    def derivative(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``[n, L]`` derivative by the logits."""

    def divergence(self, logits: Tensor, step: Tensor) -> Tensor:
        """By how much the loss at ``logits + step`` exceeds its tangent at ``logits``, a scalar.

        The targets drop out. Small steps lose no digits, as the difference of two losses would.
        """

    def curvatures(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """``[n, L]`` twice: the second derivative by the logits of a sample is ``diag(first) - second second^T``."""

    def null_logits(self, prevalence: Tensor) -> Tensor:
        """``[L]`` the best constant logits, given how often each class occurs."""

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[n, L]`` class probabilities."""


class Multinomial:
    """Cross-entropy of a softmax over the classes; targets ``[n]`` int64. The curvature is that of Böhning (1992)."""

    curvature = 0.5

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy."""
        return functional.cross_entropy(logits, targets, reduction="sum")

    def derivative(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Probabilities minus truth."""
        probs = logits.softmax(-1)
        return probs.scatter_add_(1, targets[:, None], probs.new_full((len(targets), 1), -1.0))

    def divergence(self, logits: Tensor, step: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the softmax at ``logits`` from that after the step."""
        probs = logits.softmax(-1)
        mean = (probs * step).sum(-1, keepdim=True)
        # centring keeps the two terms small where the step shifts all classes alike
        return torch.log1p((step - mean).expm1_().mul_(probs).sum(-1)).sum()

    def curvatures(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The probabilities, twice."""
        probs = logits.softmax(-1)
        return probs, probs

    def null_logits(self, prevalence: Tensor) -> Tensor:
        """Centred log-frequencies."""
        logits = prevalence.log()
        return logits - logits.mean()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax."""
        return logits.softmax(-1)


class OneVsRest:
    """A logistic loss a class, summed over the classes; targets ``[n, L]`` of 0 and 1."""

    curvature = 0.25

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross-entropy."""
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")

    def derivative(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Probabilities minus truth."""
        return logits.sigmoid() - targets

    def divergence(self, logits: Tensor, step: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the Bernoulli distributions at ``logits`` from those after the step."""
        probs = logits.sigmoid()
        return torch.expm1(step).mul_(probs).log1p_().sub_(probs * step).sum()

    def curvatures(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Variances; the classes do not interact."""
        probs = logits.sigmoid()
        return probs * (1 - probs), None

    def null_logits(self, prevalence: Tensor) -> Tensor:
        """Log-odds."""
        return torch.logit(prevalence)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Each class against all others."""
        return logits.sigmoid()


def make_family(name: FamilyName) -> Family:
    """A family by name.

    Raises:
        ValueError: There is none of that name.
    """
    families: dict[str, Family] = {"multinomial": Multinomial(), "ovr": OneVsRest()}
    if name not in families:
        raise ValueError(f"family: expected one of {get_args(FamilyName)}, got {name!r}")
    return families[name]
