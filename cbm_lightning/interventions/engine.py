"""From policies to curves: samples are encoded once, then only the head predicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions.person import Answers
from cbm_lightning.interventions.policies import Policy
from cbm_lightning.interventions.policies.base import Gather
from cbm_lightning.interventions.ranking import NEVER, next_picks, steps_by_rank
from cbm_lightning.interventions.state import State
from cbm_lightning.interventions.subject import Intervenable, Subject
from cbm_lightning.interventions.units import Units
from cbm_lightning.interventions.values import InterventionValues, OwnValues, warn_of_collapse
from cbm_lightning.labels import label_outcomes, mean_over_samples
from cbm_lightning.randomness import Randomness
from cbm_lightning.types import ConceptOutput, Prediction

Scope = Literal["single", "batch"]
Reading = Literal["soft", "hard", "sample"]
Unanswered = Literal["skip", "spend"]


@dataclass(frozen=True)
class Samples:
    """Encoded samples that wait for corrections.

    Attributes:
        prediction: What the model says of them.
        answers: What the person would say.
        label: ``[B]`` classes, or ``[B, L]`` of several labels.
        index: ``[B]`` int64 on the CPU, which sample of the split each one is.
        counted: ``[B]`` bool, False for samples that a distributed sampler repeated.
        group: ``[B]`` subgroup of each sample, or None.
    """

    prediction: Prediction
    answers: Answers
    label: Tensor
    index: Tensor
    counted: Tensor
    group: Tensor | None = None

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def cat(cls, parts: Sequence[Samples]) -> Samples:
        """Several as one, if `ConceptOutput.can_join` says so."""
        groups = [part.group for part in parts if part.group is not None]
        if groups and len(groups) < len(parts):
            raise ValueError("group: some batches have it, some do not; give it to all, or name another subgroup_key")
        return cls(
            Prediction(
                torch.cat([part.prediction.logits for part in parts]),
                ConceptOutput.cat([part.prediction.concepts for part in parts]),
            ),
            Answers(
                *(
                    torch.cat([getattr(part.answers, name) for part in parts])
                    for name in ("told", "truth", "answerable")
                )
            ),
            torch.cat([part.label for part in parts]),
            torch.cat([part.index for part in parts]),
            torch.cat([part.counted for part in parts]),
            torch.cat(groups) if groups else None,
        )


class Rollout(NamedTuple):
    """Samples at every budget ``R`` of a curve.

    Attributes:
        logits: ``[R, B, L]`` class logits.
        corrected: ``[R, B]`` how many concepts were corrected.
        cost: ``[R, B]`` what asking cost.
        free_right: ``[R, B]`` how many annotated concepts are right among those that nobody corrected.
        free_known: ``[R, B]`` how many annotated concepts nobody corrected.
    """

    logits: Tensor
    corrected: Tensor
    cost: Tensor
    free_right: Tensor
    free_known: Tensor


class InterventionEngine:
    """Decides what each sample is asked about, step by step, and predicts at every budget.

    What a sample is asked about at budget ``r`` it is asked about at every higher budget, and all corrections start
    anew from the uncorrected prediction.

    Args:
        model: The model, see `Intervenable`.
        units: What can be asked.
        values: What the model is told; by default on the bottleneck's own scale.
        scope: Every sample is asked about one unit a step (``"single"``), or the split as a whole about as many units
            as it has samples (``"batch"``): some samples get many, some none. The second needs all samples at once.
        reading: How the head reads concepts that nobody corrected: as predicted (``"soft"``), rounded (``"hard"``), or
            drawn ``num_draws`` times with label probabilities averaged (``"sample"``). Policies look at the soft ones.
            To a value strategy that looks at all corrections, rounded and drawn concepts are corrected ones.
        unanswered: A unit about which the person can say nothing is never asked about (``"skip"``), or is asked about
            in vain (``"spend"``).
        num_draws: Draws a sample for ``reading="sample"``.
        seed: Seed of all draws; each sample has streams of its own.

    Raises:
        ValueError: An option is unknown.
        TypeError: The model lacks a member of the protocol.
    """

    def __init__(
        self,
        model: Intervenable,
        units: Units,
        values: InterventionValues | None = None,
        *,
        scope: Scope = "single",
        reading: Reading = "soft",
        unanswered: Unanswered = "skip",
        num_draws: int = 5,
        seed: int = 0,
    ) -> None:
        for field, value, known in (
            ("scope", scope, Scope),
            ("reading", reading, Reading),
            ("unanswered", unanswered, Unanswered),
        ):
            if value not in get_args(known):
                raise ValueError(f"{field}: expected one of {get_args(known)}, got {value!r}")
        if num_draws < 1:
            raise ValueError(f"num_draws: expected at least 1, got {num_draws}")
        self.subject = Subject(model)
        self.units = units
        if values is None:
            values = OwnValues()
            values.build(self.subject.concepts)
        self.values = values
        self.scope, self.reading, self.unanswered = scope, reading, unanswered
        self.num_draws, self.seed = num_draws, seed

    # ---------------------------------------------------------------- deciding

    def start(self, samples: Samples, trial: int = 0) -> State:
        """Samples before any correction; what policies draw differs between trials."""
        prediction, answers = samples.prediction, samples.answers
        can_be_asked = answers.answerable
        if self.unanswered == "spend":
            can_be_asked = torch.ones_like(can_be_asked)
        return State(
            self.subject,
            self.values,
            self.units.to(prediction.logits.device),
            prediction,
            prediction,
            torch.zeros_like(answers.answerable),
            can_be_asked,
            answers.answerable,
            answers.told,
            answers.truth,
            label_outcomes(samples.label, self.subject.task),
            0,
            Randomness(self.seed, f"trial {trial}", samples.index),
            samples.counted,
        )

    def plan(
        self,
        samples: Sequence[Samples],
        policy: Policy,
        last: int | None = None,
        trial: int = 0,
        gather: Gather | None = None,
    ) -> list[Tensor]:
        """Decide at which budget each unit of each sample is asked about.

        Args:
            samples: In single scope any number of blocks, each on its own; in batch scope the whole split.
            policy: Built, and fitted if it needs to be.
            last: The highest budget of interest; all units by default.
            trial: Number of the repetition, for policies that draw.
            gather: Joins the rows of all processes in batch scope; only scores go through it.

        Returns:
            ``[B, U]`` int64 a block: the first budget at which the unit is among those asked about, `NEVER` for those
            that cannot be.
        """
        states = [self.start(block, trial) for block in samples]
        join = gather or (lambda rows: rows)
        last = len(self.units) if last is None else last
        nothing = self.units.costs.new_zeros(0, len(self.units))
        if not policy.adaptive:
            return steps_by_rank([self._scores(policy, state) for state in states], states, self.scope, join, nothing)
        steps = [torch.full_like(state.asked, NEVER, dtype=torch.long) for state in states]
        for step in range(1, last + 1):
            picks = next_picks([self._scores(policy, state) for state in states], states, self.scope, join, nothing)
            if not any(bool(pick.any()) for pick in picks) and self.scope == "single":
                break
            for i, pick in enumerate(picks):
                steps[i][pick] = step
                taken = self.units.to(pick.device).expand(steps[i] <= step)
                # what was asked about in vain is not asked about again
                states[i] = states[i].corrected(taken, step).without(taken)
        return steps

    def _scores(self, policy: Policy, state: State) -> Tensor:
        """``[B, U]``, minus infinity for what was asked about or cannot be."""
        scores = policy.score(state)
        expected = (len(state.probs), len(self.units))
        if scores.shape != expected:
            raise ValueError(f"policy {policy.label!r}: expected scores {list(expected)}, got {list(scores.shape)}")
        return scores.masked_fill(~state.units.touched(state.open) | scores.isnan(), -torch.inf)

    # ---------------------------------------------------------------- predicting

    def rollout(self, samples: Samples, steps: Tensor, budgets: Sequence[int], trial: int = 0) -> Rollout:
        """Predict at every budget.

        Args:
            samples: ``B`` encoded samples.
            steps: ``[B, U]`` from `plan`.
            budgets: How many units each sample was asked about (on average, in batch scope).
            trial: Number of the repetition, for ``reading="sample"``.
        """
        units = self.units.to(steps.device)
        truth, real = samples.answers.truth, self.subject.concepts.is_real().to(steps.device)
        annotated, holds = ~truth.isnan() & ~real, truth >= 0.5
        found = []
        for budget in budgets:
            taken = steps <= budget
            mask = units.expand(taken) & samples.answers.answerable
            prediction = self._predict(samples, mask, trial)
            known = annotated & ~mask
            right = (prediction.concepts.probs >= 0.5) == holds
            cost = (taken.to(units.costs) @ units.costs).float()
            found.append((prediction.logits, mask.sum(-1), cost, (right & known).sum(-1), known.sum(-1)))
        return Rollout(*(torch.stack(column) for column in zip(*found, strict=True)))

    def _predict(self, samples: Samples, mask: Tensor, trial: int) -> Prediction:
        start, told = samples.prediction, samples.answers.told
        if self.reading == "soft":
            return self._told(start, told, mask)
        probs, everything = start.concepts.probs, torch.ones_like(mask)
        real = self.subject.concepts.is_real().to(mask.device)
        if self.reading == "hard":
            rounded = torch.where(real, probs, rounded_concepts(probs, self.subject.concepts))
            return self._told(start, torch.where(mask, told.to(probs), rounded), everything)
        randomness = Randomness(self.seed, f"reading {trial}", samples.index)
        draws = []
        for draw in range(self.num_draws):
            uniform = randomness.uniform(f"draw {draw}", len(self.subject.concepts)).to(probs)
            drawn = torch.where(real, probs, drawn_concepts(probs, uniform, self.subject.concepts))
            draws.append(self._told(start, torch.where(mask, told.to(probs), drawn), everything))
        logits = mean_over_samples(torch.stack([draw.logits.float() for draw in draws]), self.subject.task)
        return Prediction(logits, self._told(start, told, mask).concepts)

    def _told(self, start: Prediction, told: Tensor, mask: Tensor) -> Prediction:
        return self.subject.intervene(start, self.values.correction(start.concepts, told, mask))

    # ---------------------------------------------------------------- checks

    def check(self, samples: Samples) -> None:
        """Look at first samples: warn of concepts that correcting does not move, and of a look-ahead that is wrong.

        A look-ahead whose rank-one updates differ from what `Intervenable.intervene` predicts is not used.
        """
        state = self.start(samples)
        everything = torch.ones_like(state.mask)
        absent, present = (
            self._told(state.start, torch.full_like(state.told, value), everything).concepts.values
            for value in (0.0, 1.0)
        )
        layout = self.subject.layout(state.output)
        moved = (absent - present)[..., : layout.concepts * layout.width].unflatten(-1, (layout.concepts, layout.width))
        still = (moved == 0).all(-1).flatten(0, -2).all(0)
        if dead := [self.subject.concepts.names[k] for k in still.nonzero().flatten().tolist()]:
            warn_of_collapse(dead, "the bottleneck's values")
        state.check_look_ahead()


def rounded_concepts(probs: Tensor, concepts: ConceptSet) -> Tensor:
    """``[B, K]`` 0 or 1: from one half, in a categorical group the likeliest member."""
    rounded = (probs >= 0.5).to(probs)
    for members in concepts.categorical_groups():
        rounded[:, members] = one_hot(probs[:, members].argmax(-1), len(members)).to(probs)
    return rounded


def drawn_concepts(probs: Tensor, uniform: Tensor, concepts: ConceptSet) -> Tensor:
    """``[B, K]`` 0 or 1 drawn with ``uniform [B, K]`` numbers; of a categorical group exactly one member."""
    drawn = (uniform < probs).to(probs)
    for members in concepts.categorical_groups():
        below = probs[:, members].cumsum(-1) <= uniform[:, members[:1]]
        drawn[:, members] = one_hot(below.sum(-1).clamp(max=len(members) - 1), len(members)).to(probs)
    return drawn


def resolve_budgets(budgets: Sequence[int | float] | None, units: int) -> list[int]:
    """Budgets as numbers of units, ascending, 0 among them.

    Args:
        budgets: Numbers of units (ints), fractions of all units (floats in [0, 1]), or None for every number.
        units: How many there are.

    Raises:
        ValueError: A budget lies out of range.

    Example:
        >>> resolve_budgets([0.25, 0.5, 1.0], 10)
        [0, 3, 5, 10]
    """
    if budgets is None:
        return list(range(units + 1))
    found = {0}
    for budget in budgets:
        largest = 1.0 if isinstance(budget, float) else units
        if not 0 <= budget <= largest:
            raise ValueError(
                f"budgets: expected numbers of units from 0 to {units}, or fractions in [0, 1], got {budget!r}"
            )
        # a fraction that rounding put a hair above a whole number is that number
        found.add(math.ceil(budget * units - 1e-9) if isinstance(budget, float) else int(budget))
    return sorted(found)
