"""Files of cached features: named by their content, written row by row, verified and memory-mapped when read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from cbm_lightning.types import Batch

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types in the safetensors format."""


class CorruptCacheError(ValueError):
    """A cache file is truncated, altered, or not the one that its name promises."""


def content_key(value: Any) -> str:
    """Name a nested structure of tensors and plain values by its content.

    Args:
        value: Tensors, plain values, and mappings and sequences of them. The order of a mapping counts.

    Returns:
        64 hexadecimal digits (SHA-256), the same on every machine.

    Example:
        >>> content_key({"a": 1}) == content_key({"a": 1.5})
        False
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(_as_bytes(value))
    elif isinstance(value, Mapping):
        digest.update(f"mapping{len(value)}".encode())
        for name, item in value.items():
            _feed(digest, name)
            _feed(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        # the length keeps neighbours apart: ("ab", "c") is not ("a", "bc")
        text = f"{type(value).__name__}{value!r}"
        digest.update(f"{len(text)}{text}".encode())


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class _Column(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    row_bytes: int


def write(path: Path, key: str, rows: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Write batches of rows into one safetensors file, holding no more than a batch in memory.

    The file appears under its name only when it is complete; whatever goes wrong leaves an older file in place.

    Args:
        path: The file; its folder is made.
        key: What `read` must be given to get the rows back.
        rows: Number of rows ``N`` that the batches add up to.
        batches: Name to ``[B, ...]`` tensor, the same names, types and row shapes in every batch.

    Raises:
        ValueError: Batches differ in names, types or shapes, or do not add up to ``rows``.
        OSError: The disk is full or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}.draft")
    try:
        with draft.open("w+b") as file:
            _write_rows(file, key, rows, batches)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _write_rows(file: BufferedRandom, key: str, rows: int, batches: Iterable[Mapping[str, Tensor]]) -> None:
    columns: dict[str, _Column] = {}
    first, written = 0, 0
    for batch in batches:
        if not columns:
            columns = _lay_out(batch, rows)
            first = len(_header(columns, rows, key, digest=""))
        _check_batch(columns, batch)
        for name, column in columns.items():
            file.seek(first + column.start + written * column.row_bytes)
            file.write(_as_bytes(batch[name]))
        written += len(next(iter(batch.values())))
    if not columns or written != rows:
        raise ValueError(f"rows: expected {rows} in all, the batches hold {written}")
    file.seek(first)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0)
    file.write(_header(columns, rows, key, digest))


def _lay_out(batch: Mapping[str, Tensor], rows: int) -> dict[str, _Column]:
    columns, start = {}, 0
    # wide types first keep every column aligned to its own element size
    for name, tensor in sorted(batch.items(), key=lambda item: -item[1].element_size()):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: tensors of type {tensor.dtype} cannot be cached; expected one of {list(DTYPES)}")
        row_bytes = tensor.element_size() * tensor.shape[1:].numel()
        columns[name] = _Column(tensor.dtype, tuple(tensor.shape[1:]), start, row_bytes)
        start += rows * row_bytes
    return columns


def _check_batch(columns: Mapping[str, _Column], batch: Mapping[str, Tensor]) -> None:
    expected = {name: (str(column.dtype), column.shape) for name, column in columns.items()}
    got = {name: (str(tensor.dtype), tuple(tensor.shape[1:])) for name, tensor in batch.items()}
    if got != expected:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise ValueError(
            f"batches: every sample needs the same tensors, but {differing} differ: the first batch has "
            f"{[expected.get(name) for name in differing]}, a later one {[got.get(name) for name in differing]}"
        )


def _header(columns: Mapping[str, _Column], rows: int, key: str, digest: str) -> bytes:
    """The head of a safetensors file: its length as 8 little-endian bytes, then JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": key, "sha256": digest.rjust(64)}}
    for name, column in columns.items():
        span = [column.start, column.start + rows * column.row_bytes]
        entries[name] = {"dtype": DTYPES[column.dtype], "shape": [rows, *column.shape], "data_offsets": span}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read(path: Path, key: str) -> dict[str, Tensor]:
    """Open a file of cached features without loading it: the tensors are views of the file, read as they are touched.

    Args:
        path: A file that `write` made.
        key: The key that it was written with.

    Returns:
        Name to ``[N, ...]`` tensor.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptCacheError: The file is truncated, or holds another key.
    """
    return _open(path, key)[0]


def verify(path: Path, key: str) -> None:
    """Read a whole file of cached features and compare it with its checksum.

    Raises:
        FileNotFoundError: There is no such file.
        CorruptCacheError: The file is truncated or altered, or holds another key.
    """
    _, metadata = _open(path, key)
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if metadata.get("sha256") != digest:
        raise CorruptCacheError(f"the content of {path} does not match its checksum")


def _open(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"no cached features at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptCacheError(f"{path} is not a whole safetensors file: {error}") from error
    if metadata.get("key") != key:
        raise CorruptCacheError(f"{path} holds features of the key {metadata.get('key')}, expected {key}")
    return tensors, metadata


def as_float32(batch: Batch) -> Batch:
    """The batch with its features in single precision, whatever their type in the file."""
    return {name: value.float() if name in ("embedding", "tokens") else value for name, value in batch.items()}
