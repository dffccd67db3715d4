"""`ConceptSet`: the names, groups, kinds and texts of the concepts of a model."""

from __future__ import annotations

import csv
import difflib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import yaml
from torch import Tensor

Kind = Literal["binary", "categorical", "real"]


class CoOccurrenceWarning(UserWarning):
    """The training data cannot tell concepts apart, from each other or from the class."""


@dataclass(frozen=True)
class ConceptSet:
    """Concepts with names, and optionally groups, kinds and texts.

    Args:
        names: One unique name a concept; ``K`` is their number.
        groups: Group name to the names of its members. Concepts in no group form groups of their own.
        kinds: ``"binary"``, ``"categorical"`` (a member of a group of which exactly one holds) or ``"real"``, a kind a
            concept; one kind for all may be given as a string.
        texts: A sentence a concept for text encoders; the name serves where there is none.
        embeddings: ``[K, D]`` text vectors of the concepts, if they exist already. Not written to files.

    Raises:
        ValueError: Names are empty or repeated, a group names an unknown concept or one that another group has, a
            categorical concept has no group of categorical concepts, or a length differs from ``K``.

    Example:
        >>> concepts = ConceptSet(["red", "blue", "round"], groups={"colour": ["red", "blue"]})
        >>> len(concepts), concepts.index("blue")
        (3, 1)
        >>> concepts.group_indices()
        {'colour': [0, 1], 'round': [2]}
    """

    names: Sequence[str]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    kinds: Sequence[Kind] | Kind = "binary"
    texts: Sequence[str] | None = None
    embeddings: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        kinds = (self.kinds,) * len(names) if isinstance(self.kinds, str) else tuple(self.kinds)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "groups", {name: tuple(members) for name, members in self.groups.items()})
        if self.texts is not None:
            object.__setattr__(self, "texts", tuple(self.texts))
        self._check_names()
        self._check_lengths()
        self._check_groups()

    def _check_names(self) -> None:
        if not self.names:
            raise ValueError("names: a concept set needs at least one concept, got none")
        if blank := [i for i, name in enumerate(self.names) if not name.strip()]:
            raise ValueError(f"names: concepts {blank} have an empty name")
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"names: each concept needs a name of its own, repeated are {repeated}")

    def _check_lengths(self) -> None:
        if len(self.kinds) != len(self):
            raise ValueError(f"kinds: expected one a concept ({len(self)}), got {len(self.kinds)}")
        if unknown := sorted({kind for kind in self.kinds if kind not in get_args(Kind)}):
            raise ValueError(f"kinds: expected {get_args(Kind)}, got {unknown}")
        if self.texts is not None and len(self.texts) != len(self):
            raise ValueError(f"texts: expected one a concept ({len(self)}), got {len(self.texts)}")
        if self.embeddings is not None and (self.embeddings.ndim != 2 or len(self.embeddings) != len(self)):
            raise ValueError(f"embeddings: expected [{len(self)}, D], got {list(self.embeddings.shape)}")

    def _check_groups(self) -> None:
        owner: dict[str, str] = {}
        for group, members in self.groups.items():
            if not members:
                raise ValueError(f"groups: group {group!r} has no members")
            for member in members:
                self.index(member)
                if member in owner:
                    raise ValueError(f"groups: concept {member!r} is in {owner[member]!r} and in {group!r}")
                owner[member] = group
            kinds = {self.kinds[self.index(member)] for member in members}
            if "categorical" in kinds and (kinds != {"categorical"} or len(members) < 2):
                raise ValueError(
                    f"groups: group {group!r} mixes kinds {sorted(kinds)} or has one member; a categorical group has "
                    "at least two members, all categorical"
                )
        for name, kind in zip(self.names, self.kinds, strict=True):
            if kind == "categorical" and name not in owner:
                raise ValueError(f"kinds: categorical concept {name!r} is in no group; put its alternatives in one")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def index(self, name: str) -> int:
        """Position of a concept.

        Raises:
            ValueError: There is no concept of that name; the message lists near matches.
        """
        try:
            return self.names.index(name)
        except ValueError:
            near = difflib.get_close_matches(name, self.names, n=3)
            hint = f"; did you mean {near}?" if near else f"; the first are {list(self.names[:5])}"
            raise ValueError(f"no concept is called {name!r}{hint}") from None

    def group_indices(self) -> dict[str, list[int]]:
        """Group name to positions, covering every concept; ungrouped concepts stand alone under their own name."""
        position = {name: i for i, name in enumerate(self.names)}
        grouped = {group: [position[member] for member in members] for group, members in self.groups.items()}
        taken = {i for members in grouped.values() for i in members}
        alone = {name: [i] for i, name in enumerate(self.names) if i not in taken}
        return dict(sorted({**grouped, **alone}.items(), key=lambda item: item[1][0]))

    def categorical_groups(self) -> list[list[int]]:
        """Positions of each group of which exactly one member holds."""
        position = {name: i for i, name in enumerate(self.names)}
        groups = [[position[member] for member in members] for members in self.groups.values()]
        return [members for members in groups if self.kinds[members[0]] == "categorical"]

    def is_real(self) -> Tensor:
        """``[K]`` bool, True for real-valued concepts."""
        return torch.tensor([kind == "real" for kind in self.kinds])

    def prompts(self) -> list[str]:
        """The text of each concept, its name where it has none."""
        return list(self.names if self.texts is None else self.texts)

    def select(self, names: Iterable[str]) -> ConceptSet:
        """The subset of the given concepts, in the order given. A categorical group cut to a part becomes binary."""
        kept = list(names)
        index = [self.index(name) for name in kept]
        groups = {g: [m for m in members if m in set(kept)] for g, members in self.groups.items()}
        whole = {m for g, members in groups.items() if len(members) == len(self.groups[g]) for m in members}
        kinds: list[Kind] = [
            "binary" if self.kinds[i] == "categorical" and name not in whole else self.kinds[i]  # type: ignore[misc]
            for name, i in zip(kept, index, strict=True)
        ]
        return ConceptSet(
            kept,
            {g: members for g, members in groups.items() if members},
            kinds,
            None if self.texts is None else [self.texts[i] for i in index],
            None if self.embeddings is None else self.embeddings[index],
        )

    def diagnose(self, concepts: Tensor, labels: Tensor | None = None) -> list[str]:
        """Say in words which concepts the data cannot tell apart.

        Args:
            concepts: ``[N, K]`` annotated concepts, NaN where not annotated.
            labels: ``[N]`` class indices, or None.

        Returns:
            One sentence a finding: constant concepts, pairs that are always equal or always opposite, and whether the
            concept vector is a function of the class (then concept accuracy is partly class accuracy, and a model may
            read the class instead of the concept).
        """
        if concepts.ndim != 2 or concepts.shape[1] != len(self):
            raise ValueError(f"concepts: expected [N, {len(self)}], got {list(concepts.shape)}")
        binary = [k for k in range(len(self)) if self.kinds[k] != "real"]
        known = ~concepts.isnan()
        low = concepts.masked_fill(~known, torch.inf).amin(0)
        high = concepts.masked_fill(~known, -torch.inf).amax(0)
        constant = set((low >= high).nonzero().flatten().tolist())
        found = [
            f"concept {self.names[k]!r} never varies: no model can show that it learned it" for k in sorted(constant)
        ]
        found += self._inseparable_pairs(concepts, [k for k in binary if k not in constant])
        if labels is not None and self.is_function_of_class(concepts, labels):
            found.append(
                "the concept vector is a function of the class: images of a class never differ in a concept, so "
                "concept accuracy is partly class accuracy and concepts can be read off the class"
            )
        return found

    def _inseparable_pairs(self, concepts: Tensor, candidates: list[int]) -> list[str]:
        hard = (concepts >= 0.5).double().masked_fill(concepts.isnan(), 0.0)[:, candidates]
        known = (~concepts.isnan()).double()[:, candidates]
        both = known.T @ known
        equal = hard.T @ hard + (known - hard).T @ (known - hard)
        always = (torch.where(equal == both, 1, 0) - torch.where(equal == 0, 1, 0)) * (both > 0)
        relation = {1: "equal", -1: "opposite"}
        return [
            f"concepts {self.names[candidates[i]]!r} and {self.names[candidates[j]]!r} are always "
            f"{relation[int(always[i, j])]}: the data cannot tell them apart"
            for i, j in always.triu(1).nonzero().tolist()
        ]

    def warn(self, concepts: Tensor, labels: Tensor | None = None) -> None:
        """Warn of what `diagnose` finds, if it finds anything; the first three findings and how many more."""
        if found := self.diagnose(concepts, labels):
            more = f" (and {len(found) - 3} more, see ConceptSet.diagnose)" if len(found) > 3 else ""
            # what holds for all concepts comes last and matters most
            warnings.warn("; ".join(found[::-1][:3]) + more, CoOccurrenceWarning, stacklevel=2)

    @staticmethod
    def is_function_of_class(concepts: Tensor, labels: Tensor) -> bool:
        """Whether images of a class never differ in a concept, of ``[N, K]`` annotations and ``[N]`` class indices."""
        filled = concepts.nan_to_num(nan=-1.0)
        repeats = False
        for label in labels.unique():
            rows = filled[labels == label]
            repeats |= len(rows) > 1
            if (rows != rows[0]).any():
                return False
        return repeats

    def to_dict(self) -> dict[str, Any]:
        """Plain form, as written to JSON and YAML: only what differs from the defaults."""
        written: dict[str, Any] = {"names": list(self.names)}
        if self.groups:
            written["groups"] = {group: list(members) for group, members in self.groups.items()}
        if set(self.kinds) != {"binary"}:
            written["kinds"] = list(self.kinds)
        if self.texts is not None:
            written["texts"] = list(self.texts)
        return written

    @classmethod
    def make(cls, source: ConceptSet | Mapping[str, Any] | Sequence[str] | str | Path | int) -> ConceptSet:
        """From whatever a user has: a concept set, its plain form, names, a file, or a number of unnamed concepts."""
        if isinstance(source, ConceptSet):
            return source
        if isinstance(source, Mapping):
            if unknown := set(source) - {"names", "groups", "kinds", "texts"}:
                raise ValueError(
                    f"a concept set has the keys names, groups, kinds and texts, got also {sorted(unknown)}"
                )
            return cls(**source)
        if isinstance(source, (str, Path)):
            return cls.read(source)
        if isinstance(source, int):
            return cls([f"concept_{k}" for k in range(source)])
        return cls(source)

    @classmethod
    def read(cls, path: str | Path) -> ConceptSet:
        """Read a concept set: ``.json``, ``.yaml``/``.yml``, ``.csv`` (its header) or plain text, one name a line.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The content is not a concept set; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no concept file at {path}; expected .json, .yaml, .csv or plain text")
        text = path.read_text(encoding="utf-8")
        try:
            match path.suffix.lower():
                case ".json":
                    return cls.make(json.loads(text))
                case ".yaml" | ".yml":
                    return cls.make(yaml.safe_load(text))
                case ".csv":
                    return cls(next(csv.reader(text.splitlines()), []))
                case _:
                    return cls([line.strip() for line in text.splitlines() if line.strip()])
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is not a concept set: {error}") from error

    def write(self, path: str | Path) -> None:
        """Write to ``.json``, ``.yaml``/``.yml``, ``.csv`` (header only) or plain text, replaced only when done.

        Raises:
            ValueError: The format holds names only and the set has groups, kinds or texts.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        written = self.to_dict()
        if suffix not in (".json", ".yaml", ".yml") and set(written) != {"names"}:
            raise ValueError(
                f"{path.name} would hold names only and lose {sorted(set(written) - {'names'})}; use .json"
            )
        match suffix:
            case ".json":
                text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
            case ".yaml" | ".yml":
                text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
            case ".csv":
                text = (
                    ",".join('"' + n.replace('"', '""') + '"' if set(n) & set(',"') else n for n in self.names) + "\n"
                )
            case _:
                text = "".join(f"{name}\n" for name in self.names)
        draft = path.with_name(f".{path.name}.draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
