"""The joint distribution of labels and attribute values: drawing from it, and exact sums over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cbm_lightning.data.birds.attributes import ATTRIBUTES, Group, check_share, find_groups
from cbm_lightning.data.birds.rules import Combination, LabelRule, flat_index, matches
from cbm_lightning.randomness import Randomness

# divisible by 2, 3 and 4, so that no edge between values falls on a point and a correlation of one is exact too
_QUADRATURE_POINTS = 384
_MOST_ATTEMPTS = 200


@dataclass(frozen=True)
class Birds:
    """Labels and attribute values of ``N`` birds.

    Attributes:
        labels: ``[N]`` classes.
        own: ``[N, G]`` the values from which the label follows (or, under a codebook, which follow from it).
        values: ``[N, G]`` the values that are drawn: ``own`` after within-class variation and substitution.
        swapped: ``[N]`` position of the group that was substituted, -1 where none was.
    """

    labels: Tensor
    own: Tensor
    values: Tensor
    swapped: Tensor


class Population:
    """Birds whose values make a label by a rule and then vary.

    A bird first has values ``u``: its class's prototype under the codebook, otherwise uniform (or correlated) values
    from which the rule takes the label. Then each group is drawn anew with probability ``variation``, whatever the
    label. Correlated groups are drawn anew together, their values from a Gaussian copula of one factor, so that each
    value keeps its probability.

    Args:
        rule: The label rule.
        variation: Probability in [0, 1] that a group's value is drawn anew.
        correlation: Correlation in [0, 1] of any two correlated groups on the copula's normal scale.
        correlated_groups: Names of the groups that are correlated; None means all ten attributes if ``correlation``
            is above 0.

    Raises:
        ValueError: A share is out of range, or fewer than two groups are to be correlated.
    """

    def __init__(
        self,
        rule: LabelRule,
        variation: float = 0.1,
        correlation: float = 0.0,
        correlated_groups: Sequence[str] | None = None,
    ) -> None:
        check_share(variation, "within_class_variation")
        check_share(correlation, "group_correlation")
        block = find_groups(correlated_groups, rule.groups, "correlated_groups", ATTRIBUTES)
        if len(block) < 2:
            raise ValueError(f"correlated_groups: expected at least two, got {[group.name for group in block]}")
        self.rule = rule
        self.variation = variation
        self.correlation = correlation
        self.block = [i for i, group in enumerate(rule.groups) if group in block] if correlation > 0 else []

    @property
    def groups(self) -> Sequence[Group]:
        """The groups of the birds, in the order of the columns of their values."""
        return self.rule.groups

    @cached_property
    def _prototypes(self) -> Tensor | None:
        return self.rule.prototypes() if self.rule.name == "codebook" else None

    @cached_property
    def _table(self) -> Tensor:
        return self.rule.table()

    def sample(
        self,
        randomness: Randomness,
        *,
        excluded: Sequence[Combination] = (),
        forced: Sequence[Combination] = (),
        forced_share: float = 0.0,
        swap: float = 0.0,
    ) -> Birds:
        """Draw one bird a sample of ``randomness``.

        Args:
            randomness: Samples and streams.
            excluded: Combinations of values that no bird may show; birds that would are drawn again.
            forced: Combinations of which one is imposed on a share of the birds.
            forced_share: That share.
            swap: Share of birds of which one group takes a value that is not its own, all else kept.

        Raises:
            ValueError: The excluded combinations leave no bird.
        """
        birds = self._draw(randomness, "birds", forced, forced_share)
        open_rows = matches(birds.values, excluded).nonzero()[:, 0]
        attempt = 0
        while len(open_rows):
            attempt += 1
            if attempt > _MOST_ATTEMPTS:
                raise ValueError("held_out: nearly every bird shows a held-out combination; hold out fewer values")
            again = self._draw(randomness.rows(open_rows), f"birds again {attempt}", forced, forced_share)
            for old, new in zip(
                (birds.labels, birds.own, birds.values), (again.labels, again.own, again.values), strict=True
            ):
                old[open_rows] = new
            open_rows = open_rows[matches(again.values, excluded)]
        return self._swap(birds, randomness, swap)

    def _draw(self, randomness: Randomness, stream: str, forced: Sequence[Combination], share: float) -> Birds:
        which = torch.full_like(randomness.index, -1)
        if forced and share > 0:
            chosen = randomness.happens(f"{stream}/forced", share)
            which[chosen] = randomness.choice(f"{stream}/which", len(forced))[chosen]
        if self._prototypes is not None:
            labels = randomness.choice(f"{stream}/label", self.rule.classes)
            own = self._prototypes[labels]
        else:
            own = _impose(self._anew(randomness, f"{stream}/own"), forced, which)
            labels = self._table[flat_index(own, self.rule.sizes)]
        varies = randomness.uniform(f"{stream}/varies", len(self.groups)) < self.variation
        if self.block:
            varies[:, self.block] = varies[:, self.block[:1]]
        values = torch.where(varies, self._anew(randomness, f"{stream}/anew"), own)
        return Birds(labels, own, _impose(values, forced, which), torch.full_like(labels, -1))

    def _anew(self, randomness: Randomness, stream: str) -> Tensor:
        """``[N, G]`` values whatever the label."""
        uniform = randomness.uniform(stream, len(self.groups))
        if self.block:
            normal = randomness.normal(f"{stream}/copula", len(self.block) + 1)
            mixed = self.correlation**0.5 * normal[:, :1] + (1 - self.correlation) ** 0.5 * normal[:, 1:]
            uniform[:, self.block] = torch.special.ndtr(mixed)
        sizes = torch.tensor(self.rule.sizes)
        return torch.minimum((uniform * sizes).long(), sizes - 1)

    def _swap(self, birds: Birds, randomness: Randomness, share: float) -> Birds:
        chosen = randomness.happens("swap", share)
        group = torch.where(chosen, randomness.choice("swap/group", len(ATTRIBUTES)), -1)
        rows, columns = chosen.nonzero()[:, 0], group[chosen]
        sizes = torch.tensor(self.rule.sizes)[columns]
        step = 1 + (randomness.uniform("swap/step", 1)[rows, 0] * (sizes - 1)).long()
        values = birds.values.clone()
        values[rows, columns] = (birds.own[rows, columns] + step) % sizes
        return Birds(birds.labels, birds.own, values, group)

    @cached_property
    def _block_law(self) -> Tensor:
        """``[1, n.., ]`` probability of each combination of correlated values; unit axes for the other groups."""
        factor = torch.special.ndtri((torch.arange(_QUADRATURE_POINTS).double() + 0.5) / _QUADRATURE_POINTS)
        conditional = []
        for size in (self.rule.sizes[i] for i in self.block):
            edges = torch.special.ndtri(torch.arange(size + 1).double() / size)
            below = torch.special.ndtr(
                (edges - self.correlation**0.5 * factor[:, None]) / (1 - self.correlation) ** 0.5
            )
            conditional.append(below.diff(dim=1))
        law: Tensor = torch.zeros(())
        for point in range(_QUADRATURE_POINTS):
            product = torch.ones(1, dtype=torch.double)
            for chances in conditional:
                product = product[..., None] * chances[point]
            law = law + product / _QUADRATURE_POINTS
        return law.reshape(1, *(size if i in self.block else 1 for i, size in enumerate(self.rule.sizes)))

    @cached_property
    def joint(self) -> Tensor:
        """``[L, n1, .., nG]`` exact probability of a label and the values ``u`` before variation."""
        sizes, classes = self.rule.sizes, self.rule.classes
        if self._prototypes is not None:
            joint = torch.zeros(classes, len(torch.empty(sizes).flatten()), dtype=torch.double)
            joint[torch.arange(classes), flat_index(self._prototypes, sizes)] = 1 / classes
            return joint.reshape(classes, *sizes)
        prior = torch.ones(1, *sizes, dtype=torch.double)
        for i, size in enumerate(sizes):
            prior /= 1 if i in self.block else size
        if self.block:
            prior = prior * self._block_law
        labels = torch.arange(classes)[:, None] == self._table
        return labels.reshape(classes, *sizes) * prior

    def label_and(self, patterns: Sequence[Tensor]) -> Tensor:
        """``[L, m1, .., mG]`` exact probability of a label and what is seen of the values after variation.

        Args:
            patterns: A 0/1 matrix ``[n, m]`` a group, from its values to what is seen of them: the identity to see
                the value, one column of ones to see nothing.
        """
        if not self.block:
            return _contract(self.joint, [self._channel(i) @ pattern for i, pattern in enumerate(patterns)])
        inside = [i in self.block for i in range(len(self.groups))]
        kept = [p if b else self._channel(i) @ p for i, (b, p) in enumerate(zip(inside, patterns, strict=True))]
        lost = [torch.ones(len(p), 1).double() if b else k for b, p, k in zip(inside, patterns, kept, strict=True)]
        seen = [p if b else torch.ones(1, 1).double() for b, p in zip(inside, patterns, strict=True)]
        anew = _contract(self.joint, lost) * _contract(self._block_law, seen)
        return (1 - self.variation) * _contract(self.joint, kept) + self.variation * anew

    def _channel(self, group: int) -> Tensor:
        """``[n, n]`` probability of the value drawn given the value before variation."""
        size = self.rule.sizes[group]
        return (1 - self.variation) * torch.eye(size).double() + self.variation / size

    @cached_property
    def typical(self) -> Tensor:
        """``[L, G]`` the most frequent value of each group in each class."""
        columns = []
        for g in range(len(self.groups)):
            patterns = [torch.eye(n) if i == g else torch.ones(n, 1) for i, n in enumerate(self.rule.sizes)]
            columns.append(self.label_and([pattern.double() for pattern in patterns]).flatten(1).argmax(1))
        return torch.stack(columns, dim=1)


def _contract(joint: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply a matrix to each axis after the first; each step takes the second axis away and appends the new one."""
    for matrix in matrices:
        joint = torch.tensordot(joint, matrix, dims=([1], [0]))
    return joint


def _impose(values: Tensor, combinations: Sequence[Combination], which: Tensor) -> Tensor:
    """``values [N, G]`` with combination ``which[n]`` (none where -1) written over them."""
    imposed = values.clone()
    for position, combination in enumerate(combinations):
        for group, value in combination.items():
            imposed[which == position, group] = value
    return imposed
