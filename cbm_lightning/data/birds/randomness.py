"""Random numbers that depend on nothing but a key and an index: image ``i`` is the same however many are drawn."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_COLUMN_BITS = 24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch keeps the sign of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Randomness:
    """Independent streams of uniforms for a set of samples, by a counter-based hash (the finaliser of SplitMix64).

    Args:
        seed: Seed of the data.
        split: Name of the split; splits share no numbers.
        index: ``[N]`` int64, the samples.

    Example:
        >>> few, many = (Randomness(0, "train", torch.arange(n)).uniform("pose", 2) for n in (3, 9))
        >>> bool((few == many[:3]).all())
        True
    """

    seed: int
    split: str
    index: Tensor

    def uniform(self, stream: str, columns: int) -> Tensor:
        """``[N, columns]`` uniforms in [0, 1), the same for the same stream name."""
        digest = hashlib.blake2b(f"{self.seed}/{self.split}/{stream}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        counter = (self.index[:, None] << _COLUMN_BITS) + torch.arange(columns)
        x = counter * _GOLDEN + key
        x = (x ^ _shift(x, 30)) * _FIRST
        x = (x ^ _shift(x, 27)) * _SECOND
        return _shift(x ^ _shift(x, 31), 40).float() / (1 << 24)

    def between(self, stream: str, low: float, high: float, columns: int = 1) -> Tensor:
        """``[N, columns]`` uniforms in [low, high)."""
        return low + (high - low) * self.uniform(stream, columns)

    def happens(self, stream: str, probability: float) -> Tensor:
        """``[N]`` bool, True with a probability."""
        return self.uniform(stream, 1)[:, 0] < probability

    def choice(self, stream: str, number: int) -> Tensor:
        """``[N]`` int64, uniform over ``range(number)``."""
        return (self.uniform(stream, 1)[:, 0] * number).long()

    def normal(self, stream: str, columns: int) -> Tensor:
        """``[N, columns]`` standard normal numbers."""
        # half a step away from 0, where the quantile is infinite
        normal: Tensor = torch.special.ndtri(self.uniform(stream, columns).double() + 0.5 / (1 << 24))
        return normal.float()

    def rows(self, rows: Tensor) -> Randomness:
        """The same streams for some of the samples."""
        return Randomness(self.seed, self.split, self.index[rows])
