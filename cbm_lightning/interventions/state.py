"""What a policy may look at, and what would happen if one more concept were corrected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cbm_lightning.interventions.subject import Subject
from cbm_lightning.interventions.units import Units
from cbm_lightning.interventions.values import InterventionValues
from cbm_lightning.labels import label_log_probs
from cbm_lightning.randomness import Randomness
from cbm_lightning.types import ConceptOutput, LinearEffects, Prediction

Rows = Tensor | slice
Branch = Callable[[int, Rows], list[Tensor]]
"""From a concept and rows to the class logits ``[n, L]`` after each possible answer."""


@dataclass(frozen=True)
class State:
    """Samples in the middle of being corrected.

    Attributes:
        subject: The model.
        values: What the model is told where a person corrects.
        units: What can be asked.
        start: The prediction before any correction.
        prediction: The prediction after the corrections so far.
        mask: ``[B, K]`` bool, the concepts corrected so far.
        open: ``[B, K]`` bool, the concepts that can still be corrected.
        answerable: ``[B, K]`` bool, where the person can say something. Not for policies, which do not know.
        told: ``[B, K]`` what the person says where asked.
        truth: ``[B, K]`` what is true, NaN where unknown; for oracles only.
        label: ``[B, M]`` the true label outcomes; for oracles only.
        step: How many units each sample (on average, in batch scope) has been asked about.
        randomness: Streams of these samples.
        counted: ``[B]`` bool, False for samples that a distributed sampler repeated.
    """

    subject: Subject
    values: InterventionValues
    units: Units
    start: Prediction
    prediction: Prediction
    mask: Tensor
    open: Tensor
    answerable: Tensor
    told: Tensor
    truth: Tensor
    label: Tensor
    step: int
    randomness: Randomness
    counted: Tensor

    def corrected(self, mask: Tensor, step: int | None = None) -> State:
        """The same samples with the answerable among the concepts ``mask [B, K]`` corrected, and no others."""
        mask = mask & self.answerable
        correction = self.values.correction(self.start.concepts, self.told, mask)
        prediction = self.subject.intervene(self.start, correction)
        reachable = (self.open | self.mask) & ~mask
        return replace(self, prediction=prediction, mask=mask, open=reachable, step=self.step if step is None else step)

    def without(self, concepts: Tensor) -> State:
        """The same samples with ``concepts [B, K]`` no longer open."""
        return replace(self, open=self.open & ~concepts)

    @property
    def output(self) -> ConceptOutput:
        """The concepts after the corrections so far."""
        return self.prediction.concepts

    @cached_property
    def probs(self) -> Tensor:
        """``[B, K]`` predicted concepts after the corrections so far, at least single precision."""
        probs = self.output.probs
        return probs if probs.dtype == torch.float64 else probs.float()

    @cached_property
    def log_probs(self) -> Tensor:
        """``[B, M, C]`` log-probabilities of the label after the corrections so far."""
        return label_log_probs(self.prediction.logits, self.subject.task)

    @property
    def asked(self) -> Tensor:
        """``[B, U]`` bool, units of which a concept was corrected."""
        return self.units.touched(self.mask)

    def by_unit(self, scores: Tensor) -> Tensor:
        """``[B, K]`` scores of concepts to ``[B, U]`` scores of units, by the open members."""
        return self.units.scores(scores, self.open)

    def branches(self, *answers: float | Tensor) -> Iterator[tuple[int, Rows, list[Tensor]]]:
        """The label distributions that correcting one more concept would lead to, concept by concept.

        Correcting one concept is a rank-one update of the class logits where the model has `linear_effects`; otherwise
        the model predicts anew for each concept, with all samples in one batch. Either way only one concept's
        distributions exist at a time: memory grows with ``B L``, not with ``B K L``.

        Args:
            answers: The values that the concept could be corrected to: numbers, or ``[B, K]`` what the person would
                say, which changes nothing where they cannot answer. Numbers are no answers for real-valued concepts,
                which are then left out.

        Yields:
            The concept, the rows in which it is open, and the log-probabilities ``[n, M, C]`` after each answer.
        """
        branch = self._rank_one(answers) or self._predict_anew(answers)
        hypothetical = not any(isinstance(answer, Tensor) for answer in answers)
        real = self.subject.concepts.is_real().tolist()
        for k, count in enumerate(self.open.sum(0).tolist()):
            if count == 0 or (hypothetical and real[k]):
                continue
            rows = slice(None) if count == len(self.open) else self.open[:, k].nonzero().flatten()
            yield k, rows, [label_log_probs(logits, self.subject.task) for logits in branch(k, rows)]

    def look_ahead(self, score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Score each open concept by what correcting it to 0 or to 1 would do to the label.

        Args:
            score: ``score(p [n], now [n, M, C], absent [n, M, C], present [n, M, C])`` gives ``[n]``: the concept's
                predicted probability, and the label's log-probabilities now and after either answer.

        Returns:
            ``[B, K]``; 0 for concepts that are real-valued or not open.
        """
        scores = torch.zeros_like(self.probs)
        for k, rows, (absent, present) in self.branches(0.0, 1.0):
            scores[rows, k] = score(self.probs[rows, k], self.log_probs[rows], absent, present).to(scores.dtype)
        return scores

    def slopes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Class by class, how its logit reacts to what the head reads, see `Subject.slopes`."""
        return self.subject.slopes(self.output)

    def _predict_anew(self, answers: Sequence[float | Tensor]) -> Branch:
        def branch(k: int, rows: Rows) -> list[Tensor]:
            mask = self.mask.clone()
            mask[:, k] = True
            found = []
            for answer in answers:
                told = self.told.clone()
                told[:, k] = answer[:, k] if isinstance(answer, Tensor) else answer
                asked = mask & self.answerable if isinstance(answer, Tensor) else mask
                correction = self.values.correction(self.start.concepts, told, asked)
                found.append(self.subject.intervene(self.start, correction).logits[rows])
            return found

        return branch

    def _rank_one(self, answers: Sequence[float | Tensor]) -> Branch | None:
        effects = None if self.values.couples_groups else self.subject.linear_effects(self.output)
        if effects is None:
            return None
        logits, shifts = self.prediction.logits.float(), [self._shift(effects, answer) for answer in answers]
        same = len(effects.directions) == 1

        def branch(k: int, rows: Rows) -> list[Tensor]:
            directions = effects.directions[:, k] if same else effects.directions[rows, k]
            slope = (directions @ effects.weight[:, k].T).float()
            now = logits[rows]
            return [torch.addcmul(now, shift[rows, k, None], slope) for shift in shifts]

        return branch

    @torch.no_grad()
    def check_look_ahead(self) -> None:
        """Warn, and predict anew from now on, where rank-one updates differ from what the model predicts."""
        answers = (0.0, 1.0)
        fast, slow = self._rank_one(answers), self._predict_anew(answers)
        if fast is None:
            return
        for k in {0, self.mask.shape[1] // 2, self.mask.shape[1] - 1}:
            for quick, exact in zip(fast(k, slice(None)), slow(k, slice(None)), strict=True):
                if not torch.allclose(quick, exact.to(quick), rtol=1e-2, atol=1e-2 * float(exact.abs().max() + 1)):
                    self.subject.is_linear = False
                    warnings.warn(
                        f"correcting concept {self.subject.concepts.names[k]!r} does not move the class logits along "
                        "the bottleneck's `directions`: look-ahead predicts anew for each concept instead",
                        stacklevel=2,
                    )
                    return

    def _shift(self, effects: LinearEffects, answer: float | Tensor) -> Tensor:
        """``[B, K]`` how far each concept would move along its direction."""
        told = answer if isinstance(answer, Tensor) else torch.full_like(self.told, answer)
        # what is unknown is never open, but NaN would spread
        told = told.nan_to_num(nan=0.0)
        correction = self.values.correction(self.start.concepts, told, torch.ones_like(self.mask))
        corrected = self.subject.intervene(self.start, correction).concepts.values
        width = effects.weight.shape[1] * effects.weight.shape[2]
        moved = (corrected - self.output.values)[:, :width].unflatten(1, effects.weight.shape[1:]).float()
        directions = effects.directions.float()
        length = directions.square().sum(-1)
        shift: Tensor = (moved * directions).sum(-1) / length.clamp(min=torch.finfo(length.dtype).tiny)
        return shift * self.answerable if isinstance(answer, Tensor) else shift
