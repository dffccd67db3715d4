"""What leakage is measured on: what the head reads of each concept, the true concepts, and the label."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task, label_outcomes
from cbm_lightning.types import ConceptOutput, ValueLayout, masked_mean

Reads = Literal["values", "logits", "probs"]
HELD_OUT = 0.2
"""Share of the rows a probe is fitted on that say when to stop."""


@dataclass(frozen=True)
class Evidence:
    """Predicted and true concepts of the same ``N`` samples.

    Attributes:
        values: ``[N, K, m]`` what represents each predicted concept: its numbers in what the head reads, or its score.
        concepts: ``[N, K]`` the truth, NaN where not annotated.
        label: ``[N]``, or ``[N, L]`` for several labels.
        task: What the label is.
        num_classes: ``L``.
        extra: ``[N, E]`` what the head reads beside the concepts, or None.
        real: ``[K]`` bool, True for real-valued concepts; none are by default.
    """

    values: Tensor
    concepts: Tensor
    label: Tensor
    task: Task
    num_classes: int
    extra: Tensor | None = None
    real: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_concepts(self) -> int:
        """``K``."""
        return self.concepts.shape[1]

    @property
    def outcomes(self) -> Tensor:
        """``[N, M]`` int64, the outcome of each label variable: one, or ``L`` for several labels."""
        return label_outcomes(self.label, self.task)

    @property
    def targets(self) -> Tensor:
        """``[N, K]`` the truth of binary and categorical concepts; NaN for real-valued ones, which have no classes."""
        return self.concepts if self.real is None else self.concepts.masked_fill(self.real, torch.nan)

    @property
    def complete(self) -> Tensor:
        """``[N]`` bool, the samples whose every concept is annotated."""
        return ~self.concepts.isnan().any(1)

    def rows(self, rows: Tensor) -> Evidence:
        """Some of the samples."""
        extra = None if self.extra is None else self.extra[rows]
        return replace(
            self, values=self.values[rows], concepts=self.concepts[rows], label=self.label[rows], extra=extra
        )

    def settled(self) -> Evidence:
        """In double precision on the CPU, outside inference mode, where every estimator works."""
        with torch.inference_mode(False):
            extra = None if self.extra is None else self.extra.detach().cpu().double().clone()
            return replace(
                self,
                values=self.values.detach().cpu().double().clone(),
                concepts=self.concepts.detach().cpu().double().clone(),
                label=self.label.detach().cpu().clone(),
                extra=extra,
            )


@dataclass(frozen=True)
class Measurement:
    """What a measure found.

    Attributes:
        value: The measure.
        error: Its uncertainty: a standard error over samples, a deviation over repeats, or both together.
        per_concept: ``[K]`` the same a concept, NaN where it is not defined; None where it is not a matter of concepts.
        concept_error: ``[K]`` uncertainty of that, or None.
        details: Other numbers that belong to it, by name.
    """

    value: float
    error: float
    per_concept: Tensor | None = None
    concept_error: Tensor | None = None
    details: dict[str, float] = field(default_factory=dict)


class Splits(NamedTuple):
    """Which rows probes are fitted on, stopped on and judged on; ``R`` repeats of ``F`` folds.

    Attributes:
        fit: ``[R, F, N]`` bool.
        hold: ``[R, F, N]`` bool, rows that say when to stop; none of them is in ``fit`` or ``judge``.
        judge: ``[R, F, N]`` bool; in a repeat no row is judged twice.
    """

    fit: Tensor
    hold: Tensor
    judge: Tensor

    def rows(self, rows: Tensor) -> Splits:
        """Some of the rows."""
        return Splits(*(part[..., rows] for part in self))

    def few(self) -> Splits:
        """The folds of one repeat, in which every row is judged once; all repeats where there are no folds."""
        return self if self.fit.shape[1] == 1 else Splits(*(part[:1] for part in self))

    def flat(self) -> Splits:
        """``[R * F, N]``, a group a repeat and fold."""
        return Splits(*(part.flatten(0, 1) for part in self))


def cross_splits(samples: int, folds: int = 3, repeats: int = 2, seed: int = 0) -> Splits:
    """Folds of which each is judged by probes that were fitted on the others.

    Args:
        samples: ``N``.
        folds: ``F``.
        repeats: ``R``, each with folds of its own.
        seed: Of the folds.

    Raises:
        ValueError: There are fewer than ten samples a fold.
    """
    if samples < 10 * folds:
        raise ValueError(f"probes need at least {10 * folds} samples for {folds} folds, got {samples}")
    generator = torch.Generator().manual_seed(seed)
    judge = torch.zeros(repeats, folds, samples, dtype=torch.bool)
    for of_repeat in judge:
        order = torch.randperm(samples, generator=generator)
        for fold in range(folds):
            of_repeat[fold, order[fold::folds]] = True
    return _with_held_out(~judge, judge, generator)


def given_splits(fit: Tensor, repeats: int = 2, seed: int = 0) -> Splits:
    """Fit on the rows where ``fit [N]`` is True and judge on all others; repeats differ in the rows that stop.

    Raises:
        ValueError: There are fewer than ten rows to fit on, or none to judge on.
    """
    if int(fit.sum()) < 10 or bool(fit.all()):
        raise ValueError(
            f"probes need at least 10 samples to be fitted on and one to be judged on, got {int(fit.sum())} and "
            f"{int((~fit).sum())}"
        )
    generator = torch.Generator().manual_seed(seed)
    fit = fit.expand(repeats, 1, -1)
    return _with_held_out(fit, ~fit, generator)


def _with_held_out(fit: Tensor, judge: Tensor, generator: torch.Generator) -> Splits:
    draw = torch.rand(fit.shape, generator=generator).masked_fill(~fit, 2.0)
    number = (fit.sum(-1, keepdim=True) * HELD_OUT).long().clamp(min=1)
    hold = fit & (draw.argsort(-1).argsort(-1) < number)
    return Splits(fit & ~hold, hold, judge)


def subsample(samples: int, most: int, seed: int) -> Tensor:
    """``[min(samples, most)]`` sorted positions, drawn without replacement."""
    if samples <= most:
        return torch.arange(samples)
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def mean_and_error(rows: Tensor) -> tuple[float, float]:
    """Mean of ``[R, N]`` numbers (NaN left out), and how uncertain it is.

    Samples and repeats both count: the error is that of the mean over samples of what the repeats agree on, and the
    spread of the repeats around it.
    """
    per_sample = rows.nanmean(0)
    per_sample = per_sample[~per_sample.isnan()]
    samples = float(per_sample.std()) / max(len(per_sample), 1) ** 0.5
    repeats = float(rows.nanmean(1).std()) / len(rows) ** 0.5 if len(rows) > 1 else 0.0
    return float(per_sample.mean()), (samples**2 + repeats**2) ** 0.5


def representation(output: ConceptOutput, layout: ValueLayout, reads: Reads = "values") -> tuple[Tensor, Tensor | None]:
    """``[B, K, m]`` what represents each concept, and ``[B, E]`` what the head reads beside them, or None.

    Args:
        output: Its axes of samples and time are averaged.
        layout: How its values are laid out.
        reads: The numbers of the concept that the head reads, or its one logit or probability.
    """
    values = output.values.detach()
    if output.sample_dim:
        values = values.mean(0)
    if output.time_dim:
        values = masked_mean(values, output.features.mask)
    own, extra = values.split([layout.concepts * layout.width, layout.extra], -1)
    if reads == "values":
        own = own.unflatten(-1, (layout.concepts, layout.width))
    else:
        own = (output.logits if reads == "logits" else output.probs).detach().unsqueeze(-1)
    return own.float(), extra.float() if layout.extra else None


class LeakageMetric(Metric):
    """Base of metrics that compare predicted with true concepts; keeps every sample until `compute`.

    Args:
        concepts: The concept set, or the number of binary concepts.
        num_classes: Number of classes (labels, for several).
        task: What the label is.
        max_samples: At most so many samples are measured on, drawn by ``seed``: several of these numbers depend on how
            many samples there are.
        seed: Of all draws.
        kwargs: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: ``max_samples`` is below 50.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    values: list[Tensor]
    concepts: list[Tensor]
    labels: list[Tensor]

    def __init__(
        self,
        concepts: ConceptSet | int,
        num_classes: int,
        task: Task = "multiclass",
        max_samples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_samples < 50:
            raise ValueError(f"max_samples: expected at least 50, got {max_samples}")
        concept_set = ConceptSet.make(concepts)
        self.num_concepts, self.real = len(concept_set), concept_set.is_real()
        self.num_classes, self.task, self.max_samples, self.seed = num_classes, task, max_samples, seed
        for name in ("values", "concepts", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, values: Tensor, concepts: Tensor, label: Tensor) -> None:
        """Store predictions and truth.

        Args:
            values: ``[B, K]`` or ``[B, K, m]`` what represents each predicted concept, see `representation`.
            concepts: ``[B, K]`` annotations, NaN where unknown.
            label: ``[B]``, or ``[B, L]`` for several labels.

        Raises:
            ValueError: The shapes do not fit.
        """
        shapes = [list(values.shape[:2]), list(concepts.shape)]
        if values.ndim not in (2, 3) or shapes != [[len(label), self.num_concepts]] * 2:
            raise ValueError(
                f"expected values [B, {self.num_concepts}] or [B, {self.num_concepts}, m], concepts "
                f"[B, {self.num_concepts}] and a label of B rows, got {list(values.shape)}, {list(concepts.shape)} and "
                f"{list(label.shape)}"
            )
        self.values.append(values.detach().float().reshape(*concepts.shape, -1))
        self.concepts.append(concepts.detach().float())
        self.labels.append(label.detach())

    def evidence(self) -> Evidence:
        """What was stored, or as much of it as counts."""
        held = (self.values, self.concepts, self.labels)
        # after a sync the states are tensors already
        values, concepts, label = (part if isinstance(part, Tensor) else torch.cat(part) for part in held)
        found = Evidence(values, concepts, label, self.task, self.num_classes, None, self.real).settled()
        return found.rows(subsample(len(found), self.max_samples, self.seed))
