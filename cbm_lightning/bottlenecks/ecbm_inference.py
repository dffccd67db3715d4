"""The three energies of an ECBM, and the descent on concepts and label that minimises them.

Where the embedding ``v`` of a concept or class has length 1, ``1 + v >= 0``, so that
``relu(z + z * v) = relu(z) * (1 + v)``: the energies are linear in ``v``. All that a step does not change is therefore
computed once, and a step costs ``O(B (K + L) H)`` without a loop over concepts. Gradients are written out: a descent
works in any autograd mode, leaves the parameters alone and can be exported.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cbm_lightning.bottlenecks.activation import ConceptActivation

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
# as nn.functional.normalize
SHORTEST = 1e-12


class JointTerms(NamedTuple):
    """What the energy of concepts and classes is made of; no part of it depends on an input.

    Attributes:
        classes: ``[L, H]`` class embeddings.
        bias: ``[H]``.
        rows: ``[2, K, H]``, what each concept adds to the joint vector ``h`` when absent and when present.
        weight: ``[H]`` ``w2``.
    """

    classes: Tensor
    bias: Tensor
    rows: Tensor
    weight: Tensor

    def units(self) -> Tensor:
        """``[L, H]`` class embeddings of length 1."""
        return torch.nn.functional.normalize(self.classes, dim=-1)

    def hidden(self, probs: Tensor, removed: Tensor | None = None) -> Tensor:
        """``[B, H]`` the joint vector ``h`` of mixed concepts ``[B, K]``; removed ones add nothing to it."""
        absent, present = self.rows.unbind(0)
        kept = torch.ones_like(probs) if removed is None else (~removed).to(probs)
        return self.bias + kept @ absent + (probs * kept) @ (present - absent)

    def energies(self, probs: Tensor, removed: Tensor | None = None) -> Tensor:
        """``[B, L]`` ``E_cy`` of each class with mixed concepts ``[B, K]``."""
        relevance = self.hidden(probs, removed).relu() * self.weight
        return relevance.sum(-1, keepdim=True) + relevance @ self.units().T


class EnergyTerms(NamedTuple):
    """What the energies of a batch are made of.

    Attributes:
        relevance: ``[B, H]`` ``w1 * relu(z)``: ``E_xy = sum(relevance * (1 + u))`` for a class embedding ``u`` of
            length 1.
        concept_base: ``[B, K]`` ``w_k . relu(z')``.
        concept_scores: ``[B, K, 2]`` ``(w_k * relu(z')) . v_k`` of absent and present.
        concept_gram: ``[K, 3]`` ``v0.v0``, ``v0.v1`` and ``v1.v1`` of each concept.
        joint: Of concepts and classes.
    """

    relevance: Tensor
    concept_base: Tensor
    concept_scores: Tensor
    concept_gram: Tensor
    joint: JointTerms

    def class_energies(self) -> Tensor:
        """``[B, L]`` ``E_xy`` of each class."""
        return self.relevance.sum(-1, keepdim=True) + self.relevance @ self.joint.units().T

    def concept_energies(self) -> Tensor:
        """``[B, K, 2]`` ``E_xc`` of each concept, absent and present."""
        lengths = self.concept_gram[:, [0, 2]].sqrt().clamp(min=SHORTEST)
        return self.concept_base.unsqueeze(-1) + self.concept_scores / lengths


class Slopes(NamedTuple):
    """The weighted energy of a point, and where it falls.

    Attributes:
        energy: ``[B]``.
        concepts: ``[B, K]``, by the probabilities of the concepts.
        classes: ``[B, L]``, by those of the classes.
    """

    energy: Tensor
    concepts: Tensor
    classes: Tensor


def slopes(
    terms: EnergyTerms, probs: Tensor, classes: Tensor, weights: Tensor, removed: Tensor, exclusive: bool
) -> Slopes:
    """The weighted sum of the energies with mixed embeddings, and its gradient.

    Args:
        terms: Of the batch.
        probs: ``[B, K]``, how much of "present" there is in the mixed embedding of each concept.
        classes: ``[B, L]``, how much of each class.
        weights: ``[B, 3]`` of ``E_xy``, of the sum of ``E_xc`` over the concepts, and of ``E_cy``.
        removed: ``[B, K]`` bool, concepts that count for nothing.
        exclusive: Classes exclude each other, so that their embeddings mix; otherwise each label has an energy of its
            own, and they add up.
    """
    of_class, of_concepts, of_joint = (weight.unsqueeze(-1) for weight in weights.unbind(-1))
    own, by_concept = _concept_slopes(terms, probs)
    kept = (~removed).to(probs)
    joint = terms.joint
    hidden = joint.hidden(probs, removed)
    relevance = of_class * terms.relevance + of_joint * joint.weight * hidden.relu()
    if exclusive:
        mixed = classes @ joint.classes
        length = mixed.norm(dim=-1, keepdim=True).clamp(min=SHORTEST)
        factor = 1.0 + mixed / length
        along = (relevance * mixed).sum(-1, keepdim=True) / length
        by_class = ((relevance - along * mixed / length) / length) @ joint.classes.T
    else:
        units = 1.0 + joint.units()
        factor = classes @ units
        by_class = relevance @ units.T
    energy = (relevance * factor).sum(-1) + (of_concepts * own * kept).sum(-1)
    by_hidden = of_joint * joint.weight * (hidden > 0) * factor
    from_joint = by_hidden @ (joint.rows[1] - joint.rows[0]).T
    return Slopes(energy, (of_concepts * by_concept + from_joint) * kept, by_class)


def _concept_slopes(terms: EnergyTerms, probs: Tensor) -> tuple[Tensor, Tensor]:
    """``[B, K]`` ``E_xc`` of the mixed embedding of each concept, and its slope."""
    both_absent, mixed, both_present = terms.concept_gram.unbind(-1)
    absent, present = terms.concept_scores.unbind(-1)
    rest = 1.0 - probs
    square = probs.square() * both_present + 2.0 * probs * rest * mixed + rest.square() * both_absent
    length = square.clamp(min=SHORTEST**2).sqrt()
    score = probs * present + rest * absent
    growth = (probs * both_present + (rest - probs) * mixed - rest * both_absent) / length
    return terms.concept_base + score / length, (present - absent - score * growth / length) / length


class Point(NamedTuple):
    """Where a descent stands.

    Attributes:
        logits: ``[B, K]`` of the concepts.
        classes: ``[B, L]`` logits of the classes.
    """

    logits: Tensor
    classes: Tensor


class Held(NamedTuple):
    """What a descent does not move.

    Attributes:
        mask: ``[B, K]`` bool, the corrected concepts.
        probs: ``[B, K]``, what they were corrected to; read where ``mask`` is True.
        removed: ``[B, K]`` bool, concepts that count for nothing.
    """

    mask: Tensor
    probs: Tensor
    removed: Tensor


def mixture(logits: Tensor, held: Held, activation: ConceptActivation) -> Tensor:
    """``[B, K]`` probabilities of the concepts, corrected ones as they were told."""
    return torch.where(held.mask, held.probs, activation(logits))


def descend(
    terms: EnergyTerms,
    start: Point,
    held: Held,
    weights: Tensor,
    activation: ConceptActivation,
    *,
    steps: int,
    step_size: float,
    exclusive: bool = True,
) -> Point:
    """Minimise the weighted energy over the logits of concepts and classes, each sample on its own.

    Adam (Kingma and Ba 2015) scales each number by its own history, so no sample sees another. Of all points on the
    way, the one of the lowest energy is returned, so that the answer is never worse than the start.

    Args:
        terms: Of the batch.
        start: Where to begin.
        held: What does not move.
        weights: ``[B, 3]``, see `slopes`.
        activation: From concept logits to probabilities.
        steps: How many.
        step_size: Of Adam. A binary concept moves twice as far: its logit is the difference of two (absent, present),
            each of which the paper moves by a step.
        exclusive: See `slopes`.
    """
    rates = (step_size * torch.where(activation.categorical, 1.0, 2.0), torch.full_like(start.classes[:1], step_size))
    position = [start.logits, start.classes]
    first, second = ([torch.zeros_like(x) for x in position] for _ in range(2))
    lowest, best = torch.full_like(weights[:, 0], torch.inf), list(position)
    for step in range(steps + 1):
        soft = activation(position[0])
        classes = position[1].softmax(-1) if exclusive else position[1].sigmoid()
        probs = torch.where(held.mask, held.probs, soft)
        found = slopes(terms, probs, classes, weights, held.removed, exclusive)
        better = found.energy < lowest
        lowest = torch.where(better, found.energy, lowest)
        best = [torch.where(better.unsqueeze(-1), now, old) for now, old in zip(position, best, strict=True)]
        if step == steps:
            break
        upstream = found.concepts.masked_fill(held.mask, 0.0)
        gradients = (_through(activation, soft, upstream), _through_classes(classes, found.classes, exclusive))
        for i, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
            first[i] = BETA1 * first[i] + (1 - BETA1) * gradient
            second[i] = BETA2 * second[i] + (1 - BETA2) * gradient.square()
            scale = (second[i] / (1 - BETA2 ** (step + 1))).sqrt() + EPSILON
            position[i] = position[i] - rate * first[i] / (1 - BETA1 ** (step + 1)) / scale
        position[0] = torch.where(held.mask, start.logits, position[0])
    return Point(*best)


def _through(activation: ConceptActivation, probs: Tensor, gradient: Tensor) -> Tensor:
    """The gradient by the logits, given the one by the probabilities."""
    own = probs * (1.0 - probs) * gradient
    if not activation.has_groups:
        return own
    membership = activation.membership.to(probs)
    shared = (probs * gradient) @ membership @ membership.T
    return torch.where(activation.categorical, probs * (gradient - shared), own)


def _through_classes(probs: Tensor, gradient: Tensor, exclusive: bool) -> Tensor:
    if not exclusive:
        return probs * (1.0 - probs) * gradient
    return probs * (gradient - (probs * gradient).sum(-1, keepdim=True))
