"""Do maps change when the weights they explain become random? If not, they show the image and not the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from cbm_lightning.randomness import step_generator

Similarity = Literal["cosine", "spearman"]

_ENTRIES = 2**22
"""Pixels that `map_similarity` ranks at once: memory stays bounded whatever the number of maps."""


@contextmanager
def randomised(module: nn.Module, seed: int) -> Iterator[None]:
    """Random weights in a module for the length of a ``with`` block (Adebayo et al. 2018, on the last layers only).

    Every submodule with ``reset_parameters`` is initialised anew. A parameter which that leaves as it was is drawn from
    a normal distribution with its own mean and standard deviation: its scale stays and its arrangement is lost; one
    of equal numbers, such as a single scale factor, stays. Buffers keep their values, so what is random must be
    parameters: a bottleneck whose concepts are fixed text embeddings has none, so randomise the backbone there.

    The weights are drawn on the CPU from a generator of their own: the same for a seed on every device, and no global
    random state moves. They are written into the tensors that are there, which optimizers may hold, and afterwards,
    also after an exception, parameters and buffers are what they were, to the bit.

    Args:
        module: For concept maps, what makes concepts of features; or any other part of a model. It is copied once with
            all that it holds: do not give a LightningModule that holds a running Trainer.
        seed: Of the weights.

    Raises:
        ValueError: Nothing in the module can be randomised.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> before = layer.weight.clone()
        >>> with randomised(layer, seed=0):
        ...     bool((layer.weight == before).any())
        False
        >>> layer.weight.equal(before)
        True
    """
    random = _random_copy(module, seed)
    held = [*module.parameters(), *module.buffers()]
    kept = [x.detach().clone() for x in held]
    try:
        with torch.no_grad():
            for own, drawn in zip(module.parameters(), random.parameters(), strict=True):
                own.copy_(drawn)
        yield
    finally:
        with torch.no_grad():
            for x, value in zip(held, kept, strict=True):
                x.copy_(value)


def map_similarity(a: Tensor, b: Tensor, kind: Similarity = "cosine") -> Tensor:
    """How alike two maps of a pair are, ``[P]`` in [-1, 1].

    Maps of one sign are alike whatever they show; compare with the similarity of a map and its shifted self
    (`cbm_lightning.saliency.faithfulness.shifted`). If edges show up with random sign, averages hide it: compare the
    absolute values of signed maps then.

    Args:
        a: ``[P, H, W]``.
        b: ``[P, H, W]``.
        kind: ``"cosine"`` of the values, or ``"spearman"``, the correlation of their ranks (equal values share the mean
            of their ranks), which no monotone change of the values alters.

    Returns:
        The similarities; NaN where one of the two maps has one value only, or has a NaN.

    Raises:
        ValueError: The shapes differ or are not ``[P, H, W]``, or the kind does not exist.

    Example:
        >>> a = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
        >>> map_similarity(a, -a), map_similarity(a, a.exp(), "spearman") > map_similarity(a, a.exp())
        (tensor([-1.]), tensor([True]))
    """
    if a.shape != b.shape or a.ndim != 3:
        raise ValueError(f"a, b: expected maps [P, H, W] of one shape, got {list(a.shape)} and {list(b.shape)}")
    check_kind(kind)
    chunk = max(1, _ENTRIES // max(1, a[0].numel() if len(a) else 1))
    found = [_similarity(x, y, kind) for x, y in zip(a.flatten(1).split(chunk), b.flatten(1).split(chunk), strict=True)]
    return torch.cat(found)


def check_kind(kind: Similarity) -> Similarity:
    """The kind, or a ``ValueError`` if there is no such."""
    if kind not in ("cosine", "spearman"):
        raise ValueError(f"kind: expected 'cosine' or 'spearman', got {kind!r}")
    return kind


def _similarity(a: Tensor, b: Tensor, kind: Similarity) -> Tensor:
    """Of ``[P, n]`` values."""
    defined = (a.amax(1) > a.amin(1)) & (b.amax(1) > b.amin(1))
    directions = [_direction(_mean_ranks(x) if kind == "spearman" else x) for x in (a, b)]
    cosine = (directions[0] * directions[1]).sum(1).clamp(-1.0, 1.0)
    return torch.where(defined, cosine, torch.nan)


def _direction(x: Tensor) -> Tensor:
    """Rows of length one; divided by the largest first, since the squares of small gradients vanish."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return normalize(x / x.abs().amax(1, keepdim=True), dim=1)


def _mean_ranks(x: Tensor) -> Tensor:
    """``[P, n]`` ranks around zero, the mean rank for equal values."""
    values = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    ordered = values.sort(1).values.contiguous()
    lower = torch.searchsorted(ordered, values)
    upper = torch.searchsorted(ordered, values, right=True)
    # twice the distance of a rank from the mean of all ranks: a whole number
    return (lower + upper - x.shape[1]).to(values.dtype)


def _random_copy(module: nn.Module, seed: int) -> nn.Module:
    """The module on the CPU with random weights."""
    random: nn.Module = copy.deepcopy(module).cpu()
    given = [p.detach().clone() for p in random.parameters()]
    changed = False
    # reset_parameters takes no generator: it draws from the global one, which is lent for that long
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(step_generator(seed).get_state())
        for part in random.modules():
            if callable(reset := getattr(part, "reset_parameters", None)):
                reset()
        for own, before in zip(random.parameters(), given, strict=True):
            # also where reset_parameters does not reach: weights of its own under a parametrisation, say
            if own.equal(before) and own.is_floating_point() and own.numel() > 1:
                spread, centre = torch.std_mean(before.float(), correction=0)
                own.copy_(torch.randn(own.shape) * spread + centre)
            changed |= not own.equal(before)
    if not changed:
        raise ValueError(f"module: {type(module).__name__} has no weights that could be randomised")
    return random
