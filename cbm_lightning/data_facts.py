"""What a model must know about its data, from the user or from the datamodule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ClassFacts


class DataFacts(NamedTuple):
    """Counts and names that fix the shape of a model.

    Attributes:
        concepts: The concept set.
        num_classes: Number of classes.
        class_names: Their names, or None.
        feature_dim: Width of precomputed features, or None for images.
        class_descriptions: A sentence a class, or None.
        class_embeddings: ``[L, D]`` text vectors of the classes, or None.
    """

    concepts: ConceptSet
    num_classes: int
    class_names: list[str] | None
    feature_dim: int | None
    class_descriptions: list[str] | None = None
    class_embeddings: Tensor | None = None

    @property
    def classes(self) -> ClassFacts:
        """What is known of the classes."""
        return ClassFacts(self.class_names, self.class_descriptions, self.class_embeddings)

    @classmethod
    def gather(cls, data: Any, concepts: Any, num_classes: int | None, class_names: Sequence[str] | None) -> DataFacts:
        """Take what the user typed, and the rest from the datamodule.

        Raises:
            ValueError: Neither says it; the message names the argument and the attribute.
        """
        if concepts is None:
            concepts = ask(data, "concept_set", "concepts", "a number, names, or a file of names")
        if class_names is None and num_classes is None:
            class_names = getattr(data, "class_names", None)
        if num_classes is None:
            num_classes = len(class_names) if class_names else int(ask(data, "num_classes", "num_classes", "a number"))
        concept_set = ConceptSet.make(concepts)
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names: expected {num_classes} names, got {len(class_names)}")
        names = None if class_names is None else [str(name) for name in class_names]
        told = (getattr(data, name, None) for name in ("feature_dim", "class_descriptions", "class_embeddings"))
        return cls(concept_set, num_classes, names, *told)


def ask(data: Any, attribute: str, argument: str, form: str) -> Any:
    """An attribute of the datamodule.

    Raises:
        ValueError: There is no datamodule, or it lacks the attribute; the message says what to pass instead.
    """
    found = getattr(data, attribute, None)
    if found is None:
        owner = "no datamodule was given" if data is None else f"{type(data).__name__} has no `{attribute}`"
        raise ValueError(
            f"the model needs `{argument}` and {owner}: pass model.{argument} ({form}), or add the attribute"
        )
    return found


def check_agreement(data: Any, concepts: ConceptSet | None, num_classes: int) -> None:
    """Check that the datamodule in training is the one that the model was made for.

    Args:
        data: The datamodule.
        concepts: The model's; None where they are its own business.
        num_classes: The model's.

    Raises:
        ValueError: It has another number of concepts or classes, or other concept names in the same places.
    """
    owner = type(data).__name__
    theirs = None if concepts is None else getattr(data, "concept_set", None)
    if concepts is not None and theirs is not None and len(theirs) != len(concepts):
        raise ValueError(
            f"the model has {len(concepts)} concepts, {owner} has {len(theirs)}; pass the datamodule's concept set"
        )
    if concepts and isinstance(theirs, ConceptSet) and theirs.names != concepts.names and not _numbered(concepts):
        first = next(k for k in range(len(concepts)) if theirs.names[k] != concepts.names[k])
        raise ValueError(
            f"concept {first} is {concepts.names[first]!r} in the model and {theirs.names[first]!r} in {owner}; the "
            "order of the concepts must agree"
        )
    if (count := getattr(data, "num_classes", None)) is not None and count != num_classes:
        raise ValueError(f"the model has {num_classes} classes, {owner} has {count}; pass the datamodule's num_classes")


def _numbered(concepts: ConceptSet) -> bool:
    """Whether the names were made up from a count, and so cannot contradict real ones."""
    return concepts.names == ConceptSet.make(len(concepts)).names
