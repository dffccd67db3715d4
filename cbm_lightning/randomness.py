"""Random numbers that a resumed run draws again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


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
