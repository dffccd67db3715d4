"""What a drawn bird can look like: attribute groups, their values, the part that shows them, and words for them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Part(IntEnum):
    """What a pixel of the part map shows. ``HIDDEN`` is bird whose attribute is deliberately not to be seen."""

    BACKGROUND = 0
    TAIL = 1
    LEGS = 2
    BODY = 3
    BELLY = 4
    WING = 5
    WING_BAR = 6
    HEAD = 7
    CREST = 8
    BEAK = 9
    EYE_RING = 10
    EYE = 11
    OCCLUDER = 12
    PASSER = 13
    HIDDEN = 14


BIRD_PARTS = tuple(part for part in Part if Part.TAIL <= part <= Part.EYE)


@dataclass(frozen=True)
class Group:
    """An attribute of which each bird has exactly one value.

    Attributes:
        name: What the attribute is called.
        values: Names of its values. A group of two has one concept, which holds for the second value; a larger group
            has one concept a value.
        phrases: A value in words, as in "a bird with {phrase}".
        parts: The parts whose pixels show it.
        host: The part to look at where a value draws no pixels of its own (no crest: look at the head).
    """

    name: str
    values: tuple[str, ...]
    phrases: tuple[str, ...]
    parts: tuple[Part, ...]
    host: Part

    @property
    def shown_values(self) -> range:
        """The values that have a concept."""
        return range(1, 2) if len(self.values) == 2 else range(len(self.values))

    @property
    def concepts(self) -> list[str]:
        """Names of its concepts."""
        return [f"{self.name}: {self.values[value]}" for value in self.shown_values]

    @property
    def membership(self) -> Tensor:
        """``[values, concepts]``, one where a value makes a concept true."""
        return torch.eye(len(self.values))[:, list(self.shown_values)]


COLOURS = ("red", "yellow", "blue", "black")


def _colour(part: str, parts: tuple[Part, ...]) -> Group:
    phrases = tuple(f"a {colour} {part}" for colour in COLOURS)
    return Group(f"{part} colour", COLOURS, phrases, parts, parts[0])


def _switch(name: str, phrases: tuple[str, str], parts: tuple[Part, ...], host: Part) -> Group:
    return Group(name, ("absent", "present"), phrases, parts, host)


ATTRIBUTES = (
    _colour("body", (Part.BODY,)),
    _colour("wing", (Part.WING,)),
    _colour("head", (Part.HEAD,)),
    Group(
        "beak", ("thick", "long", "hooked"), ("a thick beak", "a long beak", "a hooked beak"), (Part.BEAK,), Part.BEAK
    ),
    Group("tail", ("fan", "long", "forked"), ("a fan tail", "a long tail", "a forked tail"), (Part.TAIL,), Part.TAIL),
    Group(
        "belly pattern",
        ("plain", "spotted", "striped"),
        ("a plain belly", "a spotted belly", "a striped belly"),
        (Part.BELLY,),
        Part.BELLY,
    ),
    Group("legs", ("short", "long"), ("short legs", "long legs"), (Part.LEGS,), Part.LEGS),
    _switch("crest", ("no crest", "a crest"), (Part.CREST,), Part.HEAD),
    _switch("wing bar", ("no wing bar", "a wing bar"), (Part.WING_BAR,), Part.WING),
    _switch("eye ring", ("no eye ring", "an eye ring"), (Part.EYE_RING,), Part.HEAD),
)
"""The ten groups of every bird: 25 concepts."""

EVENTS = (
    _switch("wing flap", ("still wings", "a flapping wing"), (Part.WING, Part.WING_BAR), Part.WING),
    _switch("hop", ("feet on the ground", "a hop"), BIRD_PARTS, Part.BODY),
    _switch("passing leaf", ("a clear view", "a leaf passing by"), (Part.PASSER,), Part.BACKGROUND),
)
"""What can happen in a clip of several frames: three more groups, one concept each."""

BACKGROUND = Group(
    "background",
    ("sky", "forest", "water", "sand"),
    ("sky behind it", "forest behind it", "water behind it", "sand behind it"),
    (Part.BACKGROUND,),
    Part.BACKGROUND,
)
OCCLUDER = _switch("occluder", ("nothing in front", "a leaf in front"), (Part.OCCLUDER,), Part.BACKGROUND)
NUISANCES = (BACKGROUND, OCCLUDER)
"""What the picture shows beside the bird; concepts only where ``kept_groups`` names them."""


def find_groups(
    names: Iterable[str] | None, among: Sequence[Group], field: str, default: Sequence[Group]
) -> list[Group]:
    """The groups of some names, in the order of ``among``.

    Args:
        names: Names of groups, or None for the default.
        among: The groups that may be named.
        field: What the names were given as, for the error message.
        default: What None means.

    Raises:
        ValueError: A name is unknown (the message lists near matches), none is given, or one is given twice.
    """
    if names is None:
        return list(default)
    wanted = list(names)
    for name in wanted:
        find_group(name, among, field)
    if not wanted or len(set(wanted)) < len(wanted):
        raise ValueError(f"{field}: expected one or more different groups, got {wanted}")
    return [group for group in among if group.name in wanted]


def find_group(name: str, among: Sequence[Group], field: str) -> Group:
    """The group of a name.

    Raises:
        ValueError: There is none; the message lists near matches.
    """
    for group in among:
        if group.name == name:
            return group
    known = [group.name for group in among]
    near = difflib.get_close_matches(str(name), known, n=3)
    raise ValueError(
        f"{field}: no group is called {name!r}; " + (f"did you mean {near}?" if near else f"known: {known}")
    )


def find_value(name: str, group: Group, field: str) -> int:
    """The position of a value in its group.

    Raises:
        ValueError: The group has no such value.
    """
    if name not in group.values:
        raise ValueError(f"{field}: {group.name!r} has the values {list(group.values)}, got {name!r}")
    return group.values.index(name)


def check_share(value: float, field: str) -> None:
    """Raise a ValueError unless ``value`` lies in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{field}: expected a share or probability in [0, 1], got {value}")
