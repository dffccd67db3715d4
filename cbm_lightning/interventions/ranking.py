"""From scores to an order, one sample at a time or over the whole split."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cbm_lightning.interventions.policies.base import Gather
from cbm_lightning.interventions.state import State

NEVER = torch.iinfo(torch.long).max
"""The budget at which a unit is asked about that cannot be."""


def ranks(scores: Tensor) -> Tensor:
    """Place of each entry along the last axis, 0 for the highest; the lowest index first among equals."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def steps_by_rank(
    scores: Sequence[Tensor], states: Sequence[State], scope: str, gather: Gather, nothing: Tensor
) -> list[Tensor]:
    """At which budget each unit is asked about, if the order is fixed before the first correction.

    Args:
        scores: ``[B, U]`` a block, minus infinity for what cannot be asked.
        states: The blocks.
        scope: ``"single"``, or ``"batch"`` for one ranking of all (sample, unit) pairs, ``N`` pairs a step.
        gather: Joins the rows of all processes.
        nothing: ``[0, U]`` of the scores' type, for a process without samples.

    Returns:
        ``[B, U]`` int64 a block, `NEVER` for what cannot be asked.
    """
    if scope == "single":
        places = [ranks(block) for block in scores]
    else:
        places, samples = split_ranks(scores, states, gather, nothing)
        places = [place // samples for place in places]
    return [(place + 1).masked_fill(block == -torch.inf, NEVER) for place, block in zip(places, scores, strict=True)]


def next_picks(
    scores: Sequence[Tensor], states: Sequence[State], scope: str, gather: Gather, nothing: Tensor
) -> list[Tensor]:
    """``[B, U]`` bool a block: what to ask about in the next step. Arguments as in `steps_by_rank`."""
    if scope == "single":
        picks = []
        for block in scores:
            best = block.argmax(-1, keepdim=True)
            picks.append(torch.zeros_like(block, dtype=torch.bool).scatter_(-1, best, True) & (block > -torch.inf))
        return picks
    places, samples = split_ranks(scores, states, gather, nothing)
    return [(place < samples) & (block > -torch.inf) for place, block in zip(places, scores, strict=True)]


def split_ranks(
    scores: Sequence[Tensor], states: Sequence[State], gather: Gather, nothing: Tensor
) -> tuple[list[Tensor], int]:
    """Place of each (sample, unit) pair among all pairs of the split, and the number of samples ``N``.

    Equals are taken in the order of the samples' indices, then of the units; samples that a distributed sampler
    repeated are left out of the ranking (their places mean nothing). ``nothing [0, U]`` lets a process without samples
    take part.
    """
    own = torch.cat([nothing, *scores])
    counted = torch.cat([own.new_zeros(0, dtype=torch.bool), *(state.counted for state in states)])
    index = torch.cat([torch.zeros(0, dtype=torch.long), *(state.randomness.index for state in states)]).to(own.device)
    everyone, names = gather(own[counted]), gather(index[counted])
    by_index = names.argsort(stable=True)
    flat = ranks(everyone[by_index].flatten()).view_as(everyone)
    # the samples of this process among all
    rows = torch.searchsorted(names[by_index], index).clamp(max=len(names) - 1)
    return list(flat[rows].split([len(block) for block in scores])), len(names)
