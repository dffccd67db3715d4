"""What `InterventionAwareBottleneck` rehearses: a policy, corrections step by step, and an expert to imitate."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from cbm_lightning.bottlenecks.embedding import EmbeddingBottleneck
from cbm_lightning.heads import LabelHead
from cbm_lightning.labels import label_log_probs
from cbm_lightning.modes import evaluating
from cbm_lightning.types import ConceptOutput

# numbers that the expert holds at a time: 64 MiB in single precision
MOST_NUMBERS = 2**24


class QueryPolicy(nn.Module):
    """Scores every unit by how much it deserves to be asked about next (IntCEM).

    A LeakyReLU network on what the head reads and on what was corrected so far, with BatchNorm before each linear map.

    Args:
        width: ``V``, how much the head reads.
        concepts: ``K``.
        units: ``U``, how many units to choose among.
        hidden: Width of each hidden layer.
        batch_norm: Normalise the input of each linear map.

    Example:
        >>> policy = QueryPolicy(width=8, concepts=2, units=2, hidden=[16])
        >>> policy(torch.randn(5, 8), torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(self, width: int, concepts: int, units: int, hidden: Sequence[int], batch_norm: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([width + concepts, *hidden, units]):
            norm = [nn.BatchNorm1d(before)] if batch_norm else []
            layers += [*norm, nn.Linear(before, after), nn.LeakyReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """``[B, U]`` raw scores of ``values [B, V]`` under the corrections ``mask [B, K]``, in single precision."""
        seen = torch.cat([values, mask.to(values)], -1)
        # a single sample has no variance of its own
        with evaluating(self.layers) if len(seen) == 1 else nullcontext():
            return self.layers(seen).float()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Rehearsal:
    """A training batch whose concepts are corrected in imagination; the output itself is never changed.

    Attributes:
        output: The un-intervened output of an `EmbeddingBottleneck`.
        truth: ``[B, K]`` annotations, any finite number where there is none.
        known: ``[B, K]`` bool, where there is one.
        outcomes: ``[B, M]`` true outcomes of the label, see `labels.label_outcomes`.
        head: The label head.
        membership: ``[U, K]`` 0 or 1, which concepts a unit asks about.
    """

    output: ConceptOutput
    truth: Tensor
    known: Tensor
    outcomes: Tensor
    head: LabelHead
    membership: Tensor

    def values(self, mask: Tensor) -> Tensor:
        """``[B, V]`` what the head reads with the concepts ``mask [B, K]`` (0 or 1) corrected; differentiable in it."""
        probs = torch.lerp(self.output.probs.float(), self.truth, mask)
        return EmbeddingBottleneck.mix(self.output.extras["pairs"], probs)

    def open_units(self, mask: Tensor) -> Tensor:
        """``[B, U]`` bool, units that were not asked about and of which an annotation is known."""
        return self._touched(self.known.float()) & ~self._touched(mask)

    def corrected(self, mask: Tensor, units: Tensor) -> Tensor:
        """``[B, K]`` the mask with the known concepts of ``units [B, U]`` corrected too."""
        # at most 1, and not by a clamp, which passes no gradient at its bounds
        return mask + self._concepts(units) * self.known * (1.0 - mask.detach())

    @torch.no_grad()
    def best_units(self, mask: Tensor, open_units: Tensor) -> Tensor:
        """``[B]`` the open unit whose correction makes the true label likeliest: the expert that the policy imitates.

        One rank-one update of the class logits a concept where they are linear in the values; otherwise the head runs
        on all units at once, in pieces of bounded memory.
        """
        now, told = self.values(mask), self.values(self.known.float())
        weight = self.head.concept_weight()
        with evaluating(self.head):
            likelihood = self._predicted_anew(now, told) if weight is None else self._by_rank_one(now, told, weight)
        return likelihood.masked_fill(~open_units, -torch.inf).argmax(-1)

    def _by_rank_one(self, now: Tensor, told: Tensor, weight: Tensor) -> Tensor:
        """``[B, U]`` log-likelihood of the label after correcting each unit, for ``weight [L, K, m]``."""
        logits = self.head(self.output.replace(values=now)).float()
        moves = (told.float() - now.float()).unflatten(1, weight.shape[1:])  # [B, K, m]
        owner, units = self.membership.argmax(0), len(self.membership)
        rows = max(1, MOST_NUMBERS // weight[..., 0].numel())
        found = []
        with torch.autocast(now.device.type, enabled=False):
            for move, start, outcomes in zip(
                moves.split(rows), logits.split(rows), self.outcomes.split(rows), strict=True
            ):
                effects = torch.einsum("bkm,lkm->bkl", move, weight.float())
                shifts = effects.new_zeros(len(move), units, len(weight)).index_add_(1, owner, effects)
                found.append(self._likelihood(start.unsqueeze(1) + shifts, outcomes.unsqueeze(1)))
        return torch.cat(found)

    def _predicted_anew(self, now: Tensor, told: Tensor) -> Tensor:
        """``[B, U]`` log-likelihood of the label after correcting each unit, by the head itself."""
        asked = self.membership.bool().repeat_interleave(now.shape[1] // self.membership.shape[1], 1)  # [U, V]
        found = []
        for some in asked.split(max(1, MOST_NUMBERS // now.numel())):
            logits = self.head.classify(torch.where(some.unsqueeze(1), told, now), self.output)  # [u, B, L]
            found.append(self._likelihood(logits, self.outcomes))
        return torch.cat(found).T

    def _likelihood(self, logits: Tensor, outcomes: Tensor) -> Tensor:
        """``[...]`` log-likelihood of the true ``outcomes [..., M]`` under ``logits [..., L]``."""
        log_probs = label_log_probs(logits, self.head.task)
        true = outcomes.expand(log_probs.shape[:-1]).unsqueeze(-1)
        return log_probs.gather(-1, true).squeeze(-1).sum(-1)

    def _concepts(self, units: Tensor) -> Tensor:
        """``[B, U]`` to the concepts of the units, ``[B, K]``."""
        return units[:, self.membership.argmax(0)]

    def _touched(self, concepts: Tensor) -> Tensor:
        """``[B, K]`` to the units with at least one of these concepts, ``[B, U]`` bool."""
        return (concepts.detach() @ self.membership.T) > 0

    def random_start(self, probability: float, generator: torch.Generator) -> Tensor:
        """``[B, K]`` 0 or 1, where a trajectory begins: each unit corrected with a probability."""
        drawn = torch.rand(len(self.truth), len(self.membership), generator=generator) < probability
        nothing = torch.zeros_like(self.truth)
        return self.corrected(nothing, drawn.to(nothing))

    def at_random(self, mask: Tensor, most: int, generator: torch.Generator) -> Tensor:
        """``[B, K]`` the mask after up to ``most - 1`` more units of each sample, drawn at random; one stays open."""
        shape = (len(mask), len(self.membership))
        order, share = torch.rand(shape, generator=generator), torch.rand(len(mask), 1, generator=generator)
        open_units = self.open_units(mask)
        limit = (open_units.sum(1, keepdim=True) - 1).clamp(0, most)
        count = (share.to(mask.device) * limit).floor()
        place = order.to(mask.device).masked_fill(~open_units, 2.0).argsort(1).argsort(1)
        return self.corrected(mask, ((place < count) & open_units).to(mask))

    def play(
        self, policy: QueryPolicy, mask: Tensor, steps: int, discount: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Ask ``steps`` times what the policy wants to know.

        Args:
            policy: Scores the units.
            mask: ``[B, K]`` 0 or 1, the corrections so far.
            steps: How many units to ask each sample about, as far as there are open ones.
            discount: Weight of each step's imitation loss, relative to that of the step before.
            generator: Of the draws, on the CPU.

        Returns:
            The imitation loss, and the mask afterwards, through which gradients reach the policy.
        """
        losses, weights = [], [discount**step for step in range(steps)]
        for weight in weights:
            open_units = self.open_units(mask)
            scores = policy(self.values(mask), mask)
            # finite, for a sample of which everything is known has no open unit at all
            scores = scores.masked_fill(~open_units, torch.finfo(scores.dtype).min)
            wrong = cross_entropy(scores, self.best_units(mask, open_units), reduction="none")
            counts = open_units.any(1)
            losses.append(weight * torch.where(counts, wrong, 0.0).sum() / counts.sum().clamp(min=1))
            mask = self.corrected(mask, straight_through_draw(scores, generator) * open_units)
        return torch.stack(losses).sum() / sum(weights), mask


def straight_through_draw(scores: Tensor, generator: torch.Generator) -> Tensor:
    """One unit a row, drawn from the softmax of ``scores [B, U]``, with the gradient of a Gumbel-softmax.

    Returns:
        ``[B, U]`` exactly 0 or 1 (Jang et al. 2017, straight-through, temperature 1).
    """
    waiting = torch.empty(scores.shape).exponential_(generator=generator).clamp_(min=torch.finfo(torch.float).tiny)
    soft = (scores - waiting.log().to(scores)).softmax(-1)
    hard = one_hot(soft.argmax(-1), scores.shape[-1]).to(soft)
    # the difference is zero exactly; added one by one, its terms would round
    return hard + (soft - soft.detach())
