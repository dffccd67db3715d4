"""How a label follows from attribute values: prototypes of classes, or a table over every combination of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cbm_lightning.data.birds.attributes import ATTRIBUTES, Group, find_group, find_groups, find_value

Rule = Literal["codebook", "table", "linear", "xor", "count"]
Combination = dict[int, int]
"""Positions of groups to positions of their values."""

_CODEBOOK_TRIES = 200
_BALANCING_STEPS = 100


@dataclass(frozen=True)
class LabelRule:
    """A rule from attribute values to a class.

    - ``codebook``: the class comes first and has a prototype value in every group.
    - ``table``: a random table over the values of a few groups, each class as often as every other.
    - ``linear``: the largest of random linear scores of the values, offset so that classes are about equally frequent.
    - ``xor``: the sum of two groups' values modulo the number of classes; of two classes and two-valued groups, xor.
    - ``count``: in how many groups the value is not the first; the last class stands for that many or more.

    Args:
        name: One of the above.
        groups: The groups of the birds.
        num_classes: Number of classes, or None: 12, for ``xor`` 2, for ``count`` one more than groups counted.
        rule_groups: Groups that the rule reads, or None: all for ``linear``, body colour, beak and crest for
            ``table``, crest and wing bar for ``xor``, the four two-valued ones for ``count``. ``codebook`` reads all.
        seed: Seed of prototypes, tables and weights.
        forbidden: Combinations that no prototype may show.

    Raises:
        ValueError: The rule is unknown, or a class could never occur.
    """

    name: Rule
    groups: Sequence[Group]
    num_classes: int | None = None
    rule_groups: Sequence[str] | None = None
    seed: int = 0
    forbidden: Sequence[Combination] = ()

    def __post_init__(self) -> None:
        if self.name not in get_args(Rule):
            raise ValueError(f"rule: expected one of {get_args(Rule)}, got {self.name!r}")
        if self.name == "codebook" and self.rule_groups is not None:
            raise ValueError("rule_groups: prototypes of a codebook span all groups; leave it out or change rule")
        read = find_groups(self.rule_groups, self.groups, "rule_groups", self._default_groups())
        if self.name == "xor" and len(read) != 2:
            raise ValueError(f"rule_groups: xor reads two groups, got {[group.name for group in read]}")
        default = {"xor": 2, "count": len(read) + 1}.get(self.name, 12)
        classes = default if self.num_classes is None else self.num_classes
        sizes = [len(group.values) for group in read]
        most = {"xor": sum(sizes) - 1, "count": len(read) + 1}.get(self.name, prod(sizes))
        if not 2 <= classes <= most:
            raise ValueError(
                f"num_classes: rule {self.name!r} over these groups allows 2 to {most} classes, got {classes}"
            )
        object.__setattr__(self, "num_classes", classes)
        object.__setattr__(self, "rule_groups", [group.name for group in read])

    def _default_groups(self) -> list[Group]:
        names = {"table": ("body colour", "beak", "crest"), "xor": ("crest", "wing bar")}.get(self.name)
        if self.name == "count":
            names = tuple(group.name for group in ATTRIBUTES if len(group.values) == 2)
        return [group for group in self.groups if names is None or group.name in names]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each group."""
        return tuple(len(group.values) for group in self.groups)

    @property
    def classes(self) -> int:
        """Number of classes ``L``."""
        assert self.num_classes is not None
        return self.num_classes

    def prototypes(self) -> Tensor:
        """``[L, G]`` values of each class under ``codebook``: random, different, balanced in every group.

        Prototypes that repeat another or show a forbidden combination are drawn again, at the price of some balance.

        Raises:
            ValueError: There are not enough different prototypes without a forbidden combination.
        """
        generator = torch.Generator().manual_seed(self.seed)
        book = torch.stack([self._balanced(self.classes, size, generator) for size in self.sizes], dim=1)
        for _ in range(_CODEBOOK_TRIES):
            _, same, number = torch.unique(book, dim=0, return_inverse=True, return_counts=True)
            unfit = matches(book, self.forbidden) | (number[same] > 1)
            if not unfit.any():
                return book
            shape = (int(unfit.sum()),)
            book[unfit] = torch.stack([torch.randint(size, shape, generator=generator) for size in self.sizes], dim=1)
        raise ValueError(
            f"num_classes: found no {self.classes} prototypes that differ and avoid held_out; ask for fewer classes or "
            "hold out fewer combinations"
        )

    @staticmethod
    def _balanced(number: int, size: int, generator: torch.Generator) -> Tensor:
        """``[number]`` values below ``size``, each about equally often, in random order."""
        offset = torch.randint(size, (1,), generator=generator)
        return ((torch.arange(number) + offset) % size)[torch.randperm(number, generator=generator)]

    def table(self) -> Tensor:
        """``[C]`` the class of every combination of values, in the order of `torch.cartesian_prod`."""
        generator = torch.Generator().manual_seed(self.seed)
        assert self.rule_groups is not None
        read = [i for i, group in enumerate(self.groups) if group.name in self.rule_groups]
        values = torch.cartesian_prod(*(torch.arange(size) for size in self.sizes))[:, read]
        sizes = [self.sizes[i] for i in read]
        match self.name:
            case "table":
                return self._balanced(prod(sizes), self.classes, generator)[flat_index(values, sizes)]
            case "linear":
                return self._linear(values, sizes, generator)
            case "xor":
                return values.sum(1) % self.classes
            case _:
                return (values > 0).sum(1).clamp(max=self.classes - 1)

    def _linear(self, values: Tensor, sizes: Sequence[int], generator: torch.Generator) -> Tensor:
        shown = torch.cat([one_hot(values[:, i], size) for i, size in enumerate(sizes)], dim=1).float()
        scores = shown @ torch.randn(shown.shape[1], self.classes, generator=generator)
        offset = torch.zeros(self.classes)
        for _ in range(_BALANCING_STEPS):
            share = torch.bincount((scores + offset).argmax(1), minlength=self.classes) / len(scores)
            offset -= 2.0 * (share - 1 / self.classes)
        return (scores + offset).argmax(1)


def combination(named: Mapping[str, str], groups: Sequence[Group], field: str) -> Combination:
    """The positions that a mapping of group names to value names stands for.

    Raises:
        ValueError: A group or a value is unknown, or the mapping is empty.
    """
    if not named:
        raise ValueError(f"{field}: a combination needs at least one group with its value, got an empty one")
    found = {name: find_group(name, groups, field) for name in named}
    return {groups.index(group): find_value(named[name], group, field) for name, group in found.items()}


def flat_index(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """``[N]`` position of each row of ``[N, G]`` values among all combinations, the last group running fastest."""
    index = torch.zeros(len(values), dtype=torch.long)
    for column, size in enumerate(sizes):
        index = index * size + values[:, column]
    return index


def matches(values: Tensor, combinations: Sequence[Combination]) -> Tensor:
    """``[N]`` bool: rows of ``[N, G]`` values that show at least one of the combinations."""
    found = torch.zeros(len(values), dtype=torch.bool)
    for combination in combinations:
        found |= (values[:, list(combination)] == torch.tensor(list(combination.values()))).all(1)
    return found
