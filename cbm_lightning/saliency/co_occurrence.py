"""Which concepts no map can tell apart, because the data never separates them (Furby et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet

if TYPE_CHECKING:
    import pandas as pd

# rows that are counted at once: their counts are exact in single precision, and memory is bounded
_ROWS_AT_ONCE = 1 << 16
_MOST_LISTED = 8


@dataclass(frozen=True)
class CoOccurrence:
    """How concepts come together in annotations; all tensors are on the CPU.

    Attributes:
        names: ``K`` names.
        known: ``[K]`` int64, samples in which a concept is annotated.
        holds: ``[K]`` int64, samples in which it holds.
        together: ``[K, K]`` int64, samples in which both hold.
        either: ``[K, K]`` int64, samples in which both are annotated and at least one holds.
        conditional: ``[K, K]``, the share ``P(c_j = 1 | c_i = 1)`` in row ``i``, NaN where ``c_i`` never holds while
            ``c_j`` is annotated.
        separated: ``[K, K]`` share of ``either`` in which exactly one of the two holds, NaN where neither ever does.
            0 for concepts that always come together, 1 for concepts that never do.
        distinct_vectors: Number of different vectors among the samples of which every concept is annotated.
        function_of_class: Whether images of a class never differ in a concept; None without labels.
        groups: Positions of concepts that come together: those of pairs with ``separated`` of at most
            ``min_separated``, and of chains of such pairs; two concepts or more each, largest first.
        always_present: Positions of concepts that hold in every sample in which they are annotated.
        min_separated: The limit.
    """

    names: tuple[str, ...]
    known: Tensor
    holds: Tensor
    together: Tensor
    either: Tensor
    conditional: Tensor
    separated: Tensor
    distinct_vectors: int
    function_of_class: bool | None
    groups: list[list[int]]
    always_present: list[int]
    min_separated: float

    def inseparable(self) -> Tensor:
        """``[K]`` bool, concepts that cannot be localised on their own: in a group, or there in every image.

        Concepts that exclude each other are separated: where one is shown, the other is not.
        """
        found = torch.zeros(len(self.names), dtype=torch.bool)
        found[[k for group in self.groups for k in group] + self.always_present] = True
        return found

    def closest(self) -> Tensor:
        """``[K]`` int64, the other concept from which each is least separated, -1 where that is not known."""
        apart = self.separated.clone().fill_diagonal_(torch.nan).nan_to_num(nan=torch.inf)
        return torch.where(apart.isinf().all(1), -1, apart.argmin(1))

    def sentences(self, limit: int | None = None) -> list[str]:
        """What was found, in plain words: of the class first, then of groups, then of concepts that are always there.

        Args:
            limit: At most this many sentences; all by default.

        Raises:
            ValueError: ``limit`` is negative.
        """
        if limit is not None and limit < 0:
            raise ValueError(f"limit: expected at least 0 sentences, got {limit}")
        found = []
        if self.function_of_class:
            found.append(
                f"images of a class never differ in a concept (there are {self.distinct_vectors} different concept "
                "vectors): a map may show what tells the classes apart instead of the concept"
            )
        found += [self._of_group(group) for group in self.groups]
        found += [
            f"{self.names[k]!r} holds in all {int(self.known[k])} images: no image without it shows what it is not"
            for k in self.always_present
        ]
        return found[:limit]

    def table(self) -> pd.DataFrame:
        """A row a concept, the least separated first.

        Returns:
            ``concept``, ``prevalence`` (share of annotated images in which it holds), ``closest`` (the other concept
            from which it is least separated, None if there is none), ``separated`` (from it, in [0, 1] or NaN), and
            ``inseparable_from`` (names joined by ``; ``, and ``<every image>`` if it is always present).
        """
        import pandas as pd

        closest = self.closest().tolist()
        prevalence = (self.holds / self.known).tolist()
        rows = [
            {
                "concept": name,
                "prevalence": prevalence[k],
                "closest": None if closest[k] < 0 else self.names[closest[k]],
                "separated": math.nan if closest[k] < 0 else float(self.separated[k, closest[k]]),
                "inseparable_from": "; ".join(self._partners(k)),
            }
            for k, name in enumerate(self.names)
        ]
        table = pd.DataFrame(rows, columns=["concept", "prevalence", "closest", "separated", "inseparable_from"])
        return table.sort_values("separated", kind="stable", ignore_index=True)

    def _partners(self, concept: int) -> list[str]:
        others = [self.names[k] for group in self.groups if concept in group for k in group if k != concept]
        return others + ["<every image>"] * (concept in self.always_present)

    def _of_group(self, group: list[int]) -> str:
        listed = _listed([self.names[k] for k in group])
        if len(group) == 2:
            together, either = (int(x[group[0], group[1]]) for x in (self.together, self.either))
            return (
                f"{listed} come together in {_percent(together, either)} of {either} images in which either holds: "
                "no map can show that the model tells them apart"
            )
        inside = self.separated[group][:, group].clone().fill_diagonal_(torch.nan).nan_to_num(nan=torch.inf)
        # of the partner from which it is least separated, the concept that is least tied to the others
        loosest = int(inside.amin(1).argmax())
        partner = group[int(inside[loosest].argmin())]
        together, either = (int(x[group[loosest], partner]) for x in (self.together, self.either))
        return (
            f"{listed} come together, each with another of them in {_percent(together, either)} or more of the images "
            "in which either holds: no map can show that the model tells them apart"
        )


def cooccurrence(
    concepts: Tensor,
    names: ConceptSet | Sequence[str],
    labels: Tensor | None = None,
    min_separated: float = 0.01,
) -> CoOccurrence:
    """Find concepts that cannot be localised separately, because they come together in the data.

    Where two concepts always hold in the same images, a model predicts both equally well from the pixels of either
    ("Can we constrain concept bottleneck models to learn semantically meaningful input features?", Furby et al. 2024).
    `ConceptSet.diagnose` tells of pairs that are exactly equal or opposite; here near misses count too, and opposites
    do not: where one of two opposites is shown the other is not, so they can be localised.

    Args:
        concepts: ``[N, K]`` annotations, a concept holds from one half; NaN where not annotated. Real-valued concepts
            of a `ConceptSet` are not looked at.
        names: ``K`` names, or the concept set.
        labels: ``[N]`` class indices, to find concepts that are a function of the class.
        min_separated: Pairs are inseparable if exactly one of them holds in at most this share of the samples in which
            either holds.

    Raises:
        ValueError: Shapes do not fit, there is no sample, annotations lie outside [0, 1], or ``min_separated`` is not
            in [0, 1).

    Example:
        >>> concepts = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1], [1.0, 1.0, float("nan")]])
        >>> found = cooccurrence(concepts, ["long beak", "long tail", "crest"])
        >>> found.groups, found.inseparable().tolist(), found.distinct_vectors
        ([[0, 1]], [True, True, False], 3)
        >>> found.sentences()[0][:72]
        "'long beak' and 'long tail' come together in 100 % of 3 images in which "
    """
    concept_set = ConceptSet.make(names)
    _check(concepts, concept_set, labels, min_separated)
    raw = concepts.detach().cpu()
    real = concept_set.is_real()
    known, shown = ~raw.isnan() & ~real, (raw >= 0.5) & ~real
    together, alone = _pair_counts(shown, known)
    apart = alone + alone.T
    either = together + apart
    separated = apart / either
    holds, annotated = shown.sum(0), known.sum(0)
    return CoOccurrence(
        names=tuple(concept_set.names),
        known=annotated,
        holds=holds,
        together=together,
        either=either,
        conditional=together / (together + alone),
        separated=separated,
        distinct_vectors=_distinct_rows(shown[(known | real).all(1)]),
        function_of_class=None if labels is None else ConceptSet.is_function_of_class(raw.float(), labels.cpu()),
        groups=_components((separated <= min_separated).fill_diagonal_(False)),
        always_present=((holds == annotated) & (annotated > 0)).nonzero().flatten().tolist(),
        min_separated=min_separated,
    )


def _check(concepts: Tensor, concept_set: ConceptSet, labels: Tensor | None, min_separated: float) -> None:
    if concepts.ndim != 2 or concepts.shape[1] != len(concept_set) or not len(concepts):
        raise ValueError(f"concepts: expected [N, {len(concept_set)}] with N of 1 or more, got {list(concepts.shape)}")
    outside = ((concepts < 0) | (concepts > 1)) & ~concept_set.is_real().to(concepts.device)
    if bool(outside.any()):
        row, k = outside.nonzero()[0].tolist()
        raise ValueError(
            f"concepts: expected values in [0, 1] or NaN, got {float(concepts[row, k]):g} for {concept_set.names[k]!r}"
        )
    if labels is not None and labels.shape != concepts.shape[:1]:
        raise ValueError(f"labels: expected [{len(concepts)}], one a sample, got {list(labels.shape)}")
    if not 0 <= min_separated < 1:
        raise ValueError(f"min_separated: expected a share in [0, 1), got {min_separated}")


def _pair_counts(shown: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """``[K, K]`` int64 each: how often both concepts hold, and how often the first does and the second does not."""
    together = alone = torch.zeros(shown.shape[1], shown.shape[1], dtype=torch.int64)
    for yes, seen in zip(shown.split(_ROWS_AT_ONCE), known.split(_ROWS_AT_ONCE), strict=True):
        holds = yes.float()
        together = together + (holds.T @ holds).long()
        alone = alone + (holds.T @ (seen & ~yes).float()).long()
    return together, alone


def _distinct_rows(rows: Tensor) -> int:
    """Number of different rows of ``[N, K]`` bool."""
    if not len(rows):
        return 0
    packed = np.ascontiguousarray(np.packbits(rows.numpy(), axis=1))
    return len(np.unique(packed.view(f"V{packed.shape[1]}")))


def _components(linked: Tensor) -> list[list[int]]:
    """Positions of each connected part of two or more of a graph ``[K, K]`` bool, the largest first."""
    number = len(linked)
    reached = linked | torch.eye(number, dtype=torch.bool)
    lowest = torch.arange(number)
    while True:
        # each takes the lowest position that a neighbour knows of, until nobody learns of a lower one
        spread = torch.where(reached, lowest, number).amin(1)
        if torch.equal(spread, lowest):
            break
        lowest = spread
    parts = [(lowest == k).nonzero().flatten().tolist() for k in lowest.unique().tolist()]
    return sorted((part for part in parts if len(part) > 1), key=len, reverse=True)


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence; of many, the first and how many more."""
    quoted = [repr(name) for name in names[:_MOST_LISTED]]
    if len(names) > _MOST_LISTED:
        quoted.append(f"{len(names) - _MOST_LISTED} more")
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


def _percent(part: int, whole: int) -> str:
    """In tenths of a percent, rounded down: 100 only where it is exact."""
    return f"{1000 * part // whole / 10:g} %"
