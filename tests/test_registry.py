"""Families of interchangeable parts and the short names of their members."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest

from cbm_lightning.interventions import Policy
from cbm_lightning.interventions.values import InterventionValues
from cbm_lightning.registry import Named, find, register
from cbm_lightning.saliency import SaliencyMethod


def colours() -> Any:
    """A family of its own for each test."""

    class Colour(Named, field="colours"):
        pass

    class Red(Colour):
        name = "red"

        def __init__(self, share: float = 1.0) -> None:
            self.share = share

    class Mixed(Colour):
        name = "mixed"

        def __init__(self, parts: list[str]) -> None:
            self.parts = parts

    Colour.Red, Colour.Mixed = Red, Mixed
    return Colour


def test_members_by_name_and_as_they_are() -> None:
    family = colours()
    made = family.make("red")
    assert type(made) is family.Red
    assert made.share == 1.0
    given = family.Red(0.5)
    assert family.make(given) is given
    assert family.make("red") is not made
    assert family.registry == {"red": family.Red, "mixed": family.Mixed}


def test_members_know_how_they_were_made() -> None:
    family = colours()
    assert family.Red(0.5).spec()["init_args"] == {"share": 0.5}
    assert family.make("red").spec()["init_args"] == {"share": 1.0}


def test_families_do_not_share_names() -> None:
    one, other = colours(), colours()
    assert one.registry is not other.registry
    assert type(one.make("red")) is not type(other.make("red"))
    with pytest.raises(TypeError, match="colours: expected short names"):
        one.make(other.Red())
    families = (Policy, InterventionValues, SaliencyMethod)
    assert [family.field for family in families] == ["policies", "values", "method"]
    for family in families:
        assert all(issubclass(member, family) for member in family.registry.values())
        assert all(member.name == name for name, member in family.registry.items())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rad", r"^colours: nothing is called 'rad'; did you mean 'red'\? A class path names one of your own$"),
        ("Red", r"^colours: nothing is called 'Red'; did you mean 'red'\?"),
        ("indigo", r"^colours: nothing is called 'indigo'; there are \['mixed', 'red'\]\."),
        ("mixed", r"^colours: 'mixed' needs arguments, give its class path and init_args: .*parts"),
    ],
)
def test_names_that_make_nothing(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        colours().make(name)


def test_what_is_neither_a_name_nor_a_member() -> None:
    family = colours()
    for given in (3, None, ["red"], family.Red):
        with pytest.raises(
            TypeError, match=r"^colours: expected short names \(mixed, red, \.\.\.\) or instances of Col"
        ):
            family.make(given)


def test_classes_without_a_name_of_their_own_have_none() -> None:
    family = colours()

    class Crimson(family.Red):  # type: ignore[misc, name-defined]
        pass

    assert family.registry["red"] is family.Red
    assert Crimson not in family.registry.values()
    crimson = Crimson(0.2)
    assert family.make(crimson) is crimson


def test_a_name_that_another_class_has() -> None:
    family = colours()
    with pytest.raises(ValueError, match=r"name: 'red' is .*Red's already; give .*Scarlet another one"):

        class Scarlet(family):  # type: ignore[misc, valid-type]
            name = "red"

    assert family.registry["red"] is family.Red


def test_a_class_that_is_defined_again_takes_its_own_place() -> None:
    class Sound(Named, field="sounds"):
        pass

    def define() -> type[Sound]:
        class Bell(Sound):
            name = "bell"

        return Bell

    first, again = define(), define()
    assert first is not again
    assert type(Sound.make("bell")) is again


def test_abstract_members_cannot_be_made() -> None:
    class Shape(Named, ABC, field="shapes"):
        @abstractmethod
        def area(self) -> float: ...

    class Square(Shape):
        name = "square"

        def area(self) -> float:
            return 1.0

    class Plane(Shape):
        name = "plane"

    assert Shape.make("square").area() == 1.0
    with pytest.raises(ValueError, match=r"shapes: 'plane' needs arguments.*abstract"):
        Shape.make("plane")
    with pytest.raises(TypeError, match="abstract"):
        Plane()


def test_registries_that_are_plain_mappings() -> None:
    known: dict[str, type[object]] = {}
    register("number", int, known)
    register("number", int, known)
    register("word", str, known)
    assert find("kinds", "number", known) is int
    with pytest.raises(ValueError, match="name: 'number' is int's already; give float another one"):
        register("number", float, known)
    with pytest.raises(ValueError, match="kinds: nothing is called 'numbers'; did you mean 'number'"):
        find("kinds", "numbers", known)
    assert known == {"number": int, "word": str}
