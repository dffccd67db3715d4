"""`SparsityEvaluation`: how many concepts a class needs, and which."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.loggers import log_figure, log_html, log_table
from cbm_lightning.callbacks.passes import Positions, flatten, prediction_of, predictions
from cbm_lightning.callbacks.sparsity_figure import draw_nec_curves
from cbm_lightning.head_solver import solver_device
from cbm_lightning.sparsity.report import as_html, kept_concepts
from cbm_lightning.sparsity.study import LEVELS, NECResult, NECStudy, Scores
from cbm_lightning.types import Prediction


class SparsityEvaluation(NamedEvaluation):
    """Label accuracy at numbers of effective concepts (NEC), in validation or test (VLG-CBM, Srivastava et al. 2024).

    Before the evaluation it predicts the training split once and fits sparse heads on what the model's head reads: an
    elastic-net path, the model's own head pruned by magnitude, and a path on random directions of the features, each
    also with the kept weights fitted anew. Then it judges all of them on the evaluated split. Logged are the scalars
    ``{val,test}/sparsity/{nec,density,active_concepts,max_per_class,empty_classes}`` of the model's own head,
    ``.../sparsity/HEAD/{anec,acc_at_nec5,...}``, the tables ``.../sparsity/accuracy`` and
    ``.../sparsity/kept_concepts`` (as a page of HTML ``.../sparsity/kept_concepts_page``), and the figure
    ``.../sparsity/figure``. In a fit, training data that allow no head (one class only, say) are warned of, and the
    evaluation is left out.

    Args:
        levels: Numbers of effective concepts; those above the number of concepts become that number. The kept concepts
            are shown for the lowest.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        solver: Options of `ElasticNetPath`, such as ``{"alpha": 0.99, "tol": 1e-5}``.
        refit_ridge: Ridge with which kept weights are fitted anew; None leaves these heads out.
        random_concepts: Fit heads on random concepts too.
        fit_batches: Training batches to fit on (of each process, where a loader shares samples among them); all by
            default.
        every_n_epochs: Run in every n-th validation of a fit; a ModelCheckpoint that monitors a scalar needs the same.
        seed: Of the random concepts.
        name: Stands in the log keys, so that several evaluations can work in one Trainer.

    Attributes:
        result: The latest `NECResult`, None before the first.

    Raises:
        ValueError: An option is out of range; in ``setup``, the solver does not know an option.
        TypeError: The LightningModule is no concept bottleneck model.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[SparsityEvaluation([5, 10])], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        levels: Sequence[float] = LEVELS,
        stages: Sequence[Stage] = ("test",),
        solver: dict[str, Any] | None = None,
        refit_ridge: float | None = 1e-3,
        random_concepts: bool = True,
        fit_batches: int | None = None,
        every_n_epochs: int = 1,
        seed: int = 0,
        name: str = "sparsity",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        if fit_batches is not None and fit_batches < 1:
            raise ValueError(f"fit_batches: expected at least 1, got {fit_batches}")
        if not levels or min(levels) <= 0:
            raise ValueError(f"levels: expected positive numbers of effective concepts, got {list(levels)}")
        if refit_ridge is not None and not refit_ridge > 0:
            raise ValueError(f"refit_ridge: expected a positive number or None, got {refit_ridge}")
        if own := {"nec", "lambdas", "group_size", "refit_ridge"} & set(solver or {}):
            raise ValueError(f"solver: {sorted(own)} follow from levels, refit_ridge and the model")
        self.levels, self.solver = list(levels), dict(solver or {})
        self.refit_ridge, self.random_concepts = refit_ridge, random_concepts
        self.fit_batches, self.seed = fit_batches, seed
        self.result: NECResult | None = None
        self._studies: list[tuple[NECStudy, Positions]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check every option against the model, and the name against other evaluations, before anything runs."""
        self.refuse_namesakes(trainer)
        self._study(trainer, pl_module).check()

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Fit the heads if this stage is wanted and it is this epoch's turn."""
        self._studies = []
        if not self.wanted(trainer, pl_module, stage):
            return
        try:
            fitted = self._fitted(trainer, pl_module)
        except ValueError as error:
            if trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"SparsityEvaluation is left out of this validation: {error}")
            return
        self._studies = [
            (fitted if i == 0 else fitted.copy(), Positions(loader, trainer.world_size, trainer.global_rank))
            for i, loader in enumerate(flatten(loaders))
        ]

    def _fitted(self, trainer: Trainer, pl_module: LightningModule) -> NECStudy:
        """A study whose heads are fitted to the training split."""
        with torch.inference_mode(False), torch.no_grad():
            fitted = self._study(trainer, pl_module)
            head, layout = cast(Any, pl_module).head, cast(Any, pl_module).bottleneck.layout
            # a head that reads more than concepts is none that few concepts could replace
            own = None if layout.extra else head.linear_map()
            fitted.fit(self._training_scores(trainer, pl_module), own)
        return fitted

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Judge the heads on a batch."""
        if not self._studies:
            return
        module = cast(Any, pl_module)
        study, positions = self._studies[dataloader_idx]
        content = module.read_batch(batch)
        prediction = prediction_of(trainer, module, outputs, content)
        _, first = positions.take(len(prediction.logits))
        columns = study.num_concepts * study.group_size
        study.add(scores_of(prediction, content["label"], columns, first.to(prediction.logits.device)))

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Log numbers, tables and figure."""
        studies, self._studies = self._studies, []
        module = cast(Any, pl_module)
        for i, (study, _) in enumerate(studies):
            result = study.finish()
            self.result = result if i == 0 else self.result
            suffix = f"/dataloader_idx_{i}" if len(studies) > 1 else ""
            name = f"{stage}/{self.name}"
            scalars = {f"{name}/{key}{suffix}": value for key, value in result.scalars().items()}
            pl_module.log_dict(scalars, sync_dist=True, add_dataloader_idx=False)
            if trainer.is_global_zero:
                log_table(trainer, f"{name}/accuracy{suffix}", result.table())
                log_figure(trainer, f"{name}/figure{suffix}", draw_nec_curves(result))
                classes = getattr(module, "class_names", None) or [str(c) for c in range(module.num_classes)]
                # the one logit of a binary label speaks for its second class
                rows = classes if module.task != "binary" else classes[-1:]
                kept = kept_concepts(result.kept, list(module.concept_set.names), rows)
                log_table(trainer, f"{name}/kept_concepts{suffix}", kept)
                title = f"{result.levels[0]:g} concepts a class"
                log_html(trainer, f"{name}/kept_concepts_page{suffix}", as_html(kept, title))

    def _study(self, trainer: Trainer, pl_module: LightningModule) -> NECStudy:
        """A fresh study."""
        module = cast(Any, pl_module)
        head: Any = getattr(module, "head", None)
        layout: Any = getattr(getattr(module, "bottleneck", None), "layout", None)
        needed = {name: getattr(module, name, None) for name in ("concept_set", "task", "read_batch")}
        needed |= {"bottleneck": layout, "head": getattr(head, "num_outputs", None)}
        if missing := [name for name, part in needed.items() if part is None]:
            raise TypeError(
                f"SparsityEvaluation needs a concept bottleneck model, {type(module).__name__} has no {missing} of the "
                "kind that it reads: use CBMModule, or `sparsity.NECStudy` on scores of your own"
            )
        own = {"distributed": trainer.world_size > 1, "device": solver_device(pl_module.device)}
        return NECStudy(
            len(module.concept_set),
            head.num_outputs,
            module.task,
            self.levels,
            layout.width,
            {**own, **self.solver},
            self.refit_ridge,
            self.random_concepts,
            self.seed,
            [name for name in module.concept_set.names for _ in range(layout.width)],
        )

    def _training_scores(self, trainer: Trainer, pl_module: LightningModule) -> Scores:
        layout = cast(Any, pl_module).bottleneck.layout
        columns = layout.concepts * layout.width
        # closed at once, for a pass that is left open keeps gradients switched off
        with closing(predictions(trainer, pl_module, "train", self.fit_batches)) as batches:
            rows = [scores_of(prediction, batch["label"], columns) for prediction, batch, _ in batches]
        values, pooled, label = (torch.cat([getattr(row, f) for row in rows]) for f in ("values", "pooled", "label"))
        return Scores(values, pooled, label)


def scores_of(prediction: Prediction, label: Tensor, columns: int, rows: Tensor | None = None) -> Scores:
    """What heads are fitted and judged on, of some rows of a prediction; the first columns are those of concepts.

    Raises:
        ValueError: The values have an axis of samples or time, over which no linear head reads.
    """
    output = prediction.concepts
    if output.values.ndim != 2:
        raise ValueError(
            f"SparsityEvaluation: expected values [B, V] of one sample and time step, got {list(output.values.shape)}"
        )
    parts = (output.values[:, :columns], output.features.pooled, label)
    values, pooled, label = (part.detach() if rows is None else part.detach()[rows] for part in parts)
    return Scores(values.float(), pooled.float(), label)
