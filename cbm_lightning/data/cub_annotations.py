"""The annotation of CUB-200-2011: reading the official tables, and how 312 attributes become 112 concepts.

Every function is pure: files or arrays in, arrays out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbm_lightning.concepts import ConceptSet

Bytes = NDArray[np.uint8]

NOT_VISIBLE, GUESSING, PROBABLY, DEFINITELY = 1, 2, 3, 4
"""The certainty codes of the annotators."""

TABLES = (
    "images.txt",
    "image_class_labels.txt",
    "classes.txt",
    "train_test_split.txt",
    "attributes/image_attribute_labels.txt",
)
"""Tables that must lie in the folder, beside ``attributes.txt``, which the archive keeps one folder above."""

PARTS_TABLES = ("parts/parts.txt", "parts/part_locs.txt")
"""Tables that must lie there as well if parts are wanted."""


@dataclass(frozen=True)
class CubAnnotations:
    """The official tables of all images and classes.

    Attributes:
        image_ids: ``[N]`` official ids.
        paths: ``N`` paths below ``images/``.
        labels: ``[N]`` class indices from 0.
        official_train: ``[N]`` bool, the official training split.
        classes: Class names as in ``classes.txt`` (``001.Black_footed_Albatross``).
        attributes: Attribute names as in ``attributes.txt`` (``has_bill_shape::dagger``).
        present: ``[N, A]`` 0 or 1, what the annotator of an image said.
        certainty: ``[N, A]`` 1 to 4, how sure the annotator was; 1 is not visible.
    """

    image_ids: NDArray[np.int64]
    paths: list[str]
    labels: NDArray[np.int64]
    official_train: NDArray[np.bool_]
    classes: list[str]
    attributes: list[str]
    present: Bytes
    certainty: Bytes


def find_folder(root: Path) -> Path:
    """The ``CUB_200_2011`` folder: ``root`` itself or the folder of that name in it.

    Raises:
        FileNotFoundError: Neither is it, or a table is missing there; the message names every missing file.
    """
    folder = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    if not (folder / "images.txt").is_file() and not (folder / "images").is_dir():
        raise FileNotFoundError(
            f"root: expected the official CUB_200_2011 folder at {root} or inside it and found none; unpack "
            "CUB_200_2011.tgz there, or set download: true to fetch it (1.1 GB)"
        )
    missing = [name for name in TABLES if not (folder / name).is_file()]
    missing += [] if _attribute_names_file(folder) else ["attributes.txt (here or one folder above)"]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {missing}; expected the content of the official CUB_200_2011.tgz, so unpack it again"
        )
    return folder


def read_annotations(folder: Path) -> CubAnnotations:
    """Read the tables of the official folder; a second or two for the 3.7 million rows of all attributes.

    Raises:
        FileNotFoundError: A table is missing.
        ValueError: A table is cut off or does not fit the others; the message names it.
    """
    folder = find_folder(folder)
    images = _read_pairs(folder / "images.txt")
    labels = _read_column(folder / "image_class_labels.txt", images)
    classes = _read_pairs(folder / "classes.txt")
    train = _read_column(folder / "train_test_split.txt", images)
    attributes_file = _attribute_names_file(folder)
    assert attributes_file is not None  # find_folder has looked
    attributes = _read_pairs(attributes_file)
    class_position = {identity: i for i, identity in enumerate(classes)}
    if unknown := sorted(set(labels) - set(class_position)):
        raise ValueError(f"{folder / 'image_class_labels.txt'}: classes {unknown[:3]} are not in classes.txt")
    image_ids = np.array(list(images))
    present, certainty = read_attribute_labels(
        folder / "attributes" / "image_attribute_labels.txt", image_ids, np.array(list(attributes))
    )
    return CubAnnotations(
        image_ids,
        list(images.values()),
        np.array([class_position[label] for label in labels]),
        np.array(train) == 1,
        list(classes.values()),
        list(attributes.values()),
        present,
        certainty,
    )


def read_attribute_labels(
    path: Path, image_ids: NDArray[np.int64], attribute_ids: NDArray[np.int64]
) -> tuple[Bytes, Bytes]:
    """Read ``<image> <attribute> <present> <certainty> <seconds>`` rows into two arrays ``[N, A]``.

    The official file has rows with superfluous fields at their end; only the first four count.

    Raises:
        ValueError: A value is not a number or out of range, or a pair of image and attribute has no row.
    """
    import pandas as pd

    try:
        # usecols makes the parser accept rows that are longer than the first
        table = pd.read_csv(path, sep=" ", header=None, usecols=[0, 1, 2, 3], dtype=np.int32).to_numpy()
    except ValueError as error:
        raise ValueError(
            f"{path}: expected <image> <attribute> <present> <certainty> in whole numbers: {error}"
        ) from error
    rows, columns = _positions(table[:, 0], image_ids), _positions(table[:, 1], attribute_ids)
    if bad := np.flatnonzero(
        (rows < 0)
        | (columns < 0)
        | ~np.isin(table[:, 2], (0, 1))
        | (table[:, 3] < NOT_VISIBLE)
        | (table[:, 3] > DEFINITELY)
    ).tolist():
        raise ValueError(
            f"{path}: row {bad[0] + 1} is {table[bad[0]].tolist()}; expected an image of images.txt, an attribute of "
            "attributes.txt, 0 or 1, and a certainty from 1 to 4"
        )
    present, certainty = np.zeros((2, len(image_ids), len(attribute_ids)), dtype=np.uint8)
    present[rows, columns] = table[:, 2]
    certainty[rows, columns] = table[:, 3]
    if absent := int((certainty == 0).sum()):
        image, attribute = np.argwhere(certainty == 0)[0]
        raise ValueError(
            f"{path}: {absent} of {certainty.size} pairs of image and attribute have no row, the first is image "
            f"{image_ids[image]} with attribute {attribute_ids[attribute]}; the file is cut off, unpack it again"
        )
    return present, certainty


def read_parts(folder: Path, image_ids: NDArray[np.int64]) -> tuple[list[str], Tensor]:
    """Names of the 15 parts and their locations ``[N, 15, 3]`` as ``(x, y, visible)`` in pixels of the image files.

    Raises:
        FileNotFoundError: ``parts/parts.txt`` or ``parts/part_locs.txt`` is missing.
        ValueError: A pair of image and part has no row.
    """
    import pandas as pd

    names_file, locations_file = (folder / table for table in PARTS_TABLES)
    for file in (names_file, locations_file):
        if not file.is_file():
            raise FileNotFoundError(
                f"parts: expected {file} of the official folder; unpack it again or set parts: false"
            )
    names = _read_pairs(names_file)
    table = pd.read_csv(locations_file, sep=" ", header=None, usecols=[0, 1, 2, 3, 4]).to_numpy(np.float64)
    rows = _positions(table[:, 0].astype(np.int64), image_ids)
    columns = _positions(table[:, 1].astype(np.int64), np.array(list(names)))
    known = (rows >= 0) & (columns >= 0)
    locations = np.full((len(image_ids), len(names), 3), np.nan)
    locations[rows[known], columns[known]] = table[known, 2:5]
    if np.isnan(locations).any():
        raise ValueError(f"{locations_file}: some images lack rows of some parts; the file is cut off, unpack it again")
    return list(names.values()), torch.from_numpy(locations).float()


def class_votes(present: Bytes, certainty: Bytes, labels: NDArray[np.int64], num_classes: int) -> Bytes:
    """Majority vote of the images of each class on each attribute, after Koh et al. (ICML 2020).

    A "no" that is not visible is no vote, and a tie is a yes, that of no votes at all included.

    Args:
        present: ``[N, A]`` 0 or 1.
        certainty: ``[N, A]`` codes 1 to 4.
        labels: ``[N]`` class indices.
        num_classes: ``L``.

    Returns:
        ``[L, A]`` 0 or 1.
    """
    member = (np.arange(num_classes)[:, None] == labels).astype(np.float32)
    yes = member @ present.astype(np.float32)
    no = member @ ((present == 0) & (certainty != NOT_VISIBLE)).astype(np.float32)
    votes: Bytes = (yes >= no).astype(np.uint8)
    return votes


def frequent_attributes(votes: Bytes, min_classes: int = 10) -> list[int]:
    """Positions of the attributes that hold in at least ``min_classes`` classes of ``votes [L, A]``."""
    return [int(i) for i in np.flatnonzero(votes.sum(0) >= min_classes)]


def soften(present: Bytes, certainty: Bytes) -> NDArray[np.float32]:
    """Labels of an image by the certainty of its annotator, after Koh et al. (ICML 2020): ``[N, A]`` in [0, 1].

    A yes is 0, .5, .75, 1 and a no is 0, .5, .25, 0 from not visible to definitely.
    """
    table = np.zeros((2, DEFINITELY + 1), dtype=np.float32)
    table[0, [GUESSING, PROBABLY]] = 0.5, 0.25
    table[1, [GUESSING, PROBABLY, DEFINITELY]] = 0.5, 0.75, 1.0
    softened: NDArray[np.float32] = table[present, certainty]
    return softened


def attribute_concepts(attributes: list[str]) -> ConceptSet:
    """Concepts under their official names, grouped by what stands before ``::``, with a readable text each."""
    groups: dict[str, list[str]] = {}
    for name in attributes:
        groups.setdefault(name.partition("::")[0], []).append(name)
    return ConceptSet(attributes, groups, texts=[_in_words(name) for name in attributes])


def _in_words(attribute: str) -> str:
    part, _, value = attribute.removeprefix("has_").partition("::")
    return f"{value} {part}".replace("_", " ").strip()


def _attribute_names_file(folder: Path) -> Path | None:
    # the archive has it beside CUB_200_2011; copies often have it inside
    places = (folder, folder.parent, folder / "attributes")
    return next((place / "attributes.txt" for place in places if (place / "attributes.txt").is_file()), None)


def _read_pairs(path: Path) -> dict[int, str]:
    """``<id> <text>`` lines in file order."""
    pairs = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    try:
        return {int(identity): text.strip() for identity, text in pairs}
    except ValueError as error:
        raise ValueError(f"{path}: expected lines of a number and a text: {error}") from error


def _read_column(path: Path, images: dict[int, Any]) -> list[int]:
    """The number that an ``<image> <number>`` table gives each image."""
    column = _read_pairs(path)
    if missing := [identity for identity in images if identity not in column]:
        raise ValueError(f"{path}: {len(missing)} images of images.txt have no row, the first is {missing[0]}")
    try:
        return [int(column[identity]) for identity in images]
    except ValueError as error:
        raise ValueError(f"{path}: expected a whole number an image: {error}") from error


def _positions(values: NDArray[Any], identities: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each value among the identities, -1 where it is none of them."""
    lookup = np.full(int(identities.max()) + 2, -1)
    lookup[identities] = np.arange(len(identities))
    inside = (values >= 0) & (values < len(lookup))
    return np.where(inside, lookup[np.where(inside, values, 0)], -1)
