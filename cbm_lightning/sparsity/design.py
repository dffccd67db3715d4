"""The matrix of concept scores that a sparse head is fitted on, read in chunks and standardised on the way."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK_NUMBERS = 2**24
"""How many numbers of a file-backed array are read at a time: 64 MiB in single precision."""


class ConstantConceptWarning(UserWarning):
    """A concept has the same score in every sample, so no class can rest on it."""


class Design:
    """Rows of concept scores ``[n, K]``, centred and scaled, of this process or of all together.

    What fits in one chunk is standardised once and kept; of more than that only a chunk is in memory at a time.

    Args:
        x: ``[n, K]`` array or tensor, also file-backed (``numpy.memmap``).
        standardize: Divide each concept by its standard deviation.
        center: Subtract each concept's mean, which an intercept makes up for.
        dtype: Of all computation.
        device: Of all computation; that of ``x`` by default.
        chunk_size: Rows a chunk; by default all rows, or 64 MiB of them if ``x`` is file-backed.
        distributed: Every process of the default group brings rows of its own, and sums go over all of them.
        names: Of the concepts, for messages.

    Attributes:
        rows: Number of rows of all processes.
        mean: ``[K]`` what is subtracted.
        scale: ``[K]`` what is divided by; infinite for a constant concept, which therefore reads 0.

    Raises:
        ValueError: ``x`` is no matrix, is empty, or has entries that are not finite; the message names the concepts.
    """

    def __init__(
        self,
        x: Any,
        *,
        standardize: bool = True,
        center: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        chunk_size: int | None = None,
        distributed: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        if hasattr(x, "todense"):
            raise ValueError(f"X: expected an array, got the sparse {type(x).__name__}; hand over X.toarray()")
        if getattr(x, "ndim", None) != 2 or 0 in x.shape:
            raise ValueError(f"X: expected a matrix [n, K] with samples, got shape {list(np.shape(x))}")
        self.x, self.dtype, self.distributed = x, dtype, distributed
        self.device = torch.device(device if device is not None else x.device if isinstance(x, Tensor) else "cpu")
        self.local_rows, self.columns = int(x.shape[0]), int(x.shape[1])
        if chunk_size is None:
            file_backed = isinstance(x, np.memmap)
            chunk_size = max(CHUNK_NUMBERS // self.columns, 1) if file_backed else self.local_rows
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1 row, got {chunk_size}")
        self.chunk_size = chunk_size
        self.names = list(names) if names is not None else [str(k) for k in range(self.columns)]
        if len(self.names) != self.columns:
            raise ValueError(f"names: expected {self.columns}, one a column of X, got {len(self.names)}")
        self._kept: Tensor | None = None
        self.mean = torch.zeros(self.columns, dtype=dtype, device=self.device)
        self.scale = torch.ones_like(self.mean)
        self._standardize(standardize, center)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, or ``x`` as it is where there is only one."""
        if self.distributed:
            torch.distributed.all_reduce(x)
        return x

    def slices(self) -> list[slice]:
        """The rows of each chunk."""
        return [slice(i, min(i + self.chunk_size, self.local_rows)) for i in range(0, self.local_rows, self.chunk_size)]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The rows of each chunk, standardised."""
        if self._kept is not None:
            yield slice(0, self.local_rows), self._kept
            return
        for rows in self.slices():
            yield rows, torch.sub(self._read(rows), self.mean).div_(self.scale)

    def gram(self) -> Tensor:
        """``[K, K]`` mean of the outer products of the rows."""
        total = torch.zeros(self.columns, self.columns, dtype=self.dtype, device=self.device)
        for _, x in self.chunks():
            total.addmm_(x.T, x)
        return self.sum(total) / self.rows

    def _read(self, rows: slice) -> Tensor:
        return as_tensor(self.x[rows]).to(self.device, self.dtype)

    def _standardize(self, standardize: bool, center: bool) -> None:
        """Two passes, summed in double precision, as the textbook variance in one would cancel digits."""
        first = torch.zeros(self.columns + 1, dtype=torch.float64, device=self.device)
        for rows in self.slices():
            first[:-1] += self._read(rows).sum(0, dtype=torch.float64)
        first[-1] = self.local_rows
        self.sum(first)
        self.rows = int(first[-1])
        mean = first[:-1] / self.rows
        if not bool(mean.isfinite().all()):
            bad = [self.names[k] for k in (~mean.isfinite()).nonzero().flatten().tolist()]
            raise ValueError(f"X: expected finite scores, got NaN or infinity in the concepts {_shown(bad)}")
        squares, rounded = torch.zeros_like(mean), mean.to(self.dtype)
        for rows in self.slices():
            squares += torch.sub(self._read(rows), rounded).double().square_().sum(0)
        deviation = (self.sum(squares) / max(self.rows - 1, 1)).sqrt()
        constant = deviation <= 8 * torch.finfo(self.dtype).eps * mean.abs()
        if bool(constant.any()) and (standardize or center):
            named = [self.names[k] for k in constant.nonzero().flatten().tolist()]
            warnings.warn(
                f"the concepts {_shown(named)} have the same score in every sample; they get no weight",
                ConstantConceptWarning,
                stacklevel=2,
            )
            deviation = torch.where(constant, torch.inf, deviation if standardize else 1.0)
        elif not standardize:
            deviation = torch.ones_like(deviation)
        self.scale = deviation.to(self.dtype)
        if center:
            self.mean = rounded
        if self.chunk_size >= self.local_rows:
            self._kept = torch.sub(self._read(slice(0, self.local_rows)), self.mean).div_(self.scale)


def as_tensor(x: Any) -> Tensor:
    """An array or tensor as a tensor without gradient; arrays that must not be written to, or not lie in order, too."""
    if isinstance(x, Tensor):
        return x.detach()
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"X: expected numbers, got an array of {array.dtype}")
    # torch shares the memory of arrays, and of none that is read-only, reversed or of another byte order
    shareable = array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative
    return torch.from_numpy(array if shareable else np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def _shown(names: Sequence[str], most: int = 8) -> str:
    """Names for a message, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{list(names[:most])}{more}"
