"""Small networks that say what can be read off something; many of them are trained at once, as grouped linear maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cbm_lightning.labels import Task, label_log_probs
from cbm_lightning.metrics.leakage.evidence import Splits

Loss = Callable[[Tensor], Tensor]
STEPS, RATE, PATIENCE, HIDDEN = 200, 0.03, 15, 32


class Probes(nn.Module):
    """``G`` networks side by side: one hidden layer of ReLUs, or none.

    In single precision, for what rounding does to them is far less than what another seed does.

    Args:
        groups: ``G``.
        inputs: Width of what each reads.
        outputs: Numbers that each predicts.
        hidden: Width of the hidden layer; 0 makes linear probes.
        generator: Draws the weights.
        start_at_zero: Predict zeros at first.

    Example:
        >>> probes = Probes(3, 2, 5, 8, torch.Generator().manual_seed(0))
        >>> probes(torch.zeros(1, 10, 2)).shape
        torch.Size([3, 10, 5])
    """

    def __init__(
        self,
        groups: int,
        inputs: int,
        outputs: int,
        hidden: int,
        generator: torch.Generator,
        start_at_zero: bool = False,
    ) -> None:
        super().__init__()
        self.groups = groups
        widths = [inputs, hidden, outputs] if hidden else [inputs, outputs]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for given, made in pairwise(widths):
            bound = 1 / math.sqrt(max(given, 1))
            draw = torch.rand(groups, given, made, generator=generator)
            self.weights.append(nn.Parameter((2 * draw - 1) * bound))
            self.biases.append(nn.Parameter(torch.zeros(groups, 1, made)))
        if start_at_zero:
            nn.init.zeros_(self.weights[-1])

    def forward(self, x: Tensor) -> Tensor:
        """``[G, N, V]`` (``[1, N, V]`` if all read the same) to ``[G, N, O]``."""
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                x = x.relu()
            x = torch.baddbmm(bias, x.expand(self.groups, -1, -1), weight)
        return x


def fit_probes(probes: Probes, x: Tensor, loss: Loss, fit: Tensor, hold: Tensor, steps: int = STEPS) -> Tensor:
    """Train by Adam on all rows at once, each group until rows that it is not fitted on get no better.

    The groups end with the weights of their best step. What it draws and where it runs do not depend on the caller's
    gradient mode, not even on inference mode.

    Args:
        probes: Trained in place.
        x: ``[G, N, V]`` or ``[1, N, V]``.
        loss: Of outputs ``[G, N, O]``, a loss a row ``[G, N]``.
        fit: ``[G, N]`` bool, the rows to fit on.
        hold: ``[G, N]`` bool, the rows that say when to stop.
        steps: At most.

    Returns:
        ``[G, N, O]`` the outputs for all rows.
    """
    weight, check = (rows.float() / rows.sum(1, keepdim=True).clamp(min=1) for rows in (fit, hold))
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.Adam(probes.parameters(), lr=RATE)
        best = torch.full((probes.groups,), math.inf)
        kept = [parameter.detach().clone() for parameter in probes.parameters()]
        since = torch.zeros(probes.groups, dtype=torch.int64)
        for _ in range(steps + 1):
            rows = loss(probes(x))
            found = (rows.detach() * check).sum(1)
            better = found < best - 1e-6
            best, since = torch.where(better, found, best), torch.where(better, 0, since + 1)
            for old, new in zip(kept, probes.parameters(), strict=True):
                old[better] = new.detach()[better]
            if bool((since >= PATIENCE).all()):
                break
            optimizer.zero_grad()
            (rows * weight).sum().backward()
            optimizer.step()
        with torch.no_grad():
            for old, new in zip(kept, probes.parameters(), strict=True):
                new.copy_(old)
            outputs: Tensor = probes(x)
    return outputs


def label_nll(logits: Tensor, outcomes: Tensor, task: Task) -> Tensor:
    """``[..., N]`` negative log-likelihood in nats of ``[..., N, L]`` logits; several labels add up.

    Args:
        logits: As a head makes them; one for a binary label.
        outcomes: ``[N, M]`` from `labels.label_outcomes`.
        task: What the label is.
    """
    log_probs = label_log_probs(logits, task)
    index = outcomes.unsqueeze(-1).expand(*log_probs.shape[:-1], 1)
    return -log_probs.gather(-1, index).squeeze(-1).sum(-1)


def label_correct(logits: Tensor, outcomes: Tensor, task: Task) -> Tensor:
    """``[..., N]`` whether the likeliest label is the true one; the share of right ones for several labels."""
    right = label_log_probs(logits, task).argmax(-1) == outcomes
    return right.float().mean(-1)


def concept_loss(logits: Tensor, concepts: Tensor) -> Tensor:
    """``[..., N]`` mean binary cross-entropy over the concepts that are annotated, of ``[..., N, K]`` logits."""
    known = ~concepts.isnan()
    target = torch.where(known, concepts, 0.0).to(logits.dtype).expand_as(logits)
    loss = binary_cross_entropy_with_logits(logits, target, reduction="none") * known
    return loss.sum(-1) / known.sum(-1).clamp(min=1)


def temper(logits: Tensor, loss: Loss, hold: Tensor) -> Tensor:
    """Logits ``[G, N, L]`` at the temperature that suits the held-out rows ``[G, N]`` best, one a group.

    Guo et al. 2017, section 4.2. The loss is convex in the inverse temperature, which is searched in [0.05, 20] by
    thirds of its logarithm.
    """
    check = hold.float() / hold.sum(1, keepdim=True).clamp(min=1)
    low, high = (torch.full((len(logits),), end, dtype=logits.dtype) for end in (math.log(0.05), math.log(20.0)))

    def at(scale: Tensor) -> Tensor:
        return (loss(logits * scale.exp()[:, None, None]) * check).sum(1)

    for _ in range(40):
        third = (high - low) / 3
        left, right = low + third, high - third
        down = at(left) < at(right)
        low, high = torch.where(down, low, left), torch.where(down, right, high)
    return logits * ((low + high) / 2).exp()[:, None, None]


def standardised(x: Tensor, fit: Tensor) -> Tensor:
    """Columns ``[N, V]`` as each group ``fit [G, N]`` of rows sees them: mean 0 and deviation 1 there, ``[G, N, V]``.

    Computed in double precision, returned in single. A column that is constant there becomes zero.
    """
    weight = fit.double() / fit.sum(1, keepdim=True)
    mean = (weight @ x).unsqueeze(1)
    # not the mean square less the squared mean, in which a constant far from zero would seem to vary
    scale = (weight.unsqueeze(-1) * (x - mean).square()).sum(1, keepdim=True).sqrt()
    flat = scale <= 1e-9 * (1 + mean.abs())
    return torch.where(flat, 0.0, (x - mean) / torch.where(flat, 1.0, scale)).float()


def out_of_fold(rows: Tensor, splits: Splits) -> Tensor:
    """``[R, N]`` what each row got where it was judged, of ``[R * F, N]``; NaN where it never was."""
    per_fold = rows.double().unflatten(0, splits.judge.shape[:2])
    judged = splits.judge.any(1)
    return torch.where(judged, torch.where(splits.judge, per_fold, 0.0).sum(1), torch.nan)


def auroc(scores: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of ``[..., n]`` scores by their ranks, equal ones sharing a rank.

    Args:
        scores: ``[..., n]``.
        targets: ``[..., n]`` 0 or 1 (positive from one half), NaN where unknown; broadcast against the scores.

    Returns:
        ``[...]``, NaN where only one class is known.

    Example:
        >>> float(auroc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0.0, 0.0, 1.0, 1.0])))
        0.875
    """
    scores, targets = torch.broadcast_tensors(scores.double(), targets.double())
    known = ~targets.isnan()
    ranked = torch.where(known, scores, math.inf).contiguous()
    line = ranked.sort(-1).values
    # mean rank of equal scores, from 1 on
    first, last = (torch.searchsorted(line, ranked, right=right) for right in (False, True))
    rank = (first + last + 1).double() / 2
    positive = known & (targets >= 0.5)
    positives, negatives = positive.sum(-1), (known & ~positive).sum(-1)
    wins = (rank * positive).sum(-1) - positives * (positives + 1) / 2
    area = wins / (positives * negatives)
    return torch.where((positives > 0) & (negatives > 0), area, torch.nan)
