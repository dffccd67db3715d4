"""Leakage as the label information of predicted concepts given the true ones, by probes."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.labels import Task
from cbm_lightning.metrics.leakage.evidence import (
    Evidence,
    LeakageMetric,
    Measurement,
    Splits,
    cross_splits,
    mean_and_error,
)
from cbm_lightning.metrics.leakage.probes import (
    HIDDEN,
    STEPS,
    Probes,
    fit_probes,
    label_correct,
    label_nll,
    out_of_fold,
    standardised,
    temper,
)

SMALL, SHORT = 8, 60
"""Hidden units and most steps of the probe of a single concept."""
AT_ONCE = 4_000_000
"""Numbers a layer that probes of single concepts hold at a time."""


class TruthProbe:
    """What the true concepts say of the label: a probe fitted on them, tempered on held-out rows.

    Args:
        evidence: In double precision, completely annotated.
        splits: Which rows to fit on, to stop on and to judge on.
        seed: Of the weights.

    Attributes:
        logits: ``[R * F, N, L]``.
        nll: ``[R, N]`` negative log-likelihood in nats where rows were judged, NaN elsewhere.
        correct: ``[R, N]`` whether the likeliest label was right.
    """

    def __init__(self, evidence: Evidence, splits: Splits, seed: int = 0) -> None:
        fit, hold, _ = splits.flat()
        self.evidence, self.splits = evidence, splits
        self.outputs = 1 if evidence.task == "binary" else evidence.num_classes
        self.truth = standardised(evidence.concepts, fit)
        generator = torch.Generator().manual_seed(seed)
        probes = Probes(len(fit), evidence.num_concepts, self.outputs, HIDDEN, generator)
        self.logits = temper(fit_probes(probes, self.truth, self.loss, fit, hold), self.loss, hold)
        self.nll = self.judged(self.loss(self.logits))
        self.correct = self.judged(label_correct(self.logits, evidence.outcomes, evidence.task))

    def loss(self, logits: Tensor) -> Tensor:
        """``[G, N]``, in nats."""
        return label_nll(logits, self.evidence.outcomes, self.evidence.task)

    def judged(self, rows: Tensor) -> Tensor:
        """``[R * F, N]`` to ``[R, N]``."""
        return out_of_fold(rows, self.splits)

    def corrected(self, x: Tensor, hidden: int, seed: int, steps: int = STEPS) -> Tensor:
        """``[g * R, N]`` nll where other probes may correct the logits by ``x [g * R * F, N, V]``.

        Each begins with no correction and stops where held-out rows gain nothing: numbers that say nothing of the label
        change nothing.
        """
        fit, hold, _ = self.splits.flat()
        groups = len(x) // len(fit)
        generator = torch.Generator().manual_seed(seed)
        probes = Probes(len(x), x.shape[-1], self.outputs, hidden, generator, start_at_zero=True)
        base = self.logits.repeat(groups, 1, 1)
        fit, hold = fit.repeat(groups, 1), hold.repeat(groups, 1)
        logits = base + fit_probes(probes, x, lambda outputs: self.loss(base + outputs), fit, hold, steps)
        return torch.cat([self.judged(part) for part in self.loss(logits).chunk(groups)])

    def first_repeat(self) -> TruthProbe:
        """The same of the first repeat alone."""
        found = copy(self)
        found.splits = Splits(*(part[:1] for part in self.splits))
        found.logits, found.truth = (part[: self.splits.fit.shape[1]] for part in (self.logits, self.truth))
        found.nll, found.correct = self.nll[:1], self.correct[:1]
        return found


def conditional_information(
    evidence: Evidence, splits: Splits, seed: int = 0, per_concept: bool = True, probe: TruthProbe | None = None
) -> Measurement:
    """Label information that the predicted concepts carry beyond the true ones, ``I(y; c_hat | c)`` in nats.

    ``NLL[y | c] - NLL[y | c, c_hat]`` on rows that the probes were not fitted on (Makonnen et al. 2025; free dimensions
    of hybrid bottlenecks count as part of ``c_hat``). Each probe has one hidden layer. The second corrects the first,
    starting from no correction, so that neither a poor fit of the first nor noise in ``c_hat`` passes for leakage:
    beside it the same correction with ``c`` alone is made, from which the difference is taken. Probes find a lower
    bound, and chance may bring it below zero.

    Args:
        evidence: What to measure on; samples that are not annotated completely do not count.
        splits: Of these samples.
        seed: Of the weights.
        per_concept: Measure each concept by itself too: what it adds to the logits beside its own true value, the same
            whatever the other true ones. That is all it says where it depends on the other concepts through the label
            only. Concepts say much of the same: their numbers do not add up.
        probe: The probe on the truth of the same evidence and splits, if there is one already.

    Returns:
        ``value`` in nats. ``details`` has ``share`` (of ``nll``), ``nll`` (of the label given the truth, an upper bound
        of H(y | c)), ``accuracy`` (that of the probe on the truth), ``extra`` and ``extra_error`` (the free dimensions
        by themselves, where there are any) and ``samples``, those that were judged.

    Raises:
        ValueError: Hardly any sample is annotated completely.
    """
    complete = evidence.complete
    evidence, splits = evidence.rows(complete), splits.rows(complete)
    if not bool(splits.fit.any(-1).all() and splits.hold.any(-1).all()):
        raise ValueError(
            f"conditional_mi: only {len(evidence)} samples are annotated completely; leave this measure out, or "
            "annotate more"
        )
    base = probe or TruthProbe(evidence, splits, seed)
    fit = splits.flat().fit
    values = standardised(evidence.values.flatten(1), fit)
    free = values[..., :0] if evidence.extra is None else standardised(evidence.extra, fit)
    everything = torch.cat([base.truth, values, free], -1)
    nothing = torch.cat([base.truth, torch.zeros_like(values), torch.zeros_like(free)], -1)
    plain, informed = base.corrected(torch.cat([nothing, everything]), HIDDEN, seed + 1).chunk(2)
    value, error = mean_and_error(plain - informed)
    nll = float(plain.nanmean())
    details = {"share": value / nll if nll > 0 else torch.nan, "nll": nll, "accuracy": float(base.correct.nanmean())}
    details["samples"] = float((~plain.isnan()).any(0).sum())
    if evidence.extra is not None:
        alone = [torch.cat([base.truth, part], -1) for part in (torch.zeros_like(free), free)]
        plain, informed = base.corrected(torch.cat(alone), SMALL, seed + 2).chunk(2)
        details["extra"], details["extra_error"] = mean_and_error(plain - informed)
    if not per_concept:
        return Measurement(value, error, details=details)
    each, errors = _by_concept(base, values, evidence.num_concepts, seed + 3)
    return Measurement(value, error, each, errors, details)


def _by_concept(base: TruthProbe, values: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``[K]`` nats that each concept adds by itself, and their errors."""
    # the spread over samples is known from one, and more would double the time
    base = base.first_repeat()
    values = values[: len(base.logits)]
    groups, rows, _ = values.shape
    width = values.shape[-1] // count
    most = max(1, AT_ONCE // (2 * groups * rows * max(SMALL, 1 + width, base.outputs)))
    columns = values.unflatten(-1, (count, width)).unbind(2)
    found = []
    for start in range(0, count, most):
        some = columns[start : start + most]
        # beside its own true value, or what the first probe missed of that would pass for leakage
        own = base.truth.unsqueeze(-1).unbind(2)[start : start + most]
        informed = [torch.cat(pair, -1) for pair in zip(own, some, strict=True)]
        plain = [torch.cat([true, torch.zeros_like(part)], -1) for true, part in zip(own, some, strict=True)]
        nll = base.corrected(torch.cat([*plain, *informed]), SMALL, seed + start, SHORT).chunk(2 * len(some))
        found += [mean_and_error(a - b) for a, b in zip(nll[: len(some)], nll[len(some) :], strict=True)]
    value, error = torch.tensor(found, dtype=torch.float64).T
    return value, error


class ConditionalLeakage(LeakageMetric):
    """Label information in nats that predicted concepts carry beyond the true ones (Makonnen et al. 2025).

    See `conditional_information`; the probes are judged on samples that they were not fitted on, by folds.

    Args:
        concepts: See `LeakageMetric`.
        num_classes: See `LeakageMetric`.
        task: See `LeakageMetric`.
        folds: Of the samples.
        repeats: Folds are drawn and probes are fitted so often.
        max_samples: See `LeakageMetric`.
        seed: See `LeakageMetric`.
        kwargs: Options of ``torchmetrics.Metric``.

    Example:
        >>> import torch
        >>> label = torch.arange(400) % 4
        >>> truth = (label[:, None] > 1).float()
        >>> metric = ConditionalLeakage(1, num_classes=4, folds=2, repeats=1)
        >>> clean, leaky = metric(truth, truth, label).item(), metric(label[:, None], truth, label).item()
        >>> abs(clean) < 0.02, abs(leaky - 0.693) < 0.02  # the other half of the label is log 2
        (True, True)
    """

    def __init__(
        self,
        concepts: ConceptSet | int,
        num_classes: int,
        task: Task = "multiclass",
        folds: int = 3,
        repeats: int = 2,
        max_samples: int = 2000,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(concepts, num_classes, task, max_samples, seed, **kwargs)
        if folds < 2 or repeats < 1:
            raise ValueError(f"folds, repeats: expected at least 2 and 1, got {folds} and {repeats}")
        self.folds, self.repeats = folds, repeats

    @torch.inference_mode(False)
    def measure(self, per_concept: bool = True) -> Measurement:
        """The measure with its uncertainty, and a concept."""
        evidence = self.evidence()
        splits = cross_splits(len(evidence), self.folds, self.repeats, self.seed)
        return conditional_information(evidence, splits, self.seed, per_concept)

    def compute(self) -> Tensor:
        """In nats; below zero by chance."""
        return torch.tensor(self.measure(per_concept=False).value)
