"""Do discovered concepts stand for annotated ones? Best one-to-one assignment of activations to annotations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.concepts import ConceptSet

if TYPE_CHECKING:
    import pandas as pd

PurityScore = Literal["auroc", "correlation"]


class PuritySummary(NamedTuple):
    """Which discovered concept stands for which annotated one.

    Attributes:
        value: Mean strength of the matched pairs, in [0, 1]; NaN where nothing can be matched.
        chance: The same where annotations are permuted over the samples, mean over permutations.
        slots: ``[P]`` int64, the discovered concept of each matched pair.
        concepts: ``[P]`` int64, the annotated concept of the pair.
        scores: ``[K, M]`` in [-1, 1] of every pair, negative where one is there when the other is not; NaN for an
            annotated concept that never varies.
    """

    value: Tensor
    chance: Tensor
    slots: Tensor
    concepts: Tensor
    scores: Tensor


class ConceptPurity(Metric):
    """Mean score of discovered against annotated concepts under the best one-to-one assignment.

    The score of a pair is ``2 AUROC - 1`` (Somers' D: how well the activation ranks images that show the concept above
    those that do not) or Pearson's correlation. Its absolute value counts, for a slot that reacts to the absence of a
    concept has found it too. The assignment is the best there is (Kuhn 1955), so some of the value is luck that grows
    with the number of candidates: `summary` has the ``chance`` level beside it, from annotations that were permuted
    together over the samples. It keeps all activations and annotations.

    Args:
        concepts: The annotated concepts, or their number. Real-valued ones count with ``"correlation"`` alone.
        score: ``"auroc"``, which knows no scale, or ``"correlation"``.
        permutations: How many permutations the chance level is the mean of.
        seed: Of the permutations.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: The score is unknown, or ``permutations`` is below 1.

    Example:
        >>> metric = ConceptPurity(["red", "round"])
        >>> concepts = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
        >>> metric(torch.stack([concepts[:, 1], 5 - concepts[:, 0], torch.ones(4)], 1), concepts)
        tensor(1.)
        >>> metric.table()[["slot", "concept", "score"]].to_dict("records")
        [{'slot': 0, 'concept': 'round', 'score': 1.0}, {'slot': 1, 'concept': 'red', 'score': -1.0}]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    activations: list[Tensor]
    annotations: list[Tensor]

    def __init__(
        self,
        concepts: ConceptSet | list[str] | int,
        score: PurityScore = "auroc",
        permutations: int = 10,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if score not in get_args(PurityScore):
            raise ValueError(f"score: expected one of {get_args(PurityScore)}, got {score!r}")
        if permutations < 1:
            raise ValueError(f"permutations: expected at least 1, got {permutations}")
        self.concept_set = ConceptSet.make(concepts)
        self.score: PurityScore = score
        self.permutations, self.seed = permutations, seed
        self.add_state("activations", [], dist_reduce_fx="cat")
        self.add_state("annotations", [], dist_reduce_fx="cat")

    def update(self, activations: Tensor, concepts: Tensor) -> None:
        """Store samples.

        Args:
            activations: ``[B, K]`` of the discovered concepts, on any scale.
            concepts: ``[B, M]`` annotations, NaN where unknown; for ``"auroc"`` a concept is there from one half.

        Raises:
            ValueError: The shapes do not fit, or an activation is not finite.
        """
        if activations.ndim != 2 or concepts.shape != (len(activations), len(self.concept_set)):
            raise ValueError(
                f"expected activations [B, K] and concepts [B, {len(self.concept_set)}], got "
                f"{list(activations.shape)} and {list(concepts.shape)}"
            )
        if not bool(activations.isfinite().all()):
            raise ValueError("activations: expected finite numbers, got NaN or infinity; did the training diverge?")
        self.activations.append(activations.detach().float())
        self.annotations.append(concepts.detach().float())

    def compute(self) -> Tensor:
        """Mean strength of the matched pairs, NaN where nothing can be matched."""
        scores = self._scores(*self._stored())
        return _mean_strength(scores, *assign(scores))

    def summary(self) -> PuritySummary:
        """Value, chance level and the assignment over all processes; collective where there are several."""
        here = self.sync_on_compute and not self._is_synced
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=here, should_unsync=here):
            activations, annotations = self._stored()
        # in an order of their own, so that luck does not depend on that of samples and processes
        table = torch.cat([annotations.nan_to_num(-1.0), activations], 1)
        rows = torch.from_numpy(np.lexsort(table.T.cpu().numpy())).to(annotations.device)
        activations, annotations = activations[rows], annotations[rows]
        generator = torch.Generator().manual_seed(self.seed)
        by_luck = []
        for _ in range(self.permutations):
            order = torch.randperm(len(annotations), generator=generator).to(annotations.device)
            drawn = self._scores(activations, annotations[order])
            by_luck.append(_mean_strength(drawn, *assign(drawn)))
        scores = self._scores(activations, annotations)
        slots, concepts = assign(scores)
        return PuritySummary(
            _mean_strength(scores, slots, concepts), torch.stack(by_luck).mean(), slots, concepts, scores
        )

    def table(self) -> pd.DataFrame:
        """A row a matched pair, best first: ``slot``, ``concept``, the signed ``score``; collective like `summary`."""
        import pandas as pd

        found = self.summary()
        rows = [
            {"slot": slot, "concept": self.concept_set.names[concept], "score": float(found.scores[slot, concept])}
            for slot, concept in zip(found.slots.tolist(), found.concepts.tolist(), strict=True)
        ]
        table = pd.DataFrame(rows, columns=["slot", "concept", "score"])
        return table.sort_values("score", key=abs, ascending=False, kind="stable", ignore_index=True)

    def _stored(self) -> tuple[Tensor, Tensor]:
        # after a sync the states are tensors already
        stored = (self.activations, self.annotations)
        activations, annotations = (x if isinstance(x, Tensor) else torch.cat(x) for x in stored)
        return activations, annotations

    def _scores(self, activations: Tensor, annotations: Tensor) -> Tensor:
        real = self.concept_set.is_real().tolist()
        columns = []
        for concept, is_real in zip(annotations.unbind(1), real, strict=True):
            known = ~concept.isnan()
            if self.score == "correlation":
                columns.append(correlation(activations[known], concept[known]))
            elif is_real:
                columns.append(activations.new_full((activations.shape[1],), torch.nan))
            else:
                columns.append(somers_d(activations[known], concept[known] >= 0.5))
        return torch.stack(columns, dim=1)


def somers_d(activations: Tensor, present: Tensor) -> Tensor:
    """``[K]``, ``2 AUROC - 1`` of activations ``[n, K]`` for ``present [n]`` bool; ties count half, NaN for one class.

    Example:
        >>> somers_d(torch.tensor([[1.0, 3.0], [2.0, 3.0], [3.0, 3.0]]), torch.tensor([False, True, True]))
        tensor([1., 0.])
    """
    positive, negative = activations[present].T.contiguous(), activations[~present].T.contiguous().sort(dim=1).values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return below.float().mean(1) / negative.shape[1] - 1.0


def correlation(activations: Tensor, concept: Tensor) -> Tensor:
    """``[K]``, Pearson's correlation of activations ``[n, K]`` with ``concept [n]``; 0 for a constant activation.

    It is NaN for a constant concept.

    Example:
        >>> correlation(torch.tensor([[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]]), torch.tensor([5.0, 4.0, 3.0]))
        tensor([-1.,  0.])
    """
    activations, concept = activations - activations.mean(0), concept - concept.mean()
    lengths, length = activations.norm(dim=0), concept.norm()
    found: Tensor = torch.where(lengths > 0, concept @ activations / lengths, 0.0) / length
    return found


def assign(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The one-to-one assignment whose sum of absolute scores is largest.

    Args:
        scores: ``[K, M]``; columns with NaN are left out.

    Returns:
        ``[P]`` rows and ``[P]`` columns of the pairs, as many as there are of the fewer.

    Example:
        >>> [part.tolist() for part in assign(torch.tensor([[0.9, 0.8], [0.7, -0.1]]))]
        [[0, 1], [1, 0]]
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    defined = (~scores.isnan().any(0)).nonzero().flatten()
    rows, columns = linear_sum_assignment(scores[:, defined].abs().cpu().double().numpy(), maximize=True)
    return torch.from_numpy(rows).to(scores.device), defined[torch.from_numpy(columns).to(scores.device)]


def _mean_strength(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return scores[rows, columns].abs().mean()
