"""`LeakageReport`: does more than the concepts leak through the bottleneck? In numbers and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.loggers import log_table
from cbm_lightning.callbacks.passes import Positions, flatten, gather_rows, prediction_of, predictions
from cbm_lightning.data import ConceptDataModule
from cbm_lightning.labels import label_outcomes
from cbm_lightning.metrics.leakage.evidence import (
    Evidence,
    Reads,
    Splits,
    cross_splits,
    given_splits,
    representation,
    subsample,
)
from cbm_lightning.metrics.leakage.probes import label_correct
from cbm_lightning.metrics.leakage.study import DEFAULT, MEASURES, LeakageResult, Measure, Sightings, measure_leakage
from cbm_lightning.types import Batch, Intervention, Prediction, ValueLayout

Rows = dict[str, Tensor]


class LeakageReport(NamedEvaluation):
    """Measures whether predicted concepts carry more than the concepts they are named after, and says so in words.

    It collects what the head reads of each concept, the annotations and the label, and compares them at the end. Logged
    are ``{val,test}/leakage/{ctl, conditional_mi, conditional_mi_share, head_gap, head_on_truth_acc, ceiling_gap, ois,
    nis, completeness, ...}``, the errors of most as ``..._error``, the table ``.../leakage/concepts`` (a row a concept)
    and the findings as the table ``.../leakage/findings``, which are printed too: whether the label accuracy lies above
    what the true concepts allow (by a probe, and exactly in a test whose datamodule knows it), how much label
    information the predicted concepts carry beyond the true ones, which of them leak most, and what to do about it.
    Where nothing exceeds its uncertainty, the report says that nothing was found. The numbers are the same on any
    number of processes.

    Args:
        measures: Any of ``"ctl"`` (what each concept says of the label, by nearest neighbours), ``"icl"`` (what
            concepts say of each other, the same way; slow), ``"conditional_mi"`` (label information given the true
            concepts, by probes: the one to rely on), ``"head_on_truth"`` (the accuracy on true concepts), ``"ois"`` and
            ``"nis"`` (impurity of concepts), ``"completeness"``. By default all but ``"icl"``.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        reads: What represents a concept: its numbers in what the head reads, or its ``"logits"`` or ``"probs"``.
        fit_on: What probes are fitted on: the evaluated split itself by folds (``"folds"``), or the validation split
            (``"val"``), which is predicted for it.
        max_samples: So many samples of each split at most, drawn by ``seed``; leakage by nearest neighbours can be
            compared at equal numbers only.
        folds: Of the evaluated split.
        repeats: Folds and probes are drawn so often; impurities take the first.
        every_n_epochs: Run in every n-th validation of a fit.
        seed: Of all draws.
        name: Stands in the log keys, so that several reports can work in one Trainer.

    Attributes:
        result: The latest `LeakageResult`, None before the first.

    Raises:
        ValueError: An option is unknown or out of range; in ``setup``, the model finds concepts of its own, which have
            no annotations; in evaluation, batches have none.
        TypeError: In ``setup``, the LightningModule lacks what is needed; the message names it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[LeakageReport(["conditional_mi", "head_on_truth"])], accelerator="cpu",
        ...                   logger=False)
    """

    def __init__(
        self,
        measures: Sequence[Measure] = DEFAULT,
        stages: Sequence[Stage] = ("test",),
        reads: Reads = "values",
        fit_on: Literal["folds", "val"] = "folds",
        max_samples: int = 2000,
        folds: int = 5,
        repeats: int = 2,
        every_n_epochs: int = 1,
        seed: int = 0,
        name: str = "leakage",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        if isinstance(measures, str) or not measures or set(measures) - set(MEASURES):
            raise ValueError(f"measures: expected a list of {list(MEASURES)}, got {measures!r}")
        if reads not in get_args(Reads):
            raise ValueError(f"reads: expected one of {list(get_args(Reads))}, got {reads!r}")
        if fit_on not in ("folds", "val"):
            raise ValueError(f"fit_on: expected 'folds' or 'val', got {fit_on!r}")
        if fit_on == "val" and "val" in stages:
            raise ValueError("fit_on: probes fitted on the validation split cannot be judged on it; use 'folds'")
        for field, value, least in (("max_samples", max_samples, 50), ("folds", folds, 3), ("repeats", repeats, 2)):
            if value < least:
                raise ValueError(f"{field}: expected at least {least}, got {value}")
        self.measures: list[Measure] = [measure for measure in MEASURES if measure in measures]
        self.reads, self.fit_on = reads, fit_on
        self.max_samples, self.folds, self.repeats, self.seed = max_samples, folds, repeats, seed
        self.result: LeakageResult | None = None
        self._kept: list[tuple[list[Rows], Positions]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the model, and the name against other reports, before anything runs."""
        self.refuse_namesakes(trainer)
        needed = ["concept_set", "num_classes", "task", "read_batch"]
        needed += ["intervene"] if "head_on_truth" in self.measures else []
        if missing := [name for name in needed if not hasattr(pl_module, name)]:
            without = "; without 'intervene', leave 'head_on_truth' out of measures" if "intervene" in missing else ""
            raise TypeError(
                f"LeakageReport needs a concept bottleneck model, {type(pl_module).__name__} has no {missing}: use "
                f"CBMModule, or give it concept_set, num_classes, task, read_batch and a forward that returns a "
                f"Prediction{without}"
            )
        if getattr(getattr(pl_module, "bottleneck", None), "discovers", False):
            raise ValueError(
                f"LeakageReport compares predicted concepts with annotated ones, and "
                f"{type(cast(Any, pl_module).bottleneck).__name__} finds concepts of its own, which nobody annotated; "
                "remove the callback"
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Start afresh if this stage is wanted and it is this epoch's turn."""
        self._kept = []
        if self.wanted(trainer, pl_module, stage):
            world, rank = trainer.world_size, trainer.global_rank
            self._kept = [([], Positions(loader, world, rank)) for loader in flatten(loaders)]

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Keep what is measured of a batch."""
        if not self._kept:
            return
        kept, positions = self._kept[dataloader_idx]
        content = cast(Any, pl_module).read_batch(batch)
        prediction = prediction_of(trainer, cast(Any, pl_module), outputs, content)
        index, first = positions.take(len(prediction.logits))
        rows = self._rows(trainer, pl_module, prediction, content, index)
        kept.append({name: value[first.to(value.device)].cpu() for name, value in rows.items()})

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Measure, log and print."""
        kept, self._kept = self._kept, []
        fitted_on = None
        for i, (rows, _) in enumerate(kept):
            if not rows:
                continue
            if self.fit_on == "val" and fitted_on is None:
                fitted_on = self._validation(trainer, pl_module)
            suffix = f"/dataloader_idx_{i}" if len(kept) > 1 else ""
            result = self._measured(trainer, pl_module, stage, rows, fitted_on)
            if result is None:
                continue
            self.result = result if i == 0 else self.result
            name = f"{stage}/{self.name}"
            scalars = {f"{name}/{key}{suffix}": value for key, value in result.scalars().items() if value == value}
            # all processes have the same numbers; without sync_dist Lightning would warn that they may not
            pl_module.log_dict(scalars, sync_dist=True, add_dataloader_idx=False)
            if trainer.is_global_zero:
                import pandas as pd

                log_table(trainer, f"{name}/concepts{suffix}", result.table())
                log_table(trainer, f"{name}/findings{suffix}", pd.DataFrame({"finding": result.sentences}))
            rank_zero_info(f"{type(self).__name__}: {' '.join(result.sentences)}")

    # ---------------------------------------------------------------- the work

    def _rows(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Prediction, batch: Batch, index: Tensor
    ) -> Rows:
        """What is kept of a batch, by name."""
        module = cast(Any, pl_module)
        output = prediction.concepts
        if "concepts" not in batch:
            raise ValueError(
                "LeakageReport compares predicted concepts with annotated ones, and the batches have no 'concepts'"
            )
        concepts, label = batch["concepts"].float(), batch["label"]
        if concepts.shape != output.logits.shape:
            raise ValueError(
                f"LeakageReport: expected annotations {list(output.logits.shape)} of the concepts that the model "
                f"predicts, got {list(concepts.shape)}"
            )
        values, extra = representation(output, self._layout(module, prediction), self.reads)
        outcomes = label_outcomes(label, module.task)
        rows = {"index": index, "values": values, "concepts": concepts, "label": label.detach()}
        rows["correct"] = label_correct(prediction.logits.detach(), outcomes, module.task)
        if extra is not None:
            rows["extra"] = extra
        if "head_on_truth" in self.measures:
            known = ~concepts.isnan()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                told = module.intervene(prediction, Intervention(known, concepts))
            rows["correct_on_truth"] = label_correct(told.logits.detach(), outcomes, module.task)
        if "completeness" in self.measures:
            rows["features"] = output.features.pooled.detach().float()
        return {name: value.to(concepts.device) for name, value in rows.items()}

    @staticmethod
    def _layout(module: Any, prediction: Prediction) -> ValueLayout:
        """How the values are laid out; without a word of the bottleneck, the same width for each concept."""
        found: ValueLayout | None = getattr(getattr(module, "bottleneck", None), "layout", None)
        count = len(module.concept_set)
        return found or ValueLayout(count, prediction.concepts.values.shape[-1] // count)

    def _validation(self, trainer: Trainer, pl_module: LightningModule) -> list[Rows]:
        found = predictions(trainer, pl_module, "val")
        return [{name: value.cpu() for name, value in self._rows(trainer, pl_module, *each).items()} for each in found]

    def _measured(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, rows: list[Rows], fitted_on: list[Rows] | None
    ) -> LeakageResult | None:
        # probes are trained, which inference mode would not allow
        with torch.inference_mode(False):
            return self._measure(trainer, pl_module, stage, rows, fitted_on)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, rows: list[Rows], fitted_on: list[Rows] | None
    ) -> LeakageResult | None:
        module = cast(Any, pl_module)
        parts = [self._drawn(rows, pl_module.device)]
        parts += [] if fitted_on is None else [self._drawn(fitted_on, pl_module.device)]
        sightings = self._sightings(module, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})
        judged = len(parts[0]["index"])
        try:
            splits = self._splits(judged, len(sightings.evidence))
        except ValueError as error:
            if trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"LeakageReport is left out of this validation: {error}")
            return None
        data = getattr(trainer, "datamodule", None)
        # it is that of the test split, whose concepts may say less of the label than those of validation
        known = stage == "test" and isinstance(data, ConceptDataModule)
        best = cast(ConceptDataModule, data).bayes_accuracy() if known else None
        return measure_leakage(sightings, splits, module.concept_set.names, self.measures, self.seed, best)

    def _drawn(self, rows: list[Rows], device: torch.device) -> Rows:
        """The samples of all processes in the order of the split, or a draw of them."""
        gathered = {name: gather_rows(torch.cat([row[name] for row in rows]).to(device)).cpu() for name in rows[0]}
        order = gathered["index"].argsort()[subsample(len(gathered["index"]), self.max_samples, self.seed)]
        return {name: value[order] for name, value in gathered.items()}

    def _sightings(self, module: Any, rows: Rows) -> Sightings:
        real = module.concept_set.is_real()
        evidence = Evidence(
            rows["values"],
            rows["concepts"],
            rows["label"],
            module.task,
            int(module.num_classes),
            rows.get("extra"),
            real,
        )
        return Sightings(evidence, rows["correct"], rows.get("correct_on_truth"), rows.get("features"))

    def _splits(self, judged: int, samples: int) -> Splits:
        if self.fit_on == "folds":
            return cross_splits(judged, self.folds, self.repeats, self.seed)
        return given_splits(torch.arange(samples) >= judged, self.repeats, self.seed)
