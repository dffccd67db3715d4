"""`PrecomputedFeatures`: embeddings that somebody else computed, with labels and concepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.data.feature_cache import as_float32
from cbm_lightning.data.images import stratified_split

SPLITS = ("train", "val", "test")
ROWS = {
    "embedding": ("N", "D"),
    "tokens": ("N", "T", "D"),
    "token_mask": ("N", "T"),
    "label": ("N",),
    "concepts": ("N", "K"),
    "certainty": ("N", "K"),
    "group": ("N",),
    "split": ("N",),
}
"""Arrays of a file with a row a sample, and their shapes."""
TABLES = ("text_embeddings", "class_embeddings", "concept_names", "class_names")
"""Arrays that a file holds once."""


class PrecomputedFeatures(ConceptDataModule):
    """Trains on embeddings that exist already, read from ``.npz`` or ``.safetensors`` arrays.

    A file holds ``embedding [N, D]`` or ``tokens [N, T, D]`` (whose mean is the embedding where there is none) and
    ``label [N]``; optionally ``token_mask [N, T]`` (False for padding), ``concepts [N, K]`` in [0, 1] with NaN where
    not annotated, ``certainty [N, K]``, ``group [N]``, ``split [N]`` (0, 1, 2 or ``train``, ``val``, ``test``; any
    other value leaves the row out), ``text_embeddings [K, D]`` (they become the embeddings of the `concept_set`),
    ``class_embeddings [L, D]`` (the same for the classes), and the string arrays ``concept_names [K]`` and
    ``class_names [L]``. Without ``concepts`` no concept is annotated, which
    is enough for bottlenecks that read texts. Files of `CachedFeatures` can be read too.

    Args:
        path: A file, or a file a split: ``{"train": "a.npz", "val": "b.npz", "test": "c.npz"}``.
        arrays: Names of the arrays in the files where they differ from the above: ``{"embedding": "features"}``.
        concepts: What the concepts are: names, a concept file, or all that `ConceptSet` takes. None reads
            ``concept_names``, and numbers the concepts if there are none.
        classes: Class names in label order. None reads ``class_names``, and numbers the classes if there are none.
        val_fraction: Share of each class held out for validation where neither files nor ``split`` say.
        test_fraction: The same for test.
        batch_size: Samples a batch and process.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of splits and order.

    Raises:
        FileNotFoundError: A file is missing.
        KeyError: A file lacks an array; the message lists those it has.
        ValueError: A file is not readable, arrays do not fit each other, an embedding is not finite, a label is out of
            range, or a concept is outside [0, 1].

    Example:
        >>> import numpy as np, pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "features.npz"
        >>> np.savez(path, embedding=np.eye(9), label=np.arange(9) % 3, concepts=np.ones((9, 2)))
        >>> data = PrecomputedFeatures(str(path), concepts=["red", "round"], classes=["a", "b", "c"])
        >>> data.feature_dim, data.num_classes
        (9, 3)
    """

    def __init__(
        self,
        path: str | dict[str, str],
        arrays: dict[str, str] | None = None,
        concepts: list[str] | str | dict[str, Any] | None = None,
        classes: list[str] | None = None,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        self.paths = {name: Path(file) for name, file in (path if isinstance(path, dict) else {"all": path}).items()}
        if isinstance(path, dict) and (not path or not set(path) <= set(SPLITS)):
            raise ValueError(f"path: expected a file, or files by the names {SPLITS}, got {sorted(path)}")
        self._names = _array_names(arrays or {})
        tables: dict[str, Any] = {}
        self._parts: dict[str, dict[str, Tensor]] = {}
        for name, file in self.paths.items():
            self._parts[name], found = self._read(file)
            tables = found | tables
        self._concept_set = self._make_concept_set(concepts, tables)
        self._class_names = self._make_class_names(classes, tables)
        self._class_embeddings = self._make_class_embeddings(tables)
        self._check_concepts()
        if set(self._parts) == {"all"}:
            self._parts = self._divide({"test": test_fraction, "val": val_fraction})

    @property
    def concept_set(self) -> ConceptSet:
        """The concepts, with the text vectors of the file as embeddings."""
        return self._concept_set

    @property
    def class_names(self) -> list[str]:
        """The classes in label order."""
        return self._class_names

    @property
    def class_embeddings(self) -> Tensor | None:
        """``[L, D]`` text vectors of the classes, for heads that read texts; None if the files have none."""
        return self._class_embeddings

    @property
    def feature_dim(self) -> int:
        """Width of the embeddings."""
        return next(iter(self._parts.values()))["embedding"].shape[1]

    def files(self) -> list[Path]:
        """The files given."""
        return list(self.paths.values())

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """``(concepts [N, K], labels [N])`` of a split; call after `setup`."""
        tensors = self.splits[split].tensors  # type: ignore[attr-defined]
        return tensors["concepts"], tensors["label"]

    def make_split(self, name: str) -> TensorDataset:
        """The rows of a split.

        Raises:
            ValueError: No file was given for this split.
        """
        if name not in self._parts:
            raise ValueError(f"path: there is no file for the {name} split, only for {list(self._parts)}")
        return TensorDataset(self._parts[name], as_float32)

    def _divide(self, fractions: dict[str, float]) -> dict[str, dict[str, Tensor]]:
        rows = self._parts["all"]
        if "split" in rows:
            split = rows.pop("split")
            chosen = {name: (split == number).nonzero()[:, 0] for number, name in enumerate(SPLITS)}
        else:
            chosen = stratified_split(rows["label"], fractions, self.seed)
        return {name: {role: tensor[chosen[name]] for role, tensor in rows.items()} for name in SPLITS}

    def _read(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        held = _read_arrays(path)
        found = {role: held[array] for role, array in self._names.items() if array in held}
        missing = [self._names["label"]] if "label" not in found else []
        if not {"embedding", "tokens"} & set(found):
            missing.append(f"{self._names['embedding']} (or {self._names['tokens']})")
        if missing:
            raise KeyError(f"{path} lacks {missing}, it has {sorted(held)}; name them with arrays={{...}}")
        tables = {role: found.pop(role) for role in TABLES if role in found}
        if "all" not in self.paths:
            found.pop("split", None)
        rows = {role: _as_tensor(role, array, path) for role, array in found.items()}
        _check_rows(rows, path)
        if "embedding" not in rows:
            real = rows.get("token_mask", torch.ones(rows["tokens"].shape[:2])).float()
            weight = real / real.sum(1, keepdim=True).clamp(min=1.0)
            rows["embedding"] = torch.einsum("ntd,nt->nd", rows["tokens"].float(), weight)
        return rows, tables

    def _make_concept_set(self, source: list[str] | str | dict[str, Any] | None, tables: dict[str, Any]) -> ConceptSet:
        texts = tables.get("text_embeddings")
        widths = {rows["concepts"].shape[1] for rows in self._parts.values() if "concepts" in rows}
        if source is None and "concept_names" in tables:
            source = [str(name) for name in tables["concept_names"].tolist()]
        if source is None and not widths and texts is None:
            raise ValueError("concepts: the files hold neither concepts nor text_embeddings; say concepts=[names]")
        number = max([*widths, 0 if texts is None else len(texts)])
        made = ConceptSet.make(number if source is None else source)
        if widths - {len(made)}:
            raise ValueError(f"concepts: expected {len(made)} columns for {_few(made.names)}, got {sorted(widths)}")
        if texts is None:
            return made
        return ConceptSet(made.names, made.groups, made.kinds, made.texts, self._vectors("text_embeddings", texts))

    def _make_class_names(self, given: list[str] | None, tables: dict[str, Any]) -> list[str]:
        labels = torch.cat([rows["label"] for rows in self._parts.values()])
        names = tables["class_names"].tolist() if given is None and "class_names" in tables else given
        number = max(int(labels.max()) + 1, len(tables.get("class_embeddings", ())))
        known = [str(name) for name in (range(number) if names is None else names)]
        outside = (labels < 0) | (labels >= len(known))
        if outside.any():
            wrong = sorted(set(labels[outside].tolist()))
            raise ValueError(f"label: expected 0 to {len(known) - 1} for the classes {_few(known)}, got {_few(wrong)}")
        return known

    def _make_class_embeddings(self, tables: dict[str, Any]) -> Tensor | None:
        if "class_embeddings" not in tables:
            return None
        vectors = self._vectors("class_embeddings", tables["class_embeddings"])
        if vectors.ndim != 2 or len(vectors) != len(self._class_names):
            raise ValueError(
                f"class_embeddings: expected [{len(self._class_names)}, D], a row a class of "
                f"{_few(self._class_names)}, got {list(vectors.shape)}"
            )
        return vectors

    def _vectors(self, role: str, array: Any) -> Tensor:
        vectors = _as_tensor(role, array, next(iter(self.paths.values()))).float()
        if not vectors.isfinite().all():
            raise ValueError(f"{role}: expected finite numbers, got NaN or infinity")
        return vectors

    def _check_concepts(self) -> None:
        bounded = ~self._concept_set.is_real()
        for name, rows in self._parts.items():
            values = rows.setdefault("concepts", torch.full((len(rows["label"]), len(self._concept_set)), torch.nan))
            wrong = values.isinf() | (bounded & ((values < 0) | (values > 1)))
            if wrong.any():
                row, k = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"concepts: expected values in [0, 1], got {values[row, k].item():g} for "
                    f"{self._concept_set.names[k]!r} in row {row} of {self.paths[name]}; rescale it, or declare a "
                    "finite one real"
                )
            if "certainty" in rows and rows["certainty"].shape != values.shape:
                raise ValueError(f"certainty: expected {list(values.shape)}, got {list(rows['certainty'].shape)}")
        shapes = {name: {role: list(t.shape[1:]) for role, t in rows.items()} for name, rows in self._parts.items()}
        if any(shape != next(iter(shapes.values())) for shape in shapes.values()):
            raise ValueError(f"path: expected the same arrays and widths in every file, got {shapes}")


def _array_names(given: dict[str, str]) -> dict[str, str]:
    roles = (*ROWS, *TABLES)
    if unknown := sorted(set(given) - set(roles)):
        raise ValueError(f"arrays: expected the keys {roles}, got {unknown}")
    return {role: given.get(role, role) for role in roles}


def _read_arrays(path: Path) -> dict[str, Any]:
    """All arrays of a file: NumPy arrays of an ``.npz``, memory-mapped tensors of a ``.safetensors``."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no file of features at {path}")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        if path.suffix == ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(path, framework="pt") as file:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(error) from error
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ValueError(f"path: {path} cannot be read: {error}") from error
    raise ValueError(f"path: expected a .npz or .safetensors file, got {path}")


def _as_tensor(role: str, array: Any, path: Path) -> Tensor:
    if role == "split" and not isinstance(array, Tensor) and array.dtype.kind in "US":
        names = array.astype(str)
        array = np.select([names == name for name in SPLITS], range(len(SPLITS)), default=-1)
    try:
        tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    except TypeError as error:
        raise ValueError(f"{role}: expected numbers in {path}, got {array.dtype}") from error
    if role in ("label", "group", "split"):
        if tensor.is_floating_point():
            raise ValueError(f"{role}: expected integers in {path}, got {tensor.dtype}")
        return tensor.long()
    if role == "token_mask":
        return tensor.bool()
    if role in ("concepts", "certainty"):
        return tensor.float()
    return tensor if tensor.is_floating_point() else tensor.float()


def _check_rows(rows: dict[str, Tensor], path: Path) -> None:
    count = len(rows["label"])
    for role, tensor in rows.items():
        if tensor.ndim != len(ROWS[role]) or len(tensor) != count:
            expected = ", ".join(ROWS[role])
            raise ValueError(f"{role}: expected [{expected}] with N={count} in {path}, got {list(tensor.shape)}")
    if count == 0:
        raise ValueError(f"path: {path} holds no samples")
    for role in {"embedding", "tokens"} & set(rows):
        broken = ~rows[role].flatten(1).isfinite().all(1)
        if broken.any():
            raise ValueError(
                f"{role}: expected finite numbers, got NaN or infinity in {int(broken.sum())} rows of {path}, "
                f"the first is {int(broken.nonzero()[0])}"
            )


def _few(values: Any) -> str:
    values = list(values)
    return str(values) if len(values) <= 5 else f"{values[:5]} and {len(values) - 5} more"
