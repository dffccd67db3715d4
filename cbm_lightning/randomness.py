"""Random numbers that a resumed run draws again, and that depend on no other sample."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_COLUMN_BITS = 24


def step_generator(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by a tuple of numbers (seed, step, process), independent of the global one."""
    seed = int(np.random.SeedSequence([n % 2**63 for n in numbers]).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed % 2**63)


def rng_state() -> dict[str, Any]:
    """The global random states of Python, NumPy and torch as tensors and plain numbers."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  # users' code draws here
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: dict[str, Any]) -> None:
    """Set the global random states to what `rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def all_rng_states() -> list[dict[str, Any]]:
    """The random states of every process, in rank order; a collective call when there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [rng_state()]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, rng_state())
    return states


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch keeps the sign of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Randomness:
    """Independent streams of uniforms for a set of samples, by a counter-based hash (the finaliser of SplitMix64).

    What is drawn for a sample is the same however many others there are, and in whatever batches they come.

    Args:
        seed: Seed of all streams.
        name: Name of what is drawn for (a split of the data, a policy); names share no numbers.
        index: ``[N]`` int64, the samples.

    Example:
        >>> few, many = (Randomness(0, "train", torch.arange(n)).uniform("pose", 2) for n in (3, 9))
        >>> bool((few == many[:3]).all())
        True
    """

    seed: int
    name: str
    index: Tensor

    def uniform(self, stream: str, columns: int) -> Tensor:
        """``[N, columns]`` uniforms in [0, 1), the same for the same stream name."""
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{stream}".encode(), digest_size=8).digest()
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
        return Randomness(self.seed, self.name, self.index[rows])
