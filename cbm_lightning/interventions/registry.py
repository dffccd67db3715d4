"""Short names in YAML files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def find(field: str, name: str, registry: Mapping[str, T]) -> T:
    """What a short name stands for.

    Args:
        field: The argument that the name was given for.
        name: The name.
        registry: What there is.

    Raises:
        ValueError: Nothing has that name; the message lists near matches, or all names where none is near.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {sorted(registry)}."
    raise ValueError(f"{field}: nothing is called {name!r}; {hint} A class path names one of your own")


def register(name: str, cls: type[T], registry: dict[str, type[T]]) -> None:
    """Make a short name known.

    Raises:
        ValueError: Another class has it.
    """
    known = registry.get(name)
    # the same class may be defined again, in a notebook say
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"name: {name!r} is {known.__qualname__}'s already; give {cls.__qualname__} another one")
    registry[name] = cls
