"""What a person is asked about at a time: single concepts, or groups of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet

Reduce = Literal["mean", "max", "sum"]
Unit = Literal["concept", "group"]


@dataclass(frozen=True)
class Units:
    """The units of an intervention: each asks about one concept or about all concepts of a group.

    Attributes:
        names: One a unit.
        membership: ``[U, K]`` bool, which concepts a unit asks about; every concept belongs to exactly one.
        costs: ``[U]`` what asking about a unit costs.
        reduce: How the scores of concepts become the score of their group.
    """

    names: tuple[str, ...]
    membership: Tensor
    costs: Tensor
    reduce: Reduce = "mean"

    @classmethod
    def make(
        cls,
        concepts: ConceptSet,
        unit: Unit | Mapping[str, Sequence[str]] = "concept",
        reduce: Reduce = "mean",
        costs: float | Mapping[str, float] = 1.0,
    ) -> Units:
        """Units of a concept set.

        Args:
            concepts: The concept set.
            unit: ``"concept"``, ``"group"`` (those of the concept set), or groups of one's own: name to concept names.
            reduce: ``"mean"`` (Shin et al. 2023), ``"max"`` (cem's uncertainty policy) or ``"sum"`` (CooP, Google).
            costs: Of every unit, or unit name to cost; 1 where none is given.

        Raises:
            ValueError: Groups do not cover every concept exactly once, a name is unknown, or a cost is negative.

        Example:
            >>> concepts = ConceptSet(["red", "blue", "round"], groups={"colour": ["red", "blue"]})
            >>> Units.make(concepts, "group").names
            ('colour', 'round')
        """
        if reduce not in ("mean", "max", "sum"):
            raise ValueError(f"group_reduce: expected 'mean', 'max' or 'sum', got {reduce!r}")
        groups = _groups(concepts, unit)
        membership = torch.zeros(len(groups), len(concepts), dtype=torch.bool)
        for row, members in enumerate(groups.values()):
            membership[row, members] = True
        counts = membership.sum(0)
        if (counts != 1).any():
            missing = [concepts.names[k] for k in (counts == 0).nonzero().flatten().tolist()]
            repeated = [concepts.names[k] for k in (counts > 1).nonzero().flatten().tolist()]
            raise ValueError(
                f"unit: the groups must cover each of the {len(concepts)} concepts once; in no group are "
                f"{missing[:5]}, in several {repeated[:5]}"
            )
        return cls(tuple(groups), membership, _costs(tuple(groups), costs), reduce)

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Position of a unit.

        Raises:
            ValueError: There is none of that name; the message lists near matches.
        """
        if name in self.names:
            return self.names.index(name)
        near = difflib.get_close_matches(name, self.names, n=3) or list(self.names[:5])
        raise ValueError(f"no unit is called {name!r}; did you mean one of {near}?")

    def to(self, device: torch.device) -> Units:
        """The same units on a device."""
        return Units(self.names, self.membership.to(device), self.costs.to(device), self.reduce)

    @cached_property
    def _owner(self) -> Tensor:
        """``[K]`` the unit of each concept."""
        return self.membership.int().argmax(0)

    @cached_property
    def _members(self) -> Tensor:
        """``[U, G]`` the concepts of each unit, padded with any; groups cost what they hold, not ``U K``."""
        largest = int(self.membership.sum(1).max())
        return self.membership.int().topk(largest, dim=1).indices

    @cached_property
    def _present(self) -> Tensor:
        """``[U, G]`` bool, which of them are no padding."""
        return self.membership.gather(1, self._members)

    def expand(self, units: Tensor) -> Tensor:
        """``[..., U]`` bool to the concepts ``[..., K]`` of these units."""
        return units[..., self._owner]

    def touched(self, concepts: Tensor) -> Tensor:
        """``[..., K]`` bool to the units ``[..., U]`` with at least one of these concepts."""
        return (concepts[..., self._members] & self._present).any(-1)

    def scores(self, scores: Tensor, open_concepts: Tensor) -> Tensor:
        """Scores of concepts to scores of units.

        Args:
            scores: ``[B, K]``.
            open_concepts: ``[B, K]`` bool; the others do not count.

        Returns:
            ``[B, U]``, minus infinity where no member is open.
        """
        each = scores[..., self._members]  # [B, U, G], G concepts in the largest group
        member = open_concepts[..., self._members] & self._present
        if self.reduce == "max":
            return torch.where(member, each, -torch.inf).amax(-1)
        total = torch.where(member, each, 0.0).sum(-1)
        count = member.sum(-1)
        total = total / count.clamp(min=1) if self.reduce == "mean" else total
        return total.masked_fill(count == 0, -torch.inf)


def _groups(concepts: ConceptSet, unit: Unit | Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    if isinstance(unit, Mapping):
        return {name: [concepts.index(member) for member in members] for name, members in unit.items()}
    if unit == "concept":
        return {name: [k] for k, name in enumerate(concepts)}
    if unit == "group":
        return concepts.group_indices()
    raise ValueError(f"unit: expected 'concept', 'group' or a mapping of group names to concepts, got {unit!r}")


def _costs(names: tuple[str, ...], costs: float | Mapping[str, float]) -> Tensor:
    if isinstance(costs, Mapping):
        if unknown := set(costs) - set(names):
            raise ValueError(f"costs: expected units such as {list(names[:5])}, got also {sorted(unknown)}")
        values = torch.tensor([float(costs.get(name, 1.0)) for name in names])
    else:
        values = torch.full((len(names),), float(costs))
    if not (values >= 0).all() or values.isinf().any():
        raise ValueError(f"costs: expected finite numbers of at least 0, got {costs}")
    return values
