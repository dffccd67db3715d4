"""`CUB200`: birds with attributes, read from the official CUB_200_2011 folder."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.cub_annotations import (
    DEFINITELY,
    NOT_VISIBLE,
    PARTS_TABLES,
    TABLES,
    CubAnnotations,
    attribute_concepts,
    class_votes,
    find_folder,
    frequent_attributes,
    read_annotations,
    read_parts,
    soften,
)
from cbm_lightning.data.cub_parts import CubImages, candidate_parts
from cbm_lightning.data.images import ImageDataModule, ImageDataset, stratified_split

ARCHIVE_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
ARCHIVE_MD5 = "97eceeb196236b17998738112f37df78"


class CUB200(ImageDataModule):
    """Caltech-UCSD Birds 200-2011 with the 112 concepts of Koh et al. (ICML 2020), from the official folder.

    The concepts are the attributes that hold, by majority vote of the official training images, in at least
    ``min_classes`` of the 200 classes, under their official names and in official order, in 28 groups by what stands
    before ``::``. Koh et al. voted on their own four fifths of the training images; all of them make the concepts
    independent of the validation split. Batches have ``certainty [B, K]`` in [0, 1] as well: 0 not visible, 1/3
    guessing, 2/3 probably, 1 definitely.

    Args:
        root: The ``CUB_200_2011`` folder or the one that holds it.
        classes: Keep these classes, by official number (1 to 200) or name, in this label order; None keeps all. The
            concepts are chosen on all classes in any case, and only images of kept classes need to exist.
        labels: ``"class"`` gives every image the voted concepts of its class; ``"instance"`` what the annotator of the
            image said, with 0 where not visible; ``"soft"`` the same softened by certainty (yes 0, .5, .75, 1 and no 0,
            .5, .25, 0 from not visible to definitely).
        val_fraction: Share of the official training images of each class held out for validation.
        min_classes: An attribute becomes a concept if it holds in at least this many classes.
        parts: Add ``parts [B, 15, 3]`` to batches without augmentation: ``(x, y, visible)`` in pixels of the
            transformed image, in the order of `part_names`; and ``concept_points [B, K, 2]``: ``(x, y)`` there of
            the part that shows each concept, by `cub_parts.PARTS_OF_GROUP`. A point is NaN where the concept is absent
            (or guessed) by the ``labels`` chosen, is about no single part, or has not exactly one of its parts visible
            in the transformed image (both wings, say).
        download: Fetch the archive (1.1 GB) into ``root`` if the folder is not there yet.
        options: Of `ImageDataModule` (``train_transform``, ``eval_transform``, ``image_size``, ``augment``) and
            `ConceptDataModule` (``batch_size``, ``num_workers``, ``seed``).

    Raises:
        FileNotFoundError: The folder or one of its tables is missing, and ``download`` is off.
        ValueError: An option is out of range, or ``classes`` names an unknown class or one twice.

    Example:
        >>> data = CUB200("data", classes=[1, 2, "Sooty_Albatross"])  # doctest: +SKIP
        >>> len(data.concept_set), data.class_names[2]  # doctest: +SKIP
        (112, 'Sooty Albatross')
    """

    def __init__(
        self,
        root: str,
        *,
        classes: list[int | str] | None = None,
        labels: Literal["class", "instance", "soft"] = "class",
        val_fraction: float = 0.2,
        min_classes: int = 10,
        parts: bool = False,
        download: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if labels not in ("class", "instance", "soft"):
            raise ValueError(f"labels: expected 'class', 'instance' or 'soft', got {labels!r}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction: expected a share between 0 and 1, got {val_fraction}")
        self.root = Path(root).expanduser()
        self.classes = classes
        self.labels = labels
        self.val_fraction = val_fraction
        self.min_classes = min_classes
        self.parts = parts
        self.download = download
        if not download:
            find_folder(self.root)

    @property
    def concept_set(self) -> ConceptSet:
        """The voted concepts; reads the tables, and fetches them first if ``download`` is on."""
        return attribute_concepts([self.tables.attributes[k] for k in self._concepts])

    @property
    def class_names(self) -> list[str]:
        """Names of the kept classes in label order, without number and underscores."""
        return [_readable(self.tables.classes[c]) for c in self._kept]

    @property
    def part_names(self) -> list[str]:
        """Names of the 15 parts."""
        return self._parts[0]

    @cached_property
    def folder(self) -> Path:
        """The official folder, fetched if it is missing and ``download`` is on."""
        self.prepare_data()
        return find_folder(self.root)

    @cached_property
    def tables(self) -> CubAnnotations:
        """The official annotation of all 200 classes."""
        return read_annotations(self.folder)

    def prepare_data(self) -> None:
        """Fetch the archive if ``download`` is on and the folder is not there."""
        if self.download and not (self.root / "CUB_200_2011").is_dir() and not (self.root / "images.txt").is_file():
            fetch_archive(ARCHIVE_URL, ARCHIVE_MD5, self.root)

    def files(self) -> Iterable[Path]:
        """The images of the kept classes and the tables that were read."""
        yield from (self.folder / table for table in (*TABLES, *(PARTS_TABLES if self.parts else ())))
        yield from self._paths(np.flatnonzero(np.isin(self.tables.labels, self._kept)))

    def make_split(self, name: str) -> ImageDataset:
        """The official test split, or a part of the official training split.

        Raises:
            FileNotFoundError: Images are missing; the message names the first and says how many. Training asks for
                those of all splits, so that no test fails after hours.
        """
        for split in ("train", "val", "test") if name == "train" else (name,):
            self._check_images(split)
        rows = self._rows(name)
        paths = self._paths(rows)
        tensors = {
            "label": self._label_of_class()[torch.from_numpy(self.tables.labels[rows])],
            "concepts": self._concept_values(rows),
            "certainty": self._certainty(rows),
        }
        options: dict[str, Any] = {"augmented": self.is_augmented(name), "seed": self.seed}
        if self.parts:
            names, locations = self._parts
            options["parts"] = locations[torch.from_numpy(rows)]
            options["candidates"] = candidate_parts(self.concept_set.names, names)
        return CubImages(paths, tensors, self.transform_of(name), **options)

    @cached_property
    def _parts(self) -> tuple[list[str], Tensor]:
        """Names of the parts, and their locations ``[N, P, 3]`` in all official images."""
        return read_parts(self.folder, self.tables.image_ids)

    @cached_property
    def _votes(self) -> NDArray[np.uint8]:
        t = self.tables
        train = t.official_train
        return class_votes(t.present[train], t.certainty[train], t.labels[train], len(t.classes))

    @cached_property
    def _concepts(self) -> list[int]:
        """Positions of the concepts among the attributes."""
        concepts = frequent_attributes(self._votes, self.min_classes)
        if not concepts:
            raise ValueError(f"min_classes: no attribute holds in {self.min_classes} classes; lower it")
        return concepts

    @cached_property
    def _kept(self) -> list[int]:
        """Positions of the kept classes among all, in label order."""
        names = self.tables.classes
        if self.classes is None:
            return list(range(len(names)))
        position = {spelling: c for c, name in enumerate(names) for spelling in _spellings(name)}
        kept = [position.get(str(chosen).lower(), -1) for chosen in self.classes]
        if unknown := [chosen for chosen, c in zip(self.classes, kept, strict=True) if c < 0]:
            raise ValueError(
                f"classes: no class is called {unknown}; expected 1 to {len(names)} or names as {names[0]!r}"
            )
        if len(set(kept)) != len(kept) or not kept:
            raise ValueError(f"classes: expected at least one class and each once, got {self.classes}")
        return kept

    def _rows(self, split: str) -> NDArray[np.int64]:
        """Positions of the images of a split in the official tables, ascending."""
        kept = np.isin(self.tables.labels, self._kept)
        if split == "test":
            return np.flatnonzero(kept & ~self.tables.official_train)
        rows = np.flatnonzero(kept & self.tables.official_train)
        labels = torch.from_numpy(self.tables.labels[rows])
        chosen = stratified_split(labels, {"val": self.val_fraction}, self.seed)[split]
        return np.take(rows, chosen.numpy())

    def _paths(self, rows: NDArray[np.int64]) -> list[Path]:
        return [self.folder / "images" / self.tables.paths[row] for row in rows]

    def _check_images(self, split: str) -> None:
        paths = self._paths(self._rows(split))
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(paths)} images of the {split} split are missing, the first is {missing[0]}; "
                "unpack the official archive again, or let classes name only those whose images are there"
            )

    def _label_of_class(self) -> Tensor:
        labels = torch.full((len(self.tables.classes),), -1)
        labels[self._kept] = torch.arange(len(self._kept))
        return labels

    def _concept_values(self, rows: NDArray[np.int64]) -> Tensor:
        if self.labels == "class":
            return torch.from_numpy(self._votes[self.tables.labels[rows]][:, self._concepts]).float()
        present = self.tables.present[rows][:, self._concepts]
        if self.labels == "instance":
            return torch.from_numpy(present).float()
        return torch.from_numpy(soften(present, self.tables.certainty[rows][:, self._concepts]))

    def _certainty(self, rows: NDArray[np.int64]) -> Tensor:
        codes = torch.from_numpy(self.tables.certainty[rows][:, self._concepts]).float()
        return (codes - NOT_VISIBLE) / (DEFINITELY - NOT_VISIBLE)


def fetch_archive(url: str, md5: str, root: Path) -> None:
    """Fetch the official archive and put its ``CUB_200_2011`` folder into ``root``, whole or not at all.

    Several processes may do so at once: each works on a draft of its own, and the first to finish wins.

    Args:
        url: Where the archive lies.
        md5: Checksum of the archive in hexadecimal digits.
        root: Folder that receives ``CUB_200_2011``; made if need be.

    Raises:
        ConnectionError: The archive cannot be fetched.
        ValueError: The checksum differs.
    """
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".CUB_200_2011.draft-", dir=root) as draft_name:
        draft = Path(draft_name)
        archive = draft / "CUB_200_2011.tgz"
        _fetch(url, archive)
        with archive.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != md5:
            raise ValueError(f"{url}: expected a file with MD5 {md5}, got {found}; try again, or fetch it by hand")
        with tarfile.open(archive) as tar:
            tar.extractall(draft, filter="data")
        folder = draft / "CUB_200_2011"
        if not folder.is_dir():
            raise ValueError(f"{url}: expected a CUB_200_2011 folder in the archive and found none")
        if (draft / "attributes.txt").is_file():
            shutil.move(draft / "attributes.txt", folder / "attributes.txt")
        try:
            folder.rename(root / "CUB_200_2011")
        except OSError:
            if not (root / "CUB_200_2011" / "images.txt").is_file():
                raise


def _fetch(url: str, archive: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=60) as response, archive.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except OSError as error:
        raise ConnectionError(
            f"cannot fetch {url}: {error}; fetch CUB_200_2011.tgz by hand, unpack it into root and set download: false"
        ) from error


def _readable(name: str) -> str:
    return name.partition(".")[2].replace("_", " ") or name


def _spellings(name: str) -> set[str]:
    """How a user may write ``001.Black_footed_Albatross``: as it is, by number, or without number."""
    number, _, bird = name.lower().partition(".")
    return {name.lower(), bird, bird.replace("_", " "), str(int(number))} if number.isdecimal() else {name.lower()}
