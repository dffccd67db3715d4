"""`ConceptFolder`: the user's own images with a table of concepts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.concept_table import CERTAINTY, MASK, Table, encode, encode_labels
from cbm_lightning.data.images import ImageDataModule, ImageDataset, stratified_split

SPLITS = ("train", "val", "test")


class ConceptFolder(ImageDataModule):
    """Your own images, labels and concepts: a table with a row an image, or a folder a class and a table a class.

    Three layouts, by which tables are given. All paths are relative to ``root``, absolute ones stay as they are.

    * ``table`` alone: a row an image with its path, its label and its concepts.
    * ``class_table`` alone: images in ``root/CLASS/``, and a row a class with its concepts.
    * Both: a row an image with path and label, which takes its concepts from the row of its class.

    Tables are ``.csv`` or ``.parquet``. A concept is a column of numbers in [0, 1] (booleans too), empty where it is
    not annotated; other numbers are for concepts of kind ``real`` in ``concepts``. Columns called ``certainty:CONCEPT``
    say how sure the annotation is, from 0 (not visible) to 1 (empty counts as 1), and make ``certainty [B, K]`` in the
    batches. Columns of ``table`` called ``mask:CONCEPT`` hold paths of mask images of the size of the image and make
    ``concept_masks [B, K, H, W]`` in the splits that are not augmented, NaN where there is no mask.

    Args:
        root: Folder of the images.
        table: Table with a row an image.
        class_table: Table with a row a class, named by the column ``label_column`` or, without one, by the first.
        concepts: The concepts to use: a list of columns, a concept set as a dict (names, groups, kinds, texts), or a
            file that `ConceptSet.read` reads. None takes every column that no other option names. Concepts called
            ``group: name`` form groups by what stands before the colon, unless groups are given.
        classes: Class names in label order. Whole-number labels are then positions in it. None takes the order of the
            class table, or sorts the labels of the image table.
        image_column: Column of image paths.
        label_column: Column of labels, names or whole numbers.
        split_column: Column with ``train``, ``val`` or ``test``. None draws the splits, each class in proportion. If
            the column names no ``val``, it is drawn from its ``train``.
        split_by: Column whose equal values never go to two splits: the physical object, patient or video of an image.
        group_column: Column of groups for worst-group metrics; makes ``group [B]``, numbered as `group_names`.
        val_fraction: Share of the images of each class (or units of ``split_by``) for validation, where it is drawn.
        test_fraction: The same for the test split.
        options: Of `ImageDataModule` (``train_transform``, ``eval_transform``, ``image_size``, ``augment``) and
            `ConceptDataModule` (``batch_size``, ``num_workers``, ``seed``).

    Attributes:
        group_names: Values of ``group_column`` in the order of their numbers; empty without one.

    Raises:
        FileNotFoundError: A table, an image or a mask is missing; the message names the first and how many.
        ValueError: A value in a table does not fit; the message names table, column, row and value.

    Example:
        >>> data = ConceptFolder("birds", table="birds.csv", split_by="photographer")  # doctest: +SKIP
        >>> data.concept_set.names, data.class_names  # doctest: +SKIP
        (('colour: red', 'colour: blue'), ['finch', 'tit'])
    """

    def __init__(
        self,
        root: str,
        table: str | None = None,
        *,
        class_table: str | None = None,
        concepts: str | list[str] | dict[str, Any] | None = None,
        classes: list[str] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        split_column: str | None = None,
        split_by: str | None = None,
        group_column: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.table = table
        self.class_table = class_table
        self.image_column = image_column
        self.label_column = label_column
        self.split_column = split_column
        self.split_by = split_by
        self.group_column = group_column
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.group_names: list[str] = []
        self._check_options()
        self._load(concepts, classes)

    @property
    def concept_set(self) -> ConceptSet:
        """The concepts in column order, or in the order of ``concepts``."""
        return self._concept_set

    @property
    def class_names(self) -> list[str]:
        """The classes in label order."""
        return self._class_names

    def files(self) -> Iterable[Path]:
        """The tables, the images and the masks."""
        yield from (self.root / name for name in (self.table, self.class_table) if name is not None)
        yield from self._paths
        yield from (path for row in self._masks or () for path in row if path is not None)

    def make_split(self, name: str) -> ImageDataset:
        """The images of a split."""
        rows = self._rows[name]
        chosen = rows.tolist()
        return ImageDataset(
            [self._paths[row] for row in chosen],
            {key: tensor[rows] for key, tensor in self._tensors.items()},
            self.transform_of(name),
            augmented=self.is_augmented(name),
            seed=self.seed,
            masks=None if self._masks is None else [self._masks[row] for row in chosen],
        )

    def _check_options(self) -> None:
        if self.table is None and self.class_table is None:
            raise ValueError("table: give a table with a row an image, a class_table with a row a class, or both")
        needless = [name for name in ("split_column", "split_by", "group_column") if getattr(self, name) is not None]
        if self.table is None and needless:
            raise ValueError(f"{needless} name columns of a table with a row an image; give it as table")

    def _load(self, concepts: str | list[str] | dict[str, Any] | None, classes: list[str] | None) -> None:
        """Read and check everything but the pixels."""
        of_classes = None if self.class_table is None else Table.read(self.root / self.class_table, [self.label_column])
        row_of_class = {} if of_classes is None else self._once(of_classes, self._class_key(of_classes))
        images = self._image_table(classes or list(row_of_class))
        self._class_names, labels = self._classes(images, classes or list(row_of_class))
        source, rows = images, torch.arange(len(images))
        if of_classes is not None:
            if missing := [name for name in self._class_names if name not in row_of_class]:
                raise ValueError(f"{of_classes.name} has no row for the classes {missing[:5]}; add them")
            source, rows = of_classes, torch.tensor([row_of_class[name] for name in self._class_names])[labels]
        self._concept_set = self._make_concept_set(source, concepts)
        self._tensors = {"label": labels, "concepts": source.concepts(self._concept_set)[rows]}
        # what is said of an image goes before what is said of its class
        for table, at in ((source, rows), (images, torch.arange(len(images)))):
            if (certainty := table.certainty(self._concept_set)) is not None:
                self._tensors["certainty"] = certainty[at]
        if self.group_column is not None:
            self.group_names, self._tensors["group"] = encode(images.texts(self.group_column))
        self._paths = [self.root / path for path in images.texts(self.image_column)]
        self._check_exist(self._paths, "images")
        self._masks = self._mask_files(images)
        self._rows = self._make_splits(images, labels)

    def _class_key(self, of_classes: Table) -> str:
        """The column of the class table that names the class."""
        return self.label_column if self.label_column in of_classes.columns else of_classes.columns[0]

    def _image_table(self, classes: Sequence[str]) -> Table:
        if self.table is None:
            return Table.of_class_folders(self.root, classes, self.image_column, self.label_column)
        texts = (self.image_column, self.label_column, self.split_column, self.split_by, self.group_column)
        images = Table.read(self.root / self.table, [column for column in texts if column is not None])
        self._once(images, self.image_column)
        return images

    def _classes(self, images: Table, classes: list[str]) -> tuple[list[str], Tensor]:
        """Class names, and the label of each image."""
        labels = images.texts(self.label_column)
        if not classes:
            return encode(labels)
        names = [str(name) for name in classes]
        if len(set(names)) < len(names):
            raise ValueError(f"classes: expected each name once, got {names}")
        return names, encode_labels(labels, names, f"{images.name}, column {self.label_column!r}")

    @staticmethod
    def _once(table: Table, column: str) -> dict[str, int]:
        """Row of each value of a column.

        Raises:
            ValueError: A value comes twice: two rows of one image might go to two splits.
        """
        row_of: dict[str, int] = {}
        for row, value in enumerate(table.texts(column)):
            if row_of.setdefault(value, row) != row:
                twice = f"{value!r} is in rows {row_of[value] + 1} and {row + 1}"
                raise ValueError(f"{table.name}: column {column!r}: {twice}; keep one")
        return row_of

    def _make_concept_set(self, table: Table, concepts: str | list[str] | dict[str, Any] | None) -> ConceptSet:
        if concepts is None:
            named = {self.image_column, self.label_column, self.split_column, self.split_by, self.group_column}
            named |= {self._class_key(table)} if self.class_table is not None else set()
            about = (CERTAINTY, MASK) if self.class_table is None else CERTAINTY
            concepts = [c for c in table.columns if c not in named and not c.startswith(about)]
            if not concepts:
                raise ValueError(f"{table.name} has no column left for concepts; it has {table.columns}")
        concept_set = ConceptSet.make(self.root / concepts if isinstance(concepts, str) else concepts)
        if missing := [name for name in concept_set if name not in table.columns]:
            raise ValueError(f"concepts: {table.name} has no column {missing[:3]}; it has {table.columns[:10]}")
        grouped = [name for name in concept_set if ": " in name]
        if concept_set.groups or not grouped:
            return concept_set
        groups: dict[str, list[str]] = {}
        for name in grouped:
            groups.setdefault(name.partition(": ")[0], []).append(name)
        return ConceptSet(concept_set.names, groups, concept_set.kinds, concept_set.texts)

    @staticmethod
    def _check_exist(paths: Sequence[Path], what: str) -> None:
        if missing := [path for path in paths if not path.is_file()]:
            shown = ", ".join(map(str, missing[:3]))
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} {what} are missing, first {shown}; paths are relative to root"
            )

    def _mask_files(self, images: Table) -> list[list[Path | None]] | None:
        columns = images.about(MASK, self._concept_set)
        if not columns:
            return None
        blank: list[str | None] = [None] * len(images)
        texts = [images.optional_texts(columns[name]) if name in columns else blank for name in self._concept_set]
        masks = [[None if text is None else self.root / text for text in row] for row in zip(*texts, strict=True)]
        self._check_exist([path for row in masks for path in row if path is not None], "masks")
        return masks

    def _make_splits(self, images: Table, labels: Tensor) -> dict[str, Tensor]:
        """Rows of each split."""
        names, units = encode(images.texts(self.split_by)) if self.split_by else ([], torch.arange(len(images)))
        if self.split_column is None:
            fractions = {"val": self.val_fraction, "test": self.test_fraction}
            return stratified_split(labels, fractions, self.seed, units)
        splits = encode_labels(images.texts(self.split_column), SPLITS, f"{images.name}, column {self.split_column!r}")
        rows = {name: (splits == i).nonzero()[:, 0] for i, name in enumerate(SPLITS)}
        if not len(rows["val"]) and self.val_fraction:
            train = rows["train"]
            drawn = stratified_split(labels[train], {"val": self.val_fraction}, self.seed, units[train])
            rows |= {name: train[chosen] for name, chosen in drawn.items()}
        self._check_apart(names, units, rows, images.name)
        return rows

    def _check_apart(self, names: list[str], units: Tensor, rows: dict[str, Tensor], table: str) -> None:
        owner: dict[int, str] = {}
        for split, chosen in rows.items():
            for unit in set(units[chosen].tolist()):
                if owner.setdefault(unit, split) != split:
                    raise ValueError(
                        f"{table}: {self.split_by} {names[unit]!r} is in {owner[unit]!r} and {split!r} by column "
                        f"{self.split_column!r}, so that images like those of training would be tested; mend the column"
                    )
