"""What an energy says of concepts and classes: p(y | c), p(c_k | y), p(c_k | y, c_j) and p(c_-k, y | x, c_k).

Sums over all ``2^K`` concept vectors are exact where they can be enumerated. Otherwise they run over the vectors that
occur in a data set, weighted by how often they do, as in the experiments of Xu et al. (ICLR 2024).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, Intervention

MOST_VECTORS = 1 << 16


class JointEnergy(Protocol):
    """What the conditionals of concepts and label need."""

    def joint_energies(self, concepts: Tensor) -> Tensor:
        """``[M, L]`` energy of concept vectors ``[M, K]`` with each class."""


class Candidates(NamedTuple):
    """Concept vectors to sum over.

    Attributes:
        vectors: ``[M, K]`` of 0 and 1.
        log_prior: ``[M]`` log-probability of each.
    """

    vectors: Tensor
    log_prior: Tensor

    @classmethod
    def observed(cls, concepts: Tensor) -> Candidates:
        """The different rows of ``[N, K]`` predictions or annotations (1 from one half), as often as they occur.

        Rows with an unknown entry (NaN) are left out.

        Raises:
            ValueError: No row is complete.

        Example:
            >>> Candidates.observed(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])).vectors
            tensor([[0., 1.],
                    [1., 0.]])
        """
        known = concepts[~concepts.isnan().any(-1)]
        if len(known) == 0:
            raise ValueError(f"concepts: expected rows without NaN to sum over, got none among {len(concepts)}")
        vectors, counts = torch.unique((known >= 0.5).float(), dim=0, return_counts=True)
        return cls(vectors, (counts.to(vectors) / len(known)).log())

    @classmethod
    def every(cls, concepts: ConceptSet, probs: Tensor | None = None) -> Candidates:
        """All vectors that the kinds of the concepts allow: exactly one member of each categorical group.

        Args:
            concepts: Of which no one is real-valued.
            probs: ``[N, K]`` predictions of a data set: the prior is the mean over its samples of the product of their
                concepts' probabilities. Without it, all vectors are equally likely.

        Raises:
            ValueError: There are more than 65,536, or concepts are real-valued.

        Example:
            >>> len(Candidates.every(ConceptSet(["red", "blue", "round"])).vectors)
            8
        """
        groups = concepts.categorical_groups()
        single = [[k] for k, kind in enumerate(concepts.kinds) if kind == "binary"]
        if "real" in concepts.kinds:
            raise ValueError("concepts: real-valued ones cannot be enumerated")
        choices = [*groups, *single]
        sizes = [max(len(members), 2) for members in choices]
        count = torch.tensor(sizes, dtype=torch.float64).prod()
        if count > MOST_VECTORS:
            raise ValueError(
                f"concepts: {len(concepts)} concepts have {count:.0f} vectors, at most {MOST_VECTORS} can be "
                "enumerated; use Candidates.observed"
            )
        grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
        vectors = torch.zeros(len(grid), len(concepts))
        for values, members in zip(grid.unbind(1), choices, strict=True):
            if len(members) == 1:
                vectors[:, members[0]] = values.float()
            else:
                vectors[:, members] = torch.nn.functional.one_hot(values, len(members)).float()
        if probs is None:
            return cls(vectors, torch.full((len(vectors),), -float(torch.log(count))))
        vectors, probs = vectors.to(probs.device), probs.float().clamp(1e-6, 1.0 - 1e-6)
        grouped = torch.tensor([kind == "categorical" for kind in concepts.kinds], device=probs.device)
        absent = torch.where(grouped, 0.0, (1.0 - probs).log())
        # [M, N]: the absence of a member of a group follows from the presence of another one
        log_probs = vectors @ probs.log().T + (1.0 - vectors) @ absent.T
        prior = log_probs.logsumexp(-1)
        return cls(vectors, prior - prior.logsumexp(0))


def label_given_concepts(bottleneck: JointEnergy, concepts: Tensor) -> Tensor:
    """``[M, L]`` ``p(y | c)`` of concept vectors ``[M, K]``: softmax of ``-E_cy`` over the classes."""
    return (-bottleneck.joint_energies(concepts)).softmax(-1)


def vectors_given_label(bottleneck: JointEnergy, candidates: Candidates) -> Tensor:
    """``[M, L]`` ``p(c | y)`` over the candidates: ``p(y | c) p(c)``, normalised for each class."""
    log_joint = (-bottleneck.joint_energies(candidates.vectors)).log_softmax(-1)
    return (log_joint + candidates.log_prior.to(log_joint).unsqueeze(-1)).softmax(0)


def concepts_given_label(bottleneck: JointEnergy, candidates: Candidates) -> Tensor:
    """``[L, K]`` ``p(c_k = 1 | y)``: how a class is made up of concepts, in the eyes of the model."""
    found = vectors_given_label(bottleneck, candidates)
    return found.T @ candidates.vectors.to(found)


def concepts_given_label_and_concept(bottleneck: JointEnergy, candidates: Candidates, label: int) -> Tensor:
    """``[K, K]`` ``p(c_k = 1 | y, c_j = 1)``, ``j`` in rows and ``k`` in columns; NaN where no candidate has ``c_j``.

    Raises:
        ValueError: There is no such class.
    """
    found = vectors_given_label(bottleneck, candidates)
    if not 0 <= label < found.shape[1]:
        raise ValueError(f"label: expected a class from 0 to {found.shape[1] - 1}, got {label}")
    vectors = candidates.vectors.to(found)
    both = vectors.T @ (found[:, [label]] * vectors)
    return both / both.diagonal().unsqueeze(1)


class Posterior(NamedTuple):
    """What follows from an input and corrections.

    Attributes:
        concepts: ``[B, K]`` probabilities.
        classes: ``[B, L]`` probabilities.
    """

    concepts: Tensor
    classes: Tensor


class InputEnergy(JointEnergy, Protocol):
    """What conditionals on an input need."""

    def input_energies(self, output: ConceptOutput) -> tuple[Tensor, Tensor]:
        """``[B, L]`` energies of the classes and ``[B, K, 2]`` of the concepts, absent and present."""


def given_input(
    bottleneck: InputEnergy, output: ConceptOutput, candidates: Candidates, given: Intervention | None = None
) -> Posterior:
    """``p(c_k, y | x, c_j)``: the Boltzmann distribution of ``E_xy + sum_k E_xc + E_cy`` over candidates and classes.

    All three energies count in full, as in training, and the prior of the candidates does not: the energies are those
    of the joint distribution.

    Args:
        bottleneck: Of the output.
        output: ``B`` samples.
        candidates: Vectors to sum over.
        given: Concepts that are known, each 0 or 1 (from one half) or, where NaN, unknown after all.

    Raises:
        ValueError: No candidate agrees with what is known of a sample.
    """
    classes, concepts = bottleneck.input_energies(output)
    vectors = candidates.vectors.to(concepts)
    absent, present = concepts.unbind(-1)
    own = -(absent @ (1.0 - vectors).T + present @ vectors.T)
    if given is not None:
        known = given.mask & ~given.values.isnan()
        wanted = (given.values >= 0.5).to(vectors)
        # how many of the known concepts a vector gets wrong
        wrong = (known * wanted) @ (1.0 - vectors).T + (known * (1.0 - wanted)) @ vectors.T
        if bool((wrong > 0).all(1).any()):
            raise ValueError(
                "candidates: none agrees with the known concepts of some sample; use Candidates.every, or vectors of "
                "more samples"
            )
        own = own.masked_fill(wrong > 0, -torch.inf)
    joint = -bottleneck.joint_energies(vectors)
    # class by class, for [B, M, L] numbers may be too many
    by_vector, by_class = torch.full_like(own, -torch.inf), torch.empty_like(classes)
    for label, energy in enumerate(classes.unbind(1)):
        part = own + joint[:, label] - energy.unsqueeze(1)
        by_vector, by_class[:, label] = torch.logaddexp(by_vector, part), part.logsumexp(1)
    return Posterior(by_vector.softmax(1) @ vectors, by_class.softmax(1))
