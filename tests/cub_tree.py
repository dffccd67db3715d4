"""Lays bird data out as an official CUB_200_2011 folder: ``python tests/cub_tree.py DEST`` (needs ``CBM_SHARED``).

`write_cub_tree` uses the reference data ``cub10``: tables of all 200 classes and 11,788 images, photographs of the
first ten classes only, with the boxes and parts of those in pixels of the shipped 160 x 160 crops.

**The table of 3.7 million attribute labels is derived, not original**, because the original is not among the reference
data. What is known of it is kept: the certainty codes of the 1,198 images for which they are known, and for each class
the share of images with an attribute, rounded and then moved by as few images as it takes for the majority vote to give
the published 200 x 112 table, and no further attribute in ten classes. Which image of a class has an attribute, and the
certainty of the other images (each has the codes of one drawn image), come from a seeded draw. So class-level concepts
are real, and instance-level labels are made up.

`write_miniature_cub_tree` needs no reference data: a few classes of painted images.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CERTAINTIES = ["not visible", "guessing", "probably", "definitely"]
SELECTED_CLASSES = 10


@dataclass
class Tables:
    """What the text files say; ``N`` images, ``A`` attributes, ``P`` parts, labels from 0."""

    paths: list[str]
    labels: NDArray[np.int64]
    is_train: NDArray[np.bool_]
    classes: list[str]
    attributes: list[str]
    present: NDArray[np.uint8]
    certainty: NDArray[np.uint8]
    percent: NDArray[np.float64]
    parts: list[str]
    part_locations: NDArray[np.float64]
    boxes: NDArray[np.float64]


def write_cub_tree(dest: Path, cub10: Path) -> Path:
    """Write ``dest/CUB_200_2011`` from the reference data in ``cub10`` and return it; takes a few seconds."""
    meta = json.loads((cub10 / "meta.json").read_text())
    index, photos = np.load(cub10 / "cub200_index.npz"), np.load(cub10 / "cub10_images160.npz")
    labels = np.array([int(path[:3]) - 1 for path in index["path"]])
    is_train = index["is_train"] == 1
    present, certainty, percent = _derived_attribute_labels(cub10, index["path"], labels, is_train)
    boxes, parts = index["bbox_xywh"].astype(np.float64), index["parts_xyv"].astype(np.float64)
    rows = photos["image_id"] - 1
    corners = photos["bbox_xyxy"].astype(np.float64)
    boxes[rows] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    parts[rows] = photos["parts_xyv"]
    tables = Tables(
        index["path"].tolist(), labels, is_train, meta["classes"], meta["attributes_312"],
        present, certainty, percent, meta["parts"], parts, boxes,
    )  # fmt: skip
    folder = _write_tables(dest, tables)
    jpegs, ends = photos["jpeg"], photos["offset"]
    for i, row in enumerate(rows):
        file = folder / "images" / tables.paths[row]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpegs[ends[i] : ends[i + 1]].tobytes())
    return folder


def write_miniature_cub_tree(
    dest: Path, n_classes: int = 4, images_a_class: int = 10, size: int = 40, wings: bool = False
) -> Path:
    """Write a small ``dest/CUB_200_2011`` of painted images and return it.

    Six attributes in three groups: the wing colour (the bits of the class number in red and blue), a bill shape that
    splits annotators, and a tail that is never visible. Every third image is an official test image. The back is a
    white dot at the place of part 1; part 2 is never visible. On request there are wings, green dots at the top on the
    left and at the bottom on the right: of every three images the first shows the left one, the second the right one,
    the third both.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    n = n_classes * images_a_class
    labels = np.repeat(np.arange(n_classes), images_a_class)
    within = np.tile(np.arange(images_a_class), n_classes)
    red, blue = labels % 2, labels // 2 % 2
    hooked = (within % 2 == 0).astype(int)  # a tie in classes of an even number of images
    present = np.stack([red, blue, 1 - red, hooked, np.zeros(n, int), (within == 0).astype(int)], 1).astype(np.uint8)
    certainty = np.full((n, 6), 4, np.uint8)
    certainty[:, 3] = 2 + within % 3
    certainty[:, 4] = 1
    certainty[1::4, 0] = np.where(present[1::4, 0] == 0, 1, 3)
    attributes = [
        "has_wing_color::red", "has_wing_color::blue", "has_wing_color::not_red",
        "has_bill_shape::hooked", "has_tail_shape::forked", "has_tail_shape::notched",
    ]  # fmt: skip
    classes = [f"{c + 1:03d}.Painted_Bird_{'ABCDEFGHIJ'[c]}" for c in range(n_classes)]
    paths = [f"{classes[c]}/Painted_{c}_{i}.png" for c, i in zip(labels, within, strict=True)]
    percent = np.stack([present[labels == c].mean(0) * 100 for c in range(n_classes)])
    parts = np.zeros((n, 2, 3))
    parts[:, 0] = np.column_stack([rng.integers(size // 4, 3 * size // 4, (n, 2)), np.ones(n)])
    names = ["back", "beak"]
    if wings:
        names += ["left wing", "right wing"]
        parts = np.concatenate([parts, _miniature_wings(within, size)], 1)
    boxes = np.tile([1.0, 1.0, size - 2.0, size - 2.0], (n, 1))
    is_train = within % 3 != 0
    tables = Tables(paths, labels, is_train, classes, attributes, present, certainty, percent, names, parts, boxes)
    folder = _write_tables(dest, tables)
    for path, colour, points in zip(paths, np.stack([red, 0 * red, blue], 1), parts.astype(int), strict=True):
        pixels = (colour * 150 + rng.integers(0, 40, (size, size, 3))).astype(np.uint8)
        for x, y, visible in points[2:]:
            if visible:
                pixels[y - 1 : y + 2, x - 1 : x + 2] = 0, 255, 0
        x, y, _ = points[0]
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
        file = folder / "images" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def _miniature_wings(within: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """``[N, 2, 3]`` places of left and right wings, zeros where invisible, above and below where backs may be."""
    rng = np.random.default_rng(1)
    rows = rng.integers(2, size // 4 - 2, len(within))
    columns = rng.integers(2, size // 2 - 2, (2, len(within)))
    left = np.stack([columns[0], rows, within % 3 != 1], 1)
    right = np.stack([size - 1 - columns[1], size - 1 - rows, within % 3 != 0], 1)
    wings = np.stack([left, right], 1).astype(np.float64)
    return wings * wings[..., 2:]


def _derived_attribute_labels(
    cub10: Path, paths: NDArray[np.str_], labels: NDArray[np.int64], is_train: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.float64]]:
    """Present ``[N, 312]``, certainty ``[N, 312]`` and the class percentages ``[200, 312]``, as the module says."""
    published, known = np.load(cub10 / "cub200_class_attributes.npz"), np.load(cub10 / "cub200_koh_val_split.npz")
    percent = published["class_attr_312_percent"].astype(np.float64)
    rng = np.random.default_rng(2011)
    certainty = known["certainty_312"][rng.integers(len(known["img_path"]), size=len(paths))]
    row_of = {path: i for i, path in enumerate(paths)}
    certainty[[row_of[path] for path in known["img_path"]]] = known["certainty_312"]
    majority = _published_majority(percent, published["class_attr_112"], published["attr_index_112"])
    draw = rng.random(certainty.shape)
    draw[certainty == 1] = 2  # what is not visible comes last and is never chosen
    present = np.zeros_like(certainty)
    for c in range(len(percent)):
        for split in (is_train, ~is_train):
            rows = np.flatnonzero((labels == c) & split)
            visible = (certainty[rows] != 1).sum(0)
            wanted = np.rint(percent[c] / 100 * visible)
            half = (visible + 1) // 2
            wanted = np.where(majority[c], np.maximum(wanted, half), np.minimum(wanted, half - 1))
            present[rows] = draw[rows].argsort(0).argsort(0) < wanted
    return present, certainty, percent


def _published_majority(percent: NDArray[np.float64], table: NDArray[np.uint8], selected: NDArray[np.int16]) -> NDArray:
    """The published vote for the 112 selected attributes; for the others at least 50 %, in fewer than ten classes."""
    rank = (-percent).argsort(0, kind="stable").argsort(0, kind="stable")
    majority = (percent >= 50) & (rank < SELECTED_CLASSES - 1)
    majority[:, selected] = table == 1
    return majority


def _write_tables(dest: Path, tables: Tables) -> Path:
    folder = dest / "CUB_200_2011"
    for name in ("images", "attributes", "parts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ids = range(1, len(tables.paths) + 1)
    _write_lines(dest / "attributes.txt", enumerate(tables.attributes, 1))
    _write_lines(folder / "images.txt", zip(ids, tables.paths, strict=True))
    _write_lines(folder / "image_class_labels.txt", zip(ids, tables.labels + 1, strict=True))
    _write_lines(folder / "train_test_split.txt", zip(ids, tables.is_train.astype(int), strict=True))
    _write_lines(folder / "classes.txt", enumerate(tables.classes, 1))
    _write_lines(folder / "bounding_boxes.txt", ((i, *box) for i, box in zip(ids, tables.boxes.tolist(), strict=True)))
    _write_lines(folder / "attributes" / "certainties.txt", enumerate(CERTAINTIES, 1))
    _write_lines(folder / "attributes" / "class_attribute_labels_continuous.txt", tables.percent.tolist())
    _write_lines(folder / "parts" / "parts.txt", enumerate(tables.parts, 1))
    _write_lines(
        folder / "parts" / "part_locs.txt",
        (
            (i, p, x, y, int(visible))
            for i, points in zip(ids, tables.part_locations.tolist(), strict=True)
            for p, (x, y, visible) in enumerate(points, 1)
        ),
    )
    _write_attribute_labels(folder / "attributes" / "image_attribute_labels.txt", tables.present, tables.certainty)
    return folder


def _write_lines(path: Path, rows) -> None:
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))


def _write_attribute_labels(path: Path, present: NDArray[np.uint8], certainty: NDArray[np.uint8]) -> None:
    """``<image> <attribute> <present> <certainty> <seconds>`` rows, chosen from the eight endings of each attribute."""
    n_attributes = present.shape[1]
    endings = np.array(
        [[f" {a} {code // 4} {code % 4 + 1} 1.0\n" for code in range(8)] for a in range(1, n_attributes + 1)],
        dtype=object,
    )
    chosen = endings[np.arange(n_attributes), present * 4 + certainty - 1]
    with path.open("w") as file:
        file.writelines(str(i) + str(i).join(row) for i, row in enumerate(chosen.tolist(), 1))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/cub_tree.py DEST")
    shared = Path(os.environ.get("CBM_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    print(write_cub_tree(Path(sys.argv[1]), shared / "data" / "cub10"))
