"""Families of interchangeable parts, whose members have short names in YAML files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, ClassVar, Self, TypeVar

from cbm_lightning.configurable import Configurable

T = TypeVar("T")


class Named(Configurable):
    """A member of a family of parts. The class directly below this one is the family, and says what it is called for.

    Attributes:
        field: The argument that takes members of the family, for messages.
        registry: Short name to class, of the whole family.
        name: Short name of the class; a class without one of its own has none.

    Example:
        >>> class Colour(Named, field="colours"): ...
        >>> class Red(Colour):
        ...     name = "red"
        >>> type(Colour.make("red")).__name__
        'Red'
    """

    field: ClassVar[str] = ""
    registry: ClassVar[dict[str, Any]]
    name: ClassVar[str] = ""

    def __init_subclass__(cls, field: str | None = None, **kwargs: object) -> None:
        """Found a family, or make the short name of a member known in its family."""
        super().__init_subclass__(**kwargs)
        if field is not None:
            cls.field, cls.registry = field, {}
        elif not hasattr(cls, "registry"):
            raise TypeError(f"{cls.__name__} founds a family: say which argument takes its members, field='...'")
        elif "name" in vars(cls):
            register(cls.name, cls, cls.registry)

    @classmethod
    def make(cls, source: str | Self) -> Self:
        """A member, or the one of a short name with its defaults.

        Raises:
            ValueError: Nothing has that name, with near matches in the message, or it has no defaults.
            TypeError: It is neither a name nor a member of the family.
        """
        if isinstance(source, cls):
            return source
        if not isinstance(source, str):
            examples = ", ".join(sorted(cls.registry)[:3])
            raise TypeError(
                f"{cls.field}: expected short names ({examples}, ...) or instances of {cls.__name__}, got {source!r}"
            )
        try:
            made: Self = find(cls.field, source, cls.registry)()
        except TypeError as error:
            raise ValueError(
                f"{cls.field}: {source!r} needs arguments, give its class path and init_args: {error}"
            ) from None
        return made


def find(field: str, name: str, registry: Mapping[str, T], own: str = " A class path names one of your own") -> T:
    """What a short name stands for.

    Args:
        field: The argument that the name was given for.
        name: The name.
        registry: What there is.
        own: How to come by something else, for the message.

    Raises:
        ValueError: Nothing has that name; the message lists near matches, or all names where none is near.
    """
    if name in registry:
        return registry[name]
    near = difflib.get_close_matches(name, registry, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are {sorted(registry)}."
    raise ValueError(f"{field}: nothing is called {name!r}; {hint}{own}")


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
