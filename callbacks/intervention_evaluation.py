"""`InterventionEvaluation`: what it helps to correct concepts, and which to ask about first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.intervention_figure import draw_curves
from cbm_lightning.callbacks.loggers import log_figure, log_table
from cbm_lightning.callbacks.passes import Positions, batches, flatten, gather_rows, prediction_of, predictions
from cbm_lightning.data import ConceptDataModule
from cbm_lightning.interventions.curve import Average
from cbm_lightning.interventions.engine import InterventionEngine, Reading, Samples, Scope, Unanswered
from cbm_lightning.interventions.leakage_check import LeakageWarning, describe_fall
from cbm_lightning.interventions.person import LabelLevel, OnInvisible, Person, class_majority
from cbm_lightning.interventions.policies import Policy
from cbm_lightning.interventions.study import InterventionStudy, StudyResult, check_labels
from cbm_lightning.interventions.units import Reduce, Unit, Units
from cbm_lightning.interventions.values import InterventionValues
from cbm_lightning.types import Batch, Features, Prediction


class InterventionEvaluation(NamedEvaluation):
    """Corrects concepts step by step in validation or test, and logs how the label follows.

    Each batch is encoded once, by the module's own step where that returns its ``prediction``; everything else is the
    head. Logged are the scalars ``{val,test}/intervention/POLICY/{auc,gain,final,...}`` (for `ModelCheckpoint` and
    `EarlyStopping` too), the table ``.../intervention/curves`` and the figure ``.../intervention/figure`` to every
    logger, or to files, see `loggers`. If accuracy falls though every answer was right, a `LeakageWarning` says so with
    the numbers. The same curves come out for any batch size and number of processes.

    Args:
        policies: Short names or configured policies: which unit to ask about next.
        unit: Ask about single concepts (``"concept"``), about the concept set's groups (``"group"``), or about groups
            of one's own, name to concept names, which cover every concept.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        scope: See `InterventionEngine`.
        group_reduce: How scores of concepts become that of their group: ``"mean"``, ``"max"`` or ``"sum"``.
        budgets: How many units to correct: numbers, fractions of all units, or None for every number.
        values: What the model is told: ``"own"``, ``"binary"``, ``"percentile"``, ``"class_conditional_percentile"``,
            ``"constant"``, ``"confidence_region"`` or a configured strategy. Those that need training predictions take
            them from the checkpoint, or predict the training split first.
        label_level: See `Person`.
        on_invisible: See `Person`.
        competence: See `Person`.
        unanswered: See `InterventionEngine`.
        reading: See `InterventionEngine`.
        costs: Of every unit, or by unit name (1 where none is given). Logged with the curves; CooP minds them if its
            ``cost_weight`` says so.
        num_seeds: Trials of policies that draw; the figure shows their spread.
        average: Label accuracy over samples (``"micro"``) or over classes (``"macro"``, balanced).
        task_metric: Any torchmetrics metric of the label instead of accuracy.
        target: A score; ``POLICY/target_budget`` is the smallest budget that reaches it.
        subgroup_key: Batch entry ``[B]`` of group numbers for the worst-group curve, where batches have it.
        max_samples: Only the first samples of the split.
        every_n_epochs: Run in every n-th validation of a fit; a ModelCheckpoint that monitors a scalar needs the same.
        fit_batches: Batches that policies and values learn from (of each process, where a loader shares samples among
            them); all by default.
        block_size: Samples the policies run on at a time.
        num_draws: Draws a sample for ``reading="sample"``.
        seed: Seed of all draws.
        name: Stands in the log keys, so that several evaluations can work in one Trainer.

    Raises:
        ValueError: An option is unknown or out of range, or (in ``setup``) does not fit the model's concepts.
        TypeError: The LightningModule lacks a member of `interventions.Intervenable`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> evaluation = InterventionEvaluation(["rand", "ucp", "ectp"], unit="group")
        >>> trainer = Trainer(callbacks=[evaluation], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        policies: Sequence[Policy | str] = ("rand", "ucp"),
        unit: Unit | dict[str, list[str]] = "concept",
        stages: Sequence[Stage] = ("test",),
        scope: Scope = "single",
        group_reduce: Reduce = "mean",
        budgets: list[int | float] | None = None,
        values: InterventionValues | str = "own",
        label_level: LabelLevel = "instance",
        on_invisible: OnInvisible = "skip",
        competence: float | dict[str, float] | Literal["uniform"] = 1.0,
        unanswered: Unanswered = "skip",
        reading: Reading = "soft",
        costs: float | dict[str, float] = 1.0,
        num_seeds: int = 5,
        average: Average = "micro",
        task_metric: Metric | None = None,
        target: float | None = None,
        subgroup_key: str = "group",
        max_samples: int | None = None,
        every_n_epochs: int = 1,
        fit_batches: int | None = None,
        block_size: int = 1024,
        num_draws: int = 5,
        seed: int = 0,
        name: str = "intervention",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        positive = {"max_samples": max_samples, "fit_batches": fit_batches}
        for field, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        if isinstance(policies, str):
            raise ValueError(f"policies: expected a list of names, got the single text {policies!r}")
        self.policies = [Policy.make(policy) for policy in policies]
        check_labels(self.policies)
        self.values = InterventionValues.make(values)
        # all but the stages: a test takes up what the evaluation in a fit learned
        self._settings = {
            "name": name,
            "policies": [policy.label for policy in self.policies],
            "unit": str(unit),
            "scope": scope,
        }
        self.unit, self.group_reduce, self.costs = unit, group_reduce, costs
        self.max_samples, self.fit_batches = max_samples, fit_batches
        self.subgroup_key, self.target = subgroup_key, target
        self._engine_options = {
            "scope": scope,
            "reading": reading,
            "unanswered": unanswered,
            "num_draws": num_draws,
            "seed": seed,
        }
        self._person_options = {"label_level": label_level, "on_invisible": on_invisible, "competence": competence}
        self._study_options = {
            "budgets": budgets,
            "num_seeds": num_seeds,
            "average": average,
            "metric": task_metric,
            "block_size": block_size,
        }
        self.result: StudyResult | None = None
        self._studies: list[tuple[InterventionStudy, Positions]] = []
        self._restored = False
        self._fitted_at: int | None = None
        self._checkpoint_step: int | None = None

    @property
    def state_key(self) -> str:
        """Tells several evaluations of one Trainer apart."""
        return self._generate_state_key(**self._settings)

    def state_dict(self) -> dict[str, Any]:
        """What the value strategy learned, so that a test of the checkpoint need not predict the training split."""
        return {"values": self.values.state_dict(), "spec": self.values.spec(), "global_step": self._fitted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what the value strategy learned, unless another one is used now or the weights have trained since."""
        current = state_dict["global_step"] == self._checkpoint_step
        if state_dict["values"] and current and state_dict["spec"] == self.values.spec():
            self.values.load_state_dict(state_dict["values"])
            self._restored = True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note how far the weights have trained."""
        self._checkpoint_step = checkpoint.get("global_step")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check every option against the model, and the name against other evaluations, before anything runs."""
        self.refuse_namesakes(trainer)
        self._study(trainer, pl_module)

    def _study(self, trainer: Trainer, pl_module: LightningModule) -> InterventionStudy:
        """A fresh study."""
        model = cast(Any, pl_module)
        if missing := [name for name in ("concept_set", "num_classes", "read_batch") if not hasattr(model, name)]:
            raise TypeError(
                f"InterventionEvaluation needs a module whose concepts can be corrected, {type(model).__name__} has no "
                f"{missing}: use CBMModule, or give it num_classes, read_batch, a forward(batch) that returns a "
                "Prediction, and the members of `interventions.Intervenable`"
            )
        if self._person_options["label_level"] == "class" and getattr(model, "task", None) == "multilabel":
            raise ValueError("label_level: 'class' needs one class a sample, the labels of this model are several")
        concepts = model.concept_set
        units = Units.make(concepts, self.unit, self.group_reduce, self.costs).to(pl_module.device)
        for policy in self.policies:
            policy.build(units)
        if getattr(self.values, "concepts", None) != concepts:
            self.values.build(concepts)
        engine = InterventionEngine(model, units, self.values, **self._engine_options)  # type: ignore[arg-type]
        person = Person(concepts, **self._person_options)  # type: ignore[arg-type]
        return InterventionStudy(
            engine,
            person,
            self.policies,
            num_classes=model.num_classes,
            device=pl_module.device,
            **self._study_options,  # type: ignore[arg-type]
        )

    # ---------------------------------------------------------------- hooks

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Start afresh if this stage is wanted and it is this epoch's turn."""
        self._studies = []
        if self.wanted(trainer, pl_module, stage):
            self._begin(trainer, pl_module, loaders)

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Take the predictions of a batch; the policies run whenever a block is full."""
        if not self._studies:
            return
        module = cast(Any, pl_module)
        study, positions = self._studies[dataloader_idx]
        content = module.read_batch(batch)
        prediction = prediction_of(trainer, module, outputs, content)
        index, first = positions.take(len(prediction.logits))
        if self.max_samples is not None:
            first = first & (index < self.max_samples)
        if first.any():
            study.add(self._encode(pl_module, study, prediction, content, index, first))

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Log the curves."""
        studies, self._studies = self._studies, []
        for i, (study, _) in enumerate(studies):
            result = study.finish(gather_rows)
            self.result = result if i == 0 else self.result
            suffix = f"/dataloader_idx_{i}" if len(studies) > 1 else ""
            name = f"{stage}/{self.name}"
            scalars = {f"{name}/{key}{suffix}": value for key, value in result.scalars(self.target).items()}
            pl_module.log_dict(scalars, sync_dist=True, add_dataloader_idx=False)
            if trainer.is_global_zero:
                log_table(trainer, f"{name}/curves{suffix}", result.table())
                unit = "concept" if self.unit == "concept" else "group"
                log_figure(trainer, f"{name}/figure{suffix}", draw_curves(result, unit))
                if trainer.state.fn != "fit" and study.person.reliable:
                    scores = {p.label: result.accuracies(p.label).mean(0) for p in self.policies if not p.is_oracle}
                    if message := describe_fall(result.budgets, scores, result.samples, unit):
                        rank_zero_warn(f"{stage}: {message}", category=LeakageWarning)

    # ---------------------------------------------------------------- the work

    def _begin(self, trainer: Trainer, pl_module: LightningModule, loaders: Any) -> None:
        self._studies = [
            (self._study(trainer, pl_module), Positions(loader, trainer.world_size, trainer.global_rank))
            for loader in flatten(loaders)
        ]
        study = self._studies[0][0]
        if study.person.label_level == "class":
            majority = self._class_concepts(trainer, pl_module)
            for other, _ in self._studies:
                other.person.class_concepts = majority
        wanted = {policy.fits_on for policy in self.policies}
        # a resumed fit trains on, so what the checkpoint knows is stale in its first validation
        known = self._restored and trainer.state.fn != "fit"
        self._restored = False
        if self.values.needs_train and not known:
            wanted.add("train")
        for split in ("train", "val"):
            if split in wanted:
                study.fit(split, list(self._samples(trainer, pl_module, study, split)), gather_rows)
        if "train" in wanted:
            self._fitted_at = trainer.global_step

    def _samples(
        self, trainer: Trainer, pl_module: LightningModule, study: InterventionStudy, split: str
    ) -> Iterator[Samples]:
        lean = all(policy.fits_on != split for policy in self.policies)
        for prediction, batch, index in predictions(trainer, pl_module, split, self.fit_batches):
            samples = self._encode(pl_module, study, prediction, batch, index)
            if lean:
                # values learn from logits alone, and tokens of a whole split would fill the memory
                logits, concepts = samples.prediction
                slim = concepts.replace(features=Features(logits[:, :0]), maps=None, extras={})
                samples = replace(samples, prediction=Prediction(logits, slim))
            yield samples

    def _class_concepts(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        """``[L, K]`` what most training samples of each class have."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, ConceptDataModule):
            data.setup("fit")
            concepts, labels = data.annotations("train")
        else:
            rows = [
                (batch["concepts"], batch["label"])
                for batch, _ in batches(trainer, pl_module, "train", self.fit_batches)
            ]
            concepts, labels = (gather_rows(torch.cat(column)) for column in zip(*rows, strict=True))
        model = cast(Any, pl_module)
        return class_majority(concepts.float(), labels, int(model.num_classes), model.concept_set)

    def _encode(
        self,
        pl_module: LightningModule,
        study: InterventionStudy,
        prediction: Prediction,
        batch: Batch,
        index: Tensor,
        counted: Tensor | None = None,
    ) -> Samples:
        concepts, module = prediction.concepts.map(Tensor.detach), cast(Any, pl_module)
        logits = prediction.logits.detach()
        half = (torch.float16, torch.bfloat16)
        if pl_module.dtype == torch.float32 and any(x.dtype in half for x in [logits, *concepts.tensors()]):
            # mixed precision: scores are taken in single precision, from the head on
            concepts = concepts.float()
            logits = module.decide(concepts).logits
        if self.subgroup_key != "group":
            if self.subgroup_key not in batch:
                raise ValueError(f"subgroup_key: the batch has no {self.subgroup_key!r}, only {sorted(batch)}")
            batch = {**batch, "group": batch[self.subgroup_key]}
        return study.encode(Prediction(logits, concepts), batch, index, counted)
