"""`ConceptSaliency`: where each concept looks, as pictures, and whether that is the right place, as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.loggers import log_figure, log_table, to_bytes
from cbm_lightning.callbacks.passes import Positions, flatten, gather_rows, predict, rows_of
from cbm_lightning.callbacks.prediction_table import displayable
from cbm_lightning.callbacks.saliency_figure import Panel, draw_saliency
from cbm_lightning.callbacks.saliency_panels import panels
from cbm_lightning.data import ConceptDataModule
from cbm_lightning.saliency import SaliencyMethod
from cbm_lightning.saliency.co_occurrence import CoOccurrence, cooccurrence
from cbm_lightning.saliency.maps import attribute
from cbm_lightning.saliency.study import Counted, SaliencyResult, SaliencyStudy
from cbm_lightning.types import Batch, Prediction


class ConceptSaliency(NamedEvaluation):
    """Logs concept maps of some samples as a picture, and how well maps are placed as numbers.

    The picture ``{val,test}/saliency/figure`` has a row a sample: the image with its class, and for each shown concept
    the map over the image, the concept's name, probability and truth, and the outline of its mask. Where the batches
    know where concepts are (``concept_masks [B,K,H,W]``, ``concept_boxes [B,K,4]`` as ``x0, y0, x1, y1``, or
    ``concept_points [B,K,2]``), it logs the scalars ``.../saliency/METRIC`` (mean over concepts) with
    ``.../saliency/METRIC_chance`` beside each, and the table ``.../saliency/concepts``. The table
    ``.../saliency/co_occurrence`` names the concepts that no map can tell apart, because the (training) data never
    separates them. Pictures and tables go to every logger, or to files, see `loggers`.

    The samples are the first of the first loader, the same on any number of processes; pictures are of the first
    process. Modes, gradients and random states stay as they were.

    Args:
        method: A saliency method or its short name: ``auto`` (exact maps where the model has them, else Grad-CAM),
            ``exact``, ``activation_mapping``, ``grad_cam``, ``gradient``, ``input_x_gradient``,
            ``integrated_gradients``, ``smooth_grad``, ``occlusion``, ``attention_rollout``.
        concepts: Which concepts the picture shows: the names, or how many of those that weigh most in each prediction.
        metrics: Short names, or short name to options, see `saliency.SaliencyStudy`; the default fits the batches.
        max_samples: Samples that are measured, which bounds the cost.
        max_images: Samples in the picture, of those that are measured; 0 draws none.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        counted: Measure maps where the concept is ``"present"``, or where it is also ``"predicted"``.
        images_at_once: Images whose maps are in memory at a time.
        every_n_epochs: Run in every n-th validation of a fit; a ModelCheckpoint that monitors a scalar needs the same.
        name: Stands in the log keys, so that several methods can be compared in one Trainer.

    Attributes:
        result: The latest `SaliencyResult`, None before the first.
        co_occurrence: What the data never separates, None before the first evaluation.

    Raises:
        ValueError: An option is out of range, or a concept or metric does not exist; in the first batch (that of the
            check before training), the batch lacks what a metric needs, or the model what the method needs.
        TypeError: The LightningModule has not the members that saliency needs.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ConceptSaliency("grad_cam", max_samples=32)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        method: str | SaliencyMethod = "auto",
        concepts: int | Sequence[str] = 5,
        metrics: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None = None,
        max_samples: int = 64,
        max_images: int = 6,
        stages: Sequence[Stage] = ("val", "test"),
        counted: Counted = "present",
        images_at_once: int = 16,
        every_n_epochs: int = 1,
        name: str = "saliency",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        if isinstance(concepts, str):
            raise ValueError(f"concepts: expected a list of names or a number, got {concepts!r}")
        shown = concepts if isinstance(concepts, int) else len(concepts)
        given = {"concepts": shown, "max_samples": max_samples, "images_at_once": images_at_once}
        for field, value in given.items():
            if value < 1:
                raise ValueError(f"{field}: expected at least 1, got {value}")
        if max_images < 0:
            raise ValueError(f"max_images: expected at least 0, got {max_images}")
        self.method = SaliencyMethod.make(method)
        self.concepts = concepts if isinstance(concepts, int) else list(concepts)
        self.metrics, self.counted = metrics, counted
        self.max_samples, self.max_images, self.images_at_once = max_samples, max_images, images_at_once
        self.result: SaliencyResult | None = None
        self.co_occurrence: CoOccurrence | None = None
        self._study: SaliencyStudy | None = None
        self._positions: Positions | None = None
        self._is_news = False
        self._rows: list[tuple[Tensor, list[Panel]]] = []
        self._annotations: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check every option against the model, and the name against other evaluations, before anything runs."""
        self.refuse_namesakes(trainer)
        self._new_study(pl_module)
        if not hasattr(pl_module, "read_batch"):
            raise TypeError(
                f"{type(pl_module).__name__} has no read_batch, which makes a dict with the image of a batch: use "
                "CBMModule, or give it that method beside the members of `saliency.Localisable`"
            )
        self.co_occurrence = None

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Start a study if this stage is wanted and it is this epoch's turn."""
        self._study, self._rows, self._annotations = None, [], []
        if stage not in self.stages or not (self.due(trainer) or trainer.sanity_checking):
            return
        self._positions = Positions(flatten(loaders)[0], trainer.world_size, trainer.global_rank)
        self._study = self._new_study(pl_module)
        if self.co_occurrence is None and not trainer.sanity_checking:
            found = training_annotations(getattr(trainer, "datamodule", None))
            if found is not None:
                self._report(pl_module, *found)

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Measure and show the samples of a batch that are wanted."""
        if self._study is None or self._positions is None or dataloader_idx > 0:
            return
        module = cast(Any, pl_module)
        content = module.read_batch(batch)
        size = len(next(value for value in content.values() if isinstance(value, Tensor)))
        positions, first = self._positions.take(size)
        if self.co_occurrence is None and "concepts" in content:
            self._annotations.append(_with_label(content)[first])
        # the check before training is to fail where the evaluation would, not to cost as much
        most = 1 if trainer.sanity_checking else self.max_samples
        wanted = slice(0, int((first & (positions < most)).sum()))
        if wanted.stop == 0:
            return
        content = {name: rows_of(value, size, wanted) for name, value in content.items()}
        # metrics that were updated in inference mode could not be reset outside it
        with isolate_rng(), torch.inference_mode(False), torch.no_grad():
            prediction = predict(trainer, module, content)
            self._study.update(content, prediction)
            if trainer.sanity_checking:
                # whatever the first image shows, a method that does not suit the model is to fail now
                none = torch.zeros(1, dtype=torch.int64, device=pl_module.device)
                attribute(self._study.subject, content["image"][:1], self.method, none, none)
            elif trainer.is_global_zero:
                self._show(pl_module, content, prediction)

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Log numbers, tables and picture."""
        study, self._study = self._study, None
        if study is None:
            return
        if self.co_occurrence is None:
            none = torch.zeros(0, len(study.subject.concepts) + 1, device=pl_module.device)
            if len(rows := gather_rows(torch.cat([none, *self._annotations]))):
                self._report(pl_module, rows[:, :-1], rows[:, -1])
        with torch.inference_mode(False), torch.no_grad():
            self.result = result = study.compute()
        key = f"{stage}/{self.name}"
        scalars = {f"{key}/{name}": value.to(pl_module.device) for name, value in result.scalars().items()}
        # all processes have the same numbers; without sync_dist Lightning would warn that they may not
        pl_module.log_dict(scalars, sync_dist=True)
        if trainer.is_global_zero:
            if result.values:
                log_table(trainer, f"{key}/metrics", result.table())
                log_table(trainer, f"{key}/concepts", self._with_partners(result))
            if self.co_occurrence is not None and self._is_news:
                log_table(trainer, f"{key}/co_occurrence", self.co_occurrence.table())
                self._is_news = False
            if self._rows:
                log_figure(trainer, f"{key}/figure", draw_saliency(self._rows))
        self._rows, self._annotations = [], []

    def _new_study(self, pl_module: LightningModule) -> SaliencyStudy:
        with torch.inference_mode(False):
            study = SaliencyStudy(
                cast(Any, pl_module), self.method, self.metrics, None, self.counted, self.images_at_once
            )
        if not isinstance(self.concepts, int):
            study.subject.find(self.concepts)
        return study

    def _show(self, pl_module: LightningModule, content: Batch, prediction: Prediction) -> None:
        """Add a row of panels for each image, as far as some are missing."""
        missing = slice(0, self.max_images - len(self._rows))
        size = len(content["image"])
        if self._study is None or missing.stop <= 0 or content["image"].shape[1] not in (1, 3):
            return
        image_stats = getattr(getattr(pl_module, "backbone", None), "image_stats", None)
        images = displayable(content["image"][missing], image_stats() if image_stats else None)
        some = {name: rows_of(value, size, missing) for name, value in content.items()}
        found = panels(self._study.subject, self.method, some, prediction, self.concepts)
        self._rows.extend(zip(to_bytes(images).cpu(), found, strict=True))

    def _report(self, pl_module: LightningModule, concepts: Tensor, labels: Tensor) -> None:
        """Say once which concepts the data never separates."""
        classes = None if labels.ndim > 1 or bool(labels.isnan().any()) else labels.long()
        self.co_occurrence = cooccurrence(concepts.float(), cast(Any, pl_module).concept_set, classes)
        self._is_news = True
        for sentence in self.co_occurrence.sentences(limit=5):
            rank_zero_info(f"{type(self).__name__}: {sentence}")

    def _with_partners(self, result: SaliencyResult) -> Any:
        table = result.concept_table()
        if self.co_occurrence is None:
            return table
        partners = self.co_occurrence.table().set_index("concept")["inseparable_from"]
        return table.assign(inseparable_from=table["concept"].map(partners))


def training_annotations(data: Any) -> tuple[Tensor, Tensor] | None:
    """``[N, K]`` concepts and labels of the training split from a datamodule that knows them, else None."""
    if not isinstance(data, ConceptDataModule):
        return None
    for ready in (True, False):
        # a test alone has not set up the training split, and drawing it would be in vain where nobody asks for it
        with suppress(KeyError, ValueError):
            if not ready:
                data.setup("fit")
            return data.annotations("train")
    return None


def _with_label(batch: Batch) -> Tensor:
    """``[B, K + 1]`` annotations and the class, NaN where there is none or several."""
    concepts = batch["concepts"].float()
    label = batch.get("label")
    if label is None or label.numel() != len(concepts):
        label = torch.full_like(concepts[:, 0], torch.nan)
    return torch.cat([concepts, label.reshape(-1, 1).float()], dim=1)
