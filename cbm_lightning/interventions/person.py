"""What the person who corrects concepts says, and where there is nothing to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.randomness import Randomness

LabelLevel = Literal["instance", "class"]
OnInvisible = Literal["skip", "use_label", "zero"]
Competence = float | Mapping[str, float] | Literal["uniform"]


@dataclass(frozen=True)
class Answers:
    """What a person would say of every concept of some samples, if asked.

    Attributes:
        told: ``[B, K]``, what they say; read only where ``answerable``.
        truth: ``[B, K]``, what is annotated; NaN where unknown.
        answerable: ``[B, K]`` bool, where they can say something.
    """

    told: Tensor
    truth: Tensor
    answerable: Tensor


class Person:
    """Someone who corrects concepts, right or not quite.

    Args:
        concepts: The concept set.
        label_level: They see the sample (``"instance"``), or know the class and tell what most training samples of
            it have (``"class"``), which hands part of the label over (Koh et al. 2020).
        on_invisible: Where the batch's ``certainty`` is 0, they say nothing (``"skip"``), what is annotated all the
            same (``"use_label"``), or "absent" (``"zero"``, Koh et al. 2020, which raises the error).
        competence: Probability of a right answer, for all concepts or by name (1 where none is given); a wrong one says
            the opposite, in a categorical group another member. ``"uniform"`` draws it between one half (in a group of
            ``n``: one ``n``-th) and one. Drawn once a sample. Real-valued concepts are always told right.

    Raises:
        ValueError: An option is unknown, or a competence lies outside [0, 1].
    """

    def __init__(
        self,
        concepts: ConceptSet,
        label_level: LabelLevel = "instance",
        on_invisible: OnInvisible = "skip",
        competence: Competence = 1.0,
    ) -> None:
        if label_level not in get_args(LabelLevel):
            raise ValueError(f"label_level: expected one of {get_args(LabelLevel)}, got {label_level!r}")
        if on_invisible not in get_args(OnInvisible):
            raise ValueError(f"on_invisible: expected one of {get_args(OnInvisible)}, got {on_invisible!r}")
        self.concepts = concepts
        self.label_level = label_level
        self.on_invisible = on_invisible
        self.class_concepts: Tensor | None = None
        self.competence = _competence(concepts, competence)
        self.groups = concepts.categorical_groups()

    @property
    def reliable(self) -> bool:
        """Whether every answer is what is true of the sample."""
        return self.label_level == "instance" and self.on_invisible != "zero" and self._competent

    @property
    def _competent(self) -> bool:
        return self.competence is not None and bool((self.competence == 1).all())

    def answer(
        self, concepts: Tensor, label: Tensor | None, certainty: Tensor | None, randomness: Randomness
    ) -> Answers:
        """What they say of a batch.

        Args:
            concepts: ``[B, K]`` annotations, NaN where unknown.
            label: ``[B]`` classes, read for ``label_level="class"``.
            certainty: ``[B, K]`` in [0, 1], 0 where a concept is not visible; None if all are.
            randomness: Streams of these samples.
        """
        truth = told = concepts
        if self.label_level == "class":
            if self.class_concepts is None or label is None:
                raise RuntimeError("label_level 'class' needs the concepts of each class; set class_concepts first")
            told = self.class_concepts.to(concepts)[label.long()]
        answerable = ~told.isnan()
        if certainty is not None and self.on_invisible != "use_label":
            invisible = certainty == 0
            if self.on_invisible == "zero":
                told = told.masked_fill(invisible & answerable, 0.0)
            else:
                answerable = answerable & ~invisible
        told = told if self._competent else self._misled(told, randomness)
        return Answers(told, truth, answerable)

    def _misled(self, truth: Tensor, randomness: Randomness) -> Tensor:
        draws = randomness.uniform("mistakes", len(self.concepts)).to(truth.device)
        level = self._levels(randomness).to(truth.device)
        real = self.concepts.is_real().to(truth.device)
        told = torch.where((draws < level) | real, truth, 1.0 - truth)
        for g, members in enumerate(self.groups):
            own = truth[:, members]
            right = own.nan_to_num(nan=-1.0).argmax(1)
            # one draw a group: who misjudges the true member names one of the others
            wrong = draws[:, members[0]] >= level[:, members].gather(1, right.unsqueeze(1))[:, 0]
            other = (randomness.uniform(f"instead {g}", 1)[:, 0] * (len(members) - 1)).long().to(truth.device)
            named = (right + 1 + other) % len(members)
            swapped = torch.nn.functional.one_hot(named, len(members)).to(truth)
            told[:, members] = torch.where(wrong.unsqueeze(1) & ~own.isnan(), swapped, own)
        return told

    def _levels(self, randomness: Randomness) -> Tensor:
        """``[B, K]`` probability of a right answer."""
        if self.competence is not None:
            return self.competence.expand(len(randomness.index), -1)
        lowest = torch.full((len(self.concepts),), 0.5)
        for members in self.groups:
            lowest[members] = 1.0 / len(members)
        return lowest + (1.0 - lowest) * randomness.uniform("competence", len(self.concepts))


def _competence(concepts: ConceptSet, competence: Competence) -> Tensor | None:
    """``[K]`` probabilities, None for drawn ones."""
    if competence == "uniform":
        return None
    if isinstance(competence, str):
        raise ValueError(f"competence: expected a number, numbers by concept, or 'uniform', got {competence!r}")
    if isinstance(competence, Mapping):
        levels = torch.ones(len(concepts))
        for name, level in competence.items():
            levels[concepts.index(name)] = level
    else:
        levels = torch.full((len(concepts),), float(competence))
    if not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"competence: expected probabilities in [0, 1], got {competence}")
    return levels


def class_majority(concepts: Tensor, labels: Tensor, num_classes: int, concept_set: ConceptSet) -> Tensor:
    """``[L, K]`` what most annotated samples of each class have; 1 on a tie, NaN where none is annotated.

    Of a categorical group it is the commonest member, the first one on a tie.

    Args:
        concepts: ``[N, K]``, NaN where unknown.
        labels: ``[N]`` class indices.
        num_classes: ``L``.
        concept_set: The concepts.
    """
    known = (~concepts.isnan()).float()
    member = torch.nn.functional.one_hot(labels.long(), num_classes).float().T
    seen = member @ known
    held = member @ ((concepts >= 0.5).float() * known)
    majority = (2 * held >= seen).float()
    for members in concept_set.categorical_groups():
        majority[:, members] = torch.nn.functional.one_hot(held[:, members].argmax(1), len(members)).float()
    return torch.where(seen > 0, majority, torch.nan)
