"""Orders learned on the validation split, the same for every sample (Espinosa Zarlenga et al. 2023; Google's CooP)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from cbm_lightning.interventions.policies.base import Gather
from cbm_lightning.interventions.policies.fixed_order import GlobalOrder
from cbm_lightning.interventions.state import State
from cbm_lightning.labels import label_log_probs


def validation_error(auroc: Tensor) -> Tensor:
    """``1 / |AUC - 1/2|``: highest for concepts that the model cannot tell, infinite at one half."""
    return (auroc - 0.5).abs().reciprocal()


class GlobalValidationError(GlobalOrder):
    """Concepts first whose validation AUROC is nearest one half (cem's GlobalValidationPolicy).

    cem takes the AUROC of thresholded predictions; here it is that of the probabilities unless ``thresholded``. A
    concept that is predicted upside down (AUROC below one half) comes as late as one that is predicted as well.

    Args:
        thresholded: Round the predictions first, as the official code does.
        label: Name in logs and figures.
    """

    name = "global_error"
    fits_on = "val"

    def __init__(self, thresholded: bool = False, *, label: str | None = None) -> None:
        super().__init__(label=label)
        self.thresholded = thresholded

    def fit(self, states: Sequence[State], gather: Gather) -> None:
        """Measure the AUROC of each concept."""
        probs = gather(torch.cat([state.probs[state.counted] for state in states]))
        truth = gather(torch.cat([state.truth[state.counted] for state in states]))
        predicted = (probs >= 0.5).to(probs) if self.thresholded else probs
        real = states[0].subject.concepts.is_real().tolist()
        scores = torch.zeros_like(probs[:1])
        for k, column in enumerate(predicted.unbind(1)):
            known = ~truth[:, k].isnan()
            target = (truth[known, k] >= 0.5).long()
            # real-valued concepts have no AUROC, nor have those with one outcome only
            if not real[k] and len(target.unique()) == 2:
                scores[0, k] = validation_error(binary_auroc(column[known], target))
        everything = torch.ones_like(scores, dtype=torch.bool)
        self.unit_scores = states[0].units.scores(scores, everything)[0]


class GlobalValidationImprovement(GlobalOrder):
    """Units first whose correction alone raises the validation label accuracy most; the lower loss on a tie.

    Args:
        label: Name in logs and figures.
    """

    name = "global_improvement"
    fits_on = "val"

    def fit(self, states: Sequence[State], gather: Gather) -> None:
        """Correct each unit alone."""
        self.unit_scores = rank_scores([quality(states, [u], gather) for u in range(len(states[0].units))])


class GlobalGreedy(GlobalOrder):
    """Adds the unit that helps the validation accuracy most beside those before it (CooP, Chauhan et al. 2023).

    The lower loss decides on a tie. Costs ``U (U + 1) / 2`` passes of the head over the validation split.

    Args:
        label: Name in logs and figures.
    """

    name = "global_greedy"
    fits_on = "val"

    def fit(self, states: Sequence[State], gather: Gather) -> None:
        """Build the order unit by unit."""
        units = len(states[0].units)
        order: list[int] = []
        while len(order) < units:
            rest = [u for u in range(units) if u not in order]
            # of equals the first is the largest
            order.append(max(rest, key=lambda u: quality(states, [*order, u], gather)))
        scores = torch.empty(units)
        scores[order] = torch.arange(units, 0, -1).float()
        self.unit_scores = scores


def quality(states: Sequence[State], asked: Sequence[int], gather: Gather) -> tuple[float, float]:
    """Label accuracy and minus the label loss once some units of every sample are corrected."""
    right, loss = [], []
    for state in states:
        units = torch.zeros(len(state.probs), len(state.units), dtype=torch.bool, device=state.probs.device)
        units[:, list(asked)] = True
        logits = state.corrected(state.units.expand(units) & state.open).prediction.logits[state.counted]
        log_probs, label = label_log_probs(logits, state.subject.task), state.label[state.counted]
        right.append((log_probs.argmax(-1) == label).float().mean(-1))
        loss.append(-log_probs.gather(-1, label.unsqueeze(-1)).mean((-2, -1)))
    return gather(torch.cat(right)).mean().item(), -gather(torch.cat(loss)).mean().item()


def rank_scores(qualities: Sequence[tuple[float, float]]) -> Tensor:
    """``[U]`` scores in the order of pairs, the best highest; of equals the first."""
    order = sorted(range(len(qualities)), key=lambda u: (qualities[u], -u))
    scores = torch.empty(len(order))
    scores[order] = torch.arange(len(order)).float()
    return scores
