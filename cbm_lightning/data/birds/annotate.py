"""From what birds show to concept annotations: exact, by class, by noisy votes, with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cbm_lightning.concepts import ConceptSet, Kind
from cbm_lightning.data.birds.attributes import Group, Part, check_share
from cbm_lightning.randomness import Randomness

ConceptLabels = Literal["instance", "class"]
MissingBy = Literal["image", "concept"]


class Vocabulary:
    """The concepts of some groups, and where they are found among the columns of all groups.

    Args:
        kept: The groups that have concepts.
        groups: All groups that pictures have values of.

    Attributes:
        group: ``[K]`` position of each concept's group in ``groups``.
        value: ``[K]`` the value for which it holds.
    """

    def __init__(self, kept: Sequence[Group], groups: Sequence[Group]) -> None:
        self.kept = list(kept)
        self.groups = list(groups)
        owners = [(groups.index(group), value) for group in kept for value in group.shown_values]
        self.group, self.value = torch.tensor(owners).unbind(1)

    def concept_set(self, kind: Literal["binary", "categorical"]) -> ConceptSet:
        """Names, groups and sentences; groups of more than two values are of the given kind."""
        kinds: list[Kind] = [kind if len(group.values) > 2 else "binary" for group in self.kept for _ in group.concepts]
        texts = [f"a bird with {group.phrases[value]}" for group in self.kept for value in group.shown_values]
        groups = {group.name: group.concepts for group in self.kept}
        return ConceptSet([name for group in self.kept for name in group.concepts], groups, kinds, texts)

    def parts(self) -> Tensor:
        """``[K, parts]`` bool, the parts whose pixels show each concept."""
        table = torch.zeros(len(self.group), len(Part), dtype=torch.bool)
        for row, group in zip(table, self.group.tolist(), strict=True):
            row[list(self.groups[group].parts)] = True
        return table

    def of_values(self, values: Tensor) -> Tensor:
        """``[..., K]`` concepts as 0 or 1 of values ``[..., G]``."""
        return (values[..., self.group] == self.value).float()

    def of_weights(self, weights: Tensor) -> Tensor:
        """``[..., K]`` with what probability each concept holds, of the weights ``[..., G, V]`` of values."""
        return weights[..., self.group, self.value]

    def index(self, group: Tensor, value: Tensor) -> Tensor:
        """``[N]`` position of the concept of a value of a group, -1 where it has none."""
        found = (self.group == group[:, None]) & (self.value == value[:, None])
        return torch.where(found.any(1), found.int().argmax(1), -1)


def seen_values(groups: Sequence[Group], names: Sequence[str]) -> list[Tensor]:
    """What concepts tell of the values of groups.

    Args:
        groups: The groups.
        names: Names of concepts of these groups.

    Returns:
        A 0/1 matrix ``[n, m]`` a group, from its ``n`` values to the ``m`` answers that the concepts can give.

    Raises:
        ValueError: A name is unknown.
    """
    every = Vocabulary(groups, groups)
    known = every.concept_set("binary")
    wanted = [known.index(name) for name in names]
    matrices = []
    for position, group in enumerate(groups):
        values = [int(every.value[k]) for k in wanted if every.group[k] == position]
        answers = torch.eye(len(group.values))[:, values] @ 2.0 ** torch.arange(len(values))
        matrices.append(one_hot(torch.unique(answers, return_inverse=True)[1]).double())
    return matrices


@dataclass(frozen=True)
class Annotation:
    """How a training split is annotated.

    Args:
        annotator_noise: How often each annotator names a wrong value; concepts are the value most of them name, ties
            going to the first. None means one annotator without error.
        missing: Share of annotations left out (NaN).
        missing_by: Whether whole images or single concepts are left out.

    Raises:
        ValueError: A share is out of [0, 1], or there are no annotators.
    """

    annotator_noise: Sequence[float] | None = None
    missing: float = 0.0
    missing_by: MissingBy = "image"

    def __post_init__(self) -> None:
        check_share(self.missing, "concept_missing")
        if self.missing_by not in get_args(MissingBy):
            raise ValueError(f"missing_by: expected one of {get_args(MissingBy)}, got {self.missing_by!r}")
        if self.annotator_noise is not None and not len(self.annotator_noise):
            raise ValueError("annotator_noise: expected a rate an annotator, or null for exact annotations, got none")
        for rate in self.annotator_noise or ():
            check_share(rate, "annotator_noise")

    def annotate(self, weights: Tensor, vocabulary: Vocabulary, randomness: Randomness) -> tuple[Tensor, Tensor]:
        """Concepts and how certain they are.

        Args:
            weights: ``[N, G, V]`` with what probability an annotator without error names each value.
            vocabulary: The concepts.
            randomness: Samples and streams.

        Returns:
            ``concepts [N, K]`` with NaN where left out, and ``certainty [N, K]``, the share of annotators who agree.
        """
        rates = self.annotator_noise or (0.0,)
        votes = torch.stack([self._vote(weights, vocabulary, rate, m, randomness) for m, rate in enumerate(rates)])
        counts = one_hot(votes, weights.shape[-1]).sum(0).float()
        # half a vote lets the first annotator break ties without ever outvoting two
        counts.scatter_add_(-1, votes[0][..., None], torch.full((*votes.shape[1:], 1), 0.5))
        concepts = vocabulary.of_values(counts.argmax(-1))
        certainty = (vocabulary.of_values(votes) == concepts).float().mean(0)
        columns = 1 if self.missing_by == "image" else concepts.shape[1]
        gaps = randomness.uniform("missing", columns) < self.missing
        return concepts.masked_fill(gaps, torch.nan), certainty

    @staticmethod
    def _vote(weights: Tensor, vocabulary: Vocabulary, rate: float, annotator: int, randomness: Randomness) -> Tensor:
        """``[N, G]`` the values that one annotator names."""
        number = weights.shape[1]
        votes = named(weights, randomness.uniform(f"vote {annotator}", number))
        sizes = torch.tensor([len(group.values) for group in vocabulary.groups])
        step = 1 + (randomness.uniform(f"vote {annotator}/step", number) * (sizes - 1)).long()
        errs = randomness.uniform(f"vote {annotator}/errs", number) < rate
        return torch.where(errs, (votes + step) % sizes, votes)


def named(weights: Tensor, uniform: Tensor) -> Tensor:
    """``[N, G]`` values drawn by their weights ``[N, G, V]``, given uniforms ``[N, G]``."""
    reached = weights.cumsum(-1)
    # short of one, so that rounding in the sums cannot lead past the last value
    return (uniform[..., None] * (1 - 1e-6) >= reached).sum(-1)
