"""`InterventionStudy`: several policies on one stream of predictions, block by block."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.interventions.curve import Average, InterventionCurve
from cbm_lightning.interventions.engine import InterventionEngine, Rollout, Samples, resolve_budgets
from cbm_lightning.interventions.person import Person
from cbm_lightning.interventions.policies import Policy
from cbm_lightning.interventions.policies.base import Gather
from cbm_lightning.interventions.summaries import area, summarize
from cbm_lightning.interventions.values import listed
from cbm_lightning.randomness import Randomness
from cbm_lightning.types import Batch, Prediction

if TYPE_CHECKING:
    import pandas as pd

LARGEST_ROLLOUT = 2**25
"""Numbers in the class logits of a block at all budgets: 128 MiB in single precision bound the memory."""

LARGEST_LOOK_AHEAD = 2**18
"""Numbers in one label distribution of a block: with more than a megabyte, look-ahead leaves the processor's caches."""


@dataclass(frozen=True)
class StudyResult:
    """Curves of several policies.

    Attributes:
        budgets: The ``R`` budgets, in units.
        num_units: How many units there are.
        score_name: Name of the score among the curves.
        curves: Policy to curve name to ``[trials, R]``, see `InterventionCurve`.
        samples: How many samples were counted.
    """

    budgets: list[int]
    num_units: int
    score_name: str
    curves: dict[str, dict[str, Tensor]]
    samples: int

    def scores(self, policy: str) -> Tensor:
        """``[trials, R]`` scores of a policy."""
        return self.curves[policy][self.score_name]

    def accuracies(self, policy: str) -> Tensor:
        """``[trials, R]`` label accuracies of a policy, whatever the score."""
        return self.curves[policy]["label_acc"]

    def scalars(self, target: float | None = None) -> dict[str, float]:
        """``POLICY/auc`` and the other summaries, see `summaries.summarize`; those without a value are left out."""
        found: dict[str, float] = {}
        for policy, curves in self.curves.items():
            summaries = summarize(self.budgets, self.num_units, curves[self.score_name], curves["loss"], target)
            if "worst_group" in curves:
                summaries["worst_group_auc"] = area(self.budgets, curves["worst_group"]).mean()
            found |= {f"{policy}/{name}": float(value) for name, value in summaries.items() if not value.isnan()}
        return found

    def table(self) -> pd.DataFrame:
        """A row a policy, trial (``seed``) and ``budget``, with a column a curve."""
        import pandas as pd

        rows = []
        for policy, curves in self.curves.items():
            columns = {name: curve.cpu() for name, curve in curves.items()}
            for trial in range(len(columns["loss"])):
                for r, budget in enumerate(self.budgets):
                    row = {"policy": policy, "seed": trial, "budget": budget}
                    rows.append(row | {name: float(curve[trial, r]) for name, curve in columns.items()})
        return pd.DataFrame(rows)


class InterventionStudy:
    """Runs policies on predictions as they come; nothing is encoded twice.

    In single scope samples are kept until a block is full (1,024, fewer where many classes and budgets would take more
    than 128 MiB of class logits; a batch beyond that stays whole), then every policy runs on the block and it is
    forgotten: memory does not grow with the data, but for a number a sample and budget where samples have groups. In
    batch scope, which ranks the split as a whole, all predictions are kept, and only scores travel between processes.

    Args:
        engine: Decides and predicts.
        person: Who corrects.
        policies: Built policies with labels of their own.
        num_classes: ``L``.
        budgets: See `resolve_budgets`.
        num_seeds: Trials of policies that draw.
        average: See `InterventionCurve`.
        metric: See `InterventionCurve`.
        block_size: Samples a block.
        device: Where predictions live.

    Raises:
        ValueError: Two policies have one label, or a budget or number is out of range.

    Example:
        >>> from cbm_lightning import CBMModule, ConceptSet
        >>> from cbm_lightning.backbones import Identity
        >>> from cbm_lightning.interventions.units import Units
        >>> model = CBMModule(Identity(8), concepts=["red", "round"], num_classes=3).eval()
        >>> engine = InterventionEngine(model, Units.make(model.concept_set))
        >>> study = InterventionStudy(engine, Person(model.concept_set), [Policy.make("ucp")], num_classes=3)
        >>> batch = {"embedding": torch.randn(4, 8), "concepts": torch.ones(4, 2), "label": torch.tensor([0, 1, 2, 0])}
        >>> with torch.inference_mode():
        ...     study.add(study.encode(model(batch), batch, torch.arange(4)))
        >>> study.finish().scores("ucp").shape
        torch.Size([1, 3])
    """

    def __init__(
        self,
        engine: InterventionEngine,
        person: Person,
        policies: Sequence[Policy],
        *,
        num_classes: int,
        budgets: Sequence[int | float] | None = None,
        num_seeds: int = 5,
        average: Average = "micro",
        metric: Metric | None = None,
        block_size: int = 1024,
        device: torch.device | str = "cpu",
    ) -> None:
        for field, value in {"num_seeds": num_seeds, "block_size": block_size}.items():
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        self.engine, self.person, self.policies = engine, person, list(policies)
        check_labels(self.policies)
        self.budgets = resolve_budgets(budgets, len(engine.units))
        largest = min(LARGEST_ROLLOUT // (len(self.budgets) * num_classes), LARGEST_LOOK_AHEAD // num_classes)
        self.block_size = max(min(block_size, largest), 1)
        self.curves = {
            policy.label: [
                InterventionCurve(self.budgets, num_classes, engine.subject.task, average, metric).to(device)
                for _ in range(num_seeds if policy.stochastic else 1)
            ]
            for policy in self.policies
        }
        self._num_outputs = 1 if engine.subject.task == "binary" else num_classes
        self._waiting: list[Samples] = []
        self._answerable = torch.zeros(len(engine.subject.concepts), dtype=torch.long)
        self._checked = False

    def encode(self, prediction: Prediction, batch: Batch, index: Tensor, counted: Tensor | None = None) -> Samples:
        """Predictions of a batch, with what the person would say of it.

        Args:
            prediction: What the model says.
            batch: With ``concepts`` and ``label``; ``certainty`` and ``group`` are read where they exist.
            index: ``[B]`` int64 on the CPU, a number a sample, unique in the split.
            counted: ``[B]`` bool, False for repeated samples.

        Raises:
            ValueError: The batch has no annotated concepts or no label.
        """
        for name in ("concepts", "label"):
            if name not in batch:
                raise ValueError(
                    f"the batch has no {name!r}, only {sorted(batch)}: nobody can say which correction is right. "
                    "Intervention curves need annotated concepts and labels"
                )
        randomness = Randomness(self.engine.seed, "person", index)
        answers = self.person.answer(batch["concepts"].float(), batch["label"], batch.get("certainty"), randomness)
        counted = torch.ones(len(index), dtype=torch.bool) if counted is None else counted
        device = prediction.logits.device
        return Samples(prediction, answers, batch["label"], index, counted.to(device), batch.get("group"))

    def fit(self, split: str, samples: Sequence[Samples], gather: Gather) -> None:
        """Let policies and values learn from a split that they asked for.

        Args:
            split: ``"train"`` or ``"val"``.
            samples: All samples of the split (of this process).
            gather: Joins the rows of all processes.
        """
        if split == "train" and self.engine.values.needs_train:
            logits = torch.cat([block.prediction.concepts.logits.float()[block.counted] for block in samples])
            truth = torch.cat([block.answers.truth[block.counted] for block in samples])
            self.engine.values.fit(gather(logits), gather(truth))
        wanting = [policy for policy in self.policies if policy.fits_on == split]
        if wanting:
            blocks = join(samples, self.block_size)
            self._check(blocks[0])
            for policy in wanting:
                policy.fit([self.engine.start(block) for block in blocks], gather)

    def add(self, samples: Samples) -> None:
        """Take the predictions of a batch; runs the policies whenever a block is full."""
        self._check(samples)
        self._waiting.append(samples)
        self._answerable = self._answerable + samples.answers.answerable[samples.counted].sum(0).cpu()
        if self.engine.scope == "single" and sum(map(len, self._waiting)) >= self.block_size:
            self._run(gather=None)

    def _check(self, samples: Samples) -> None:
        if not self._checked:
            self.engine.check(samples)
            self._checked = True

    def finish(self, gather: Gather | None = None) -> StudyResult:
        """Run what is left, and compute the curves; a collective call when there are several processes."""
        if self._waiting or self.engine.scope == "batch":
            self._run(gather)
        self._take_part()
        curves: dict[str, dict[str, Tensor]] = {}
        for policy, trials in self.curves.items():
            computed = [curve.compute() for curve in trials]
            curves[policy] = {name: torch.stack([trial[name] for trial in computed]) for name in computed[0]}
        first = next(iter(self.curves.values()))[0]
        seen = torch.cat([first.samples.view(1), self._answerable.to(first.samples)]).unsqueeze(0)
        total, *answerable = (seen if gather is None else gather(seen)).sum(0).tolist()
        silent = [name for name, n in zip(self.engine.subject.concepts, answerable, strict=True) if n == 0]
        if total and len(silent) == len(answerable):
            raise ValueError(
                f"concepts: none of {total} samples has an annotated, visible concept that a person could correct. "
                "Intervention curves need annotated concepts"
            )
        if total and silent:
            warnings.warn(
                f"{len(silent)} concepts are annotated (or visible) in none of {total} samples and never corrected: "
                f"{listed(silent)}",
                stacklevel=2,
            )
        return StudyResult(self.budgets, len(self.engine.units), first.score_name, curves, int(total))

    def _take_part(self) -> None:
        """Let curves that saw no sample synchronise like those of other processes."""
        for curve in (curve for trials in self.curves.values() for curve in trials if not curve.update_called):
            shape = (len(self.budgets), 0)
            classes, device = self._num_outputs, curve.samples.device
            label = torch.zeros((0, classes) if curve.task == "multilabel" else 0, dtype=torch.long, device=device)
            logits = torch.zeros(*shape, classes, device=device)
            curve.update(Rollout(logits, *torch.zeros(4, *shape, device=device)), label)

    def _run(self, gather: Gather | None) -> None:
        blocks, self._waiting = join(self._waiting, self.block_size), []
        for policy in self.policies:
            for trial, curve in enumerate(self.curves[policy.label]):
                plans = self.engine.plan(blocks, policy, self.budgets[-1], trial, gather)
                for block, steps in zip(blocks, plans, strict=True):
                    rollout = self.engine.rollout(block, steps, self.budgets, trial)
                    if not block.counted.all():
                        rollout = Rollout(*(part[:, block.counted] for part in rollout))
                    group = None if block.group is None else block.group[block.counted]
                    curve.update(rollout, block.label[block.counted], group)


def join(parts: Sequence[Samples], size: int) -> list[Samples]:
    """Blocks of about ``size`` samples (at least one part each); parts that cannot be joined stay alone."""
    blocks: list[list[Samples]] = []
    for part in parts:
        last = blocks[-1] if blocks else None
        fits = last is not None and last[-1].prediction.concepts.fits(part.prediction.concepts)
        if last is not None and fits and sum(map(len, last)) < size:
            last.append(part)
        else:
            blocks.append([part])
    return [Samples.cat(block) for block in blocks]


def check_labels(policies: Sequence[Policy]) -> None:
    """Check that there are policies, and that their labels tell them apart.

    Raises:
        ValueError: They do not.
    """
    if not policies:
        raise ValueError("policies: expected at least one, such as 'rand' or 'ucp', got none")
    labels = [policy.label for policy in policies]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"policies: several are called {repeated}; give each a label of its own (init_args: label)")
