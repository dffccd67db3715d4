"""Tables of images, labels and concepts as users write them, read with messages that name table, column and row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet

if TYPE_CHECKING:
    import pandas as pd

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
CERTAINTY, MASK = "certainty:", "mask:"


@dataclass(frozen=True)
class Table:
    """Columns and the name by which messages call them; rows count from 1 below the header.

    Args:
        frame: The columns.
        name: Name of the file.
    """

    frame: pd.DataFrame
    name: str

    @classmethod
    def read(cls, path: Path, texts: Sequence[str] = ()) -> Table:
        """Read a ``.csv`` or ``.parquet`` table.

        Args:
            path: The file.
            texts: Columns of a ``.csv`` to keep as they are written (``007`` stays ``007``), beside the first.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is neither kind, cannot be read, or has no rows.
        """
        import pandas as pd

        if not path.is_file():
            raise FileNotFoundError(f"no table at {path}; expected .csv or .parquet, relative to root")
        try:
            match path.suffix.lower():
                case ".csv":
                    first = pd.read_csv(path, nrows=0).columns[:1]
                    frame = pd.read_csv(path, dtype={str(column): "str" for column in (*first, *texts)})
                case ".parquet":
                    frame = pd.read_parquet(path)
                case suffix:
                    raise ValueError(f"expected .csv or .parquet, got {suffix!r}")
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read the table {path}: {error}") from error
        if frame.empty:
            raise ValueError(f"the table {path} has no rows")
        frame.columns = pd.Index([str(column) for column in frame.columns])
        return cls(frame, path.name)

    @classmethod
    def of_class_folders(cls, root: Path, classes: Iterable[str], image_column: str, label_column: str) -> Table:
        """The images in ``root/CLASS/``: paths relative to ``root`` and labels, by class and then alphabetically.

        Raises:
            FileNotFoundError: A class has no folder, or a folder no image.
            ValueError: A folder is none of the classes.
        """
        import pandas as pd

        expected = list(classes)
        folders = sorted(p.name for p in root.glob("*") if p.is_dir() and not p.name.startswith("."))
        if missing := [name for name in expected if name not in folders]:
            raise FileNotFoundError(f"{root} has no folder for the classes {missing[:5]}; it has {folders[:10]}")
        if unknown := [name for name in folders if name not in expected]:
            raise ValueError(
                f"the class table has no row for the folders {unknown[:5]} of {root}; add rows or move the folders"
            )
        found = {c: sorted(p for p in (root / c).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) for c in expected}
        if empty := [name for name, paths in found.items() if not paths]:
            raise FileNotFoundError(f"the folders {empty[:5]} of {root} hold no image; known are {IMAGE_SUFFIXES}")
        rows = [(path.relative_to(root).as_posix(), name) for name, paths in found.items() for path in paths]
        return cls(pd.DataFrame(rows, columns=[image_column, label_column]), str(root))

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return [str(column) for column in self.frame.columns]

    def __len__(self) -> int:
        return len(self.frame)

    def texts(self, column: str) -> list[str]:
        """A column of texts.

        Raises:
            ValueError: There is no such column, or a row has no value.
        """
        texts = self.optional_texts(column)
        if None in texts:
            raise ValueError(f"{self.name}: column {column!r}, row {texts.index(None) + 1}: expected a value, got none")
        return [text for text in texts if text is not None]

    def optional_texts(self, column: str) -> list[str | None]:
        """A column of texts, None where empty.

        Raises:
            ValueError: There is no such column.
        """
        if column not in self.columns:
            near = difflib.get_close_matches(column, self.columns, n=3)
            hint = f"did you mean {near}?" if near else f"it has {self.columns[:10]}"
            raise ValueError(f"{self.name} has no column {column!r}; {hint}")
        values = self.frame[column]
        return [None if empty else str(value) for value, empty in zip(values, values.isna(), strict=True)]

    def numbers(self, column: str, bounded: bool = True, hint: str = "") -> Tensor:
        """A column of numbers ``[N]``, NaN where empty.

        Args:
            column: Its name.
            bounded: Expect values in [0, 1].
            hint: What else a user may do about a value outside.

        Raises:
            ValueError: A value is not a finite number, or outside [0, 1] though bounded.
        """
        import pandas as pd

        values = self.frame[column]
        numbers = torch.from_numpy(
            pd.to_numeric(values, errors="coerce").to_numpy("float32", na_value=torch.nan).copy()
        )
        strange = numbers.isnan() & torch.from_numpy(values.notna().to_numpy(copy=True))
        outside = ((numbers < 0) | (numbers > 1)) if bounded else numbers.isinf()
        for wrong, wanted, advice in (
            (strange, "a number", "; mend the value, or list the columns that are concepts in concepts"),
            (outside, "a value in [0, 1]" if bounded else "a finite value", hint),
        ):
            if wrong.any():
                row = int(wrong.int().argmax())
                found = f"column {column!r}, row {row + 1}: expected {wanted}, got {values.iloc[row]!s}"
                raise ValueError(f"{self.name}: {found}{advice}")
        return numbers

    def about(self, prefix: str, concepts: ConceptSet) -> dict[str, str]:
        """Columns called ``PREFIX + CONCEPT``, by concept.

        Raises:
            ValueError: Such a column names no concept.
        """
        found = {column.removeprefix(prefix): column for column in self.columns if column.startswith(prefix)}
        for name, column in found.items():
            if name not in concepts.names:
                near = difflib.get_close_matches(name, concepts.names, n=3) or list(concepts.names[:5])
                raise ValueError(
                    f"{self.name}: column {column!r} is about no concept of this data; the nearest are {near}"
                )
        return found

    def concepts(self, concepts: ConceptSet) -> Tensor:
        """``[N, K]`` values of the concept columns, NaN where empty.

        Raises:
            ValueError: A value is not a number, or outside [0, 1] though its concept is not real.
        """
        hint = "; a concept of kind real, which concepts may say, takes any number"
        real = concepts.is_real().tolist()
        return torch.stack([self.numbers(name, not real[k], hint) for k, name in enumerate(concepts)], 1)

    def certainty(self, concepts: ConceptSet) -> Tensor | None:
        """``[N, K]`` from the ``certainty:CONCEPT`` columns, 1 where there is none; None without any such column.

        Raises:
            ValueError: A column names no concept, or a value is not a number in [0, 1].
        """
        found = self.about(CERTAINTY, concepts)
        if not found:
            return None
        certain = torch.ones(len(self))
        columns = [self.numbers(found[name]).nan_to_num(nan=1.0) if name in found else certain for name in concepts]
        return torch.stack(columns, 1)


def encode(values: Sequence[str]) -> tuple[list[str], Tensor]:
    """The distinct values, whole numbers by size and others by alphabet, and the position ``[N]`` of each row's."""
    names = sorted(set(values), key=int) if all(map(_is_whole, values)) else sorted(set(values))
    position = {name: i for i, name in enumerate(names)}
    return names, torch.tensor([position[value] for value in values])


def encode_labels(values: Sequence[str], classes: Sequence[str], where: str) -> Tensor:
    """The label ``[N]`` of each row among given classes.

    Args:
        values: A label a row: class names, or their positions as whole numbers.
        classes: Class names in label order.
        where: Table and column for messages.

    Raises:
        ValueError: A label is none of the classes; the message names the row.
    """
    position = {name: i for i, name in enumerate(classes)}
    whole = all(map(_is_whole, values)) and not set(values) <= set(position)
    if whole:
        position = {str(i): i for i in range(len(classes))}
    for row, value in enumerate(values, 1):
        if value not in position:
            expected = f"0 to {len(classes) - 1}, positions in classes" if whole else f"one of {list(classes[:10])}"
            near = difflib.get_close_matches(value, list(position), n=1)
            hint = f"; did you mean {near[0]!r}?" if near and not whole else ""
            raise ValueError(f"{where}, row {row}: expected {expected}, got {value!r}{hint}")
    return torch.tensor([position[value] for value in values])


def _is_whole(value: str) -> bool:
    return value.removeprefix("-").isdecimal() and str(int(value)) == value
