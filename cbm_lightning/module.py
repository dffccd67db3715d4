"""`CBMModule`: backbone, bottleneck and head as one LightningModule."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from cbm_lightning.backbones import Backbone, create_backbone
from cbm_lightning.batches import as_float, check_batch, check_task
from cbm_lightning.bottlenecks import Bottleneck, LinearBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.data_facts import DataFacts
from cbm_lightning.explanation import answers, explain_prediction
from cbm_lightning.heads import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.losses import ConceptLoss, label_loss
from cbm_lightning.modes import evaluating
from cbm_lightning.optimization import ClassSpec, check_positive, check_weights
from cbm_lightning.phases import Phase
from cbm_lightning.preflight import check_discovery, check_head, check_loss_names
from cbm_lightning.randomness import step_generator
from cbm_lightning.reporting import EvaluationMetrics, RunningMeans, training_metrics
from cbm_lightning.training import PhasedTraining
from cbm_lightning.types import Batch, ConceptOutput, Features, Intervention, LossContext, Prediction, masked_mean

if TYPE_CHECKING:
    import pandas as pd

ConceptSource = int | str | list[str] | dict[str, Any] | ConceptSet


class CBMModule(PhasedTraining):
    """A concept bottleneck model: predicts concepts from an input and the label from the concepts alone.

    Widths and counts are never typed: the feature width comes from the backbone, the number of concepts from the
    concept set, the number of classes from the data. Override `read_batch` for batches of your own, `encode`, `losses`
    or `label_loss` for a model of your own.

    Args:
        backbone: ``"timm/NAME"``, ``"open_clip/NAME"``, ``"identity"``, a configured backbone or any ``nn.Module``.
        bottleneck: From features to concepts; `LinearBottleneck` by default.
        head: From concepts to classes; by default the bottleneck's own, `LinearHead` for most.
        data: A datamodule with ``concept_set`` and ``num_classes`` (linked by the CLI), for what is not given here.
        concepts: A concept set, names, a file, or their number.
        num_classes: Number of classes ``L``.
        class_names: Names of the classes in label order.
        task: ``"multiclass"`` (one of L), ``"binary"`` (yes or no, one logit) or ``"multilabel"`` (any of L).
        phases: ``"joint"``, ``"sequential"``, ``"independent"``, or a list of phases.
        concept_loss: The supervised concept loss; the mean cross-entropy by default.
        loss_weights: Factor a named loss; 1 where not given.
        label_smoothing: In [0, 1).
        lr: Learning rate.
        lr_multipliers: Factor on ``lr`` a part: ``backbone``, ``bottleneck``, ``head``.
        weight_decay: Weight decay.
        optimizer: Name in ``torch.optim``, class path, or ``{"class_path": ..., "init_args": {...}}``.
        lr_scheduler: The same for ``torch.optim.lr_scheduler``; starts anew in each phase.
        monitor: Logged value that a ReduceLROnPlateau scheduler follows.
        seed: Seed of the draws in training (RandInt), apart from the global one.

    Raises:
        ValueError: The number of concepts or classes is unknown, or an argument is out of range.

    Example:
        >>> model = CBMModule("timm/test_resnet.r160_in1k", concepts=["red", "round"], num_classes=3)
        >>> model(torch.randn(4, 3, 64, 64)).logits.shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        backbone: str | Backbone | nn.Module,
        bottleneck: Bottleneck | None = None,
        head: LabelHead | None = None,
        data: LightningDataModule | None = None,
        concepts: ConceptSource | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        task: Task = "multiclass",
        phases: str | list[Phase] = "joint",
        concept_loss: ConceptLoss | None = None,
        loss_weights: dict[str, float] | None = None,
        label_smoothing: float = 0.0,
        lr: float = 1e-3,
        lr_multipliers: dict[str, float] | None = None,
        weight_decay: float = 0.0,
        optimizer: ClassSpec = "AdamW",
        lr_scheduler: ClassSpec | None = None,
        monitor: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        facts = DataFacts.gather(data, concepts, num_classes, class_names)
        check_positive(lr=lr)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        self.concept_set, self.num_classes, self.class_names = facts.concepts, facts.num_classes, facts.class_names
        self.task: Task = task
        check_task(task, self.num_classes)
        self.label_smoothing = label_smoothing
        self.loss_weights = check_weights("loss_weights", loss_weights)
        self.seed = seed

        self.backbone = create_backbone(backbone)
        self.backbone.build(facts.feature_dim)
        self.bottleneck = LinearBottleneck() if bottleneck is None else bottleneck
        check_discovery(self.bottleneck, concepts)
        self.bottleneck.task = task
        self.bottleneck.build(self.backbone.dims, self.concept_set, self.num_classes)
        self.head = self.bottleneck.default_head() if head is None else head
        check_head(self.bottleneck, self.head)
        self.head.introduce(self.concept_set, facts.classes)
        self.head.build(self.backbone.dims, self.bottleneck.layout, self.num_classes, task)
        self.concept_loss = ConceptLoss() if concept_loss is None else concept_loss
        self.concept_loss.build(self.concept_set)
        self.train_means = RunningMeans()
        self.val_scores = EvaluationMetrics(self.concept_set, self.num_classes, task)
        self.test_scores = EvaluationMetrics(self.concept_set, self.num_classes, task)
        self.configure_training(phases, lr, lr_multipliers, weight_decay, optimizer, lr_scheduler, monitor)
        self.record_hparams(facts)

    # ---------------------------------------------------------------- prediction

    def encode(self, batch: Batch) -> Features:
        """Features of a batch: by the backbone, or as they are if the batch brings ``embedding`` or ``tokens``."""
        if "embedding" not in batch and "tokens" not in batch:
            features: Features = self.backbone(batch["image"])
            return features
        tokens, mask = batch.get("tokens"), batch.get("token_mask")
        pooled: Tensor = batch["embedding"] if "embedding" in batch else masked_mean(batch["tokens"], mask)
        if pooled.shape[-1] != self.backbone.dims.pooled:
            raise ValueError(
                f"the batch brings features of width {pooled.shape[-1]}, the backbone makes {self.backbone.dims.pooled}"
            )
        grid = self.backbone.dims.grid
        whole = tokens is not None and grid is not None and tokens.shape[1] == prod(grid)
        return Features(pooled, tokens, mask, grid if whole else None)

    def forward(self, x: Tensor | Batch) -> Prediction:
        """Predict concepts and label of an input tensor or a batch."""
        return self.decide(self.bottleneck(self.encode({"image": x} if isinstance(x, Tensor) else x)))

    def decide(self, output: ConceptOutput, intervention: Intervention | None = None) -> Prediction:
        """Predict the label from concepts, after the bottleneck's own optimisation if it has one."""
        if not self.training:
            output = self.bottleneck.refine(output, self.head, intervention)
        return Prediction(self.head(output), output)

    def intervene(self, prediction: Prediction, corrections: Intervention | Mapping[str, float | Tensor]) -> Prediction:
        """Redo a prediction with corrected concepts, without running the backbone.

        Args:
            prediction: What `forward` returned.
            corrections: Concept name to the true value (a number or ``[B]``; NaN takes the concept out), or an
                `Intervention` for corrections that differ between samples.

        Raises:
            ValueError: A concept is unknown; the message lists near matches.
        """
        output = prediction.concepts
        if not isinstance(corrections, Intervention):
            mask = torch.zeros_like(output.probs, dtype=torch.bool)
            values = output.probs.detach().clone()
            for name, value in corrections.items():
                k = self.concept_set.index(name)
                mask[:, k] = True
                values[:, k] = torch.as_tensor(value, dtype=values.dtype, device=values.device)
            corrections = Intervention(mask, values)
        return self.decide(self.bottleneck.intervene(output, corrections), corrections)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Class probabilities ``[B, L]`` (``[B, 1]`` for a binary label)."""
        return logits.softmax(-1) if self.task == "multiclass" else logits.sigmoid()

    def explain(self, batch: Any, top_k: int = 5) -> pd.DataFrame:
        """A table of the concepts that decided each prediction, see `explanation.explain_prediction`."""
        with evaluating(self), torch.inference_mode():
            content = self.transfer_batch_to_device(self.read_batch(batch), self.device, 0)
            return explain_prediction(self, self(content), content, top_k)

    # ---------------------------------------------------------------- steps

    def checked(self, batch: Any, batch_idx: int) -> Batch:
        """Read a batch and check it: the first of each epoch, and all of them where that synchronises no device."""
        content = as_float(self.read_batch(batch))
        if batch_idx == 0 or self.device.type == "cpu":
            needs_concepts = self.bottleneck.needs_concepts or self.phase.head_input == "true"
            check_batch(content, self.concept_set, self.num_classes, self.task, needs_concepts)
        return content

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One training step of the current phase; where a solver only reads the batch, a loss that moves nothing."""
        content = self.checked(batch, batch_idx)
        if self._solver is not None:
            with torch.no_grad():
                output = self.bottleneck(self.encode(content), content.get("concepts"))
                reads = self.head_reads(output, content) if self.phase.head_input == "true" else output
                self._solver.take(reads, content["label"], batch_idx)
            return torch.zeros((), device=self.device, requires_grad=True)
        for part in (self.bottleneck, self.head):
            part.on_progress(self.progress())
        with self.bottleneck.drawing(self.step_draws(1)):
            output = self.bottleneck(self.encode(content), content.get("concepts"))
            logits = self.head(self.head_reads(output, content))
            total, parts = self.losses(logits, output, content)
        self.log("train/loss", total.detach(), prog_bar=True, batch_size=len(logits))
        scores = training_metrics(
            output.probs, logits, content, self.task, self.label_matters, ~self.concept_loss.activation.real
        )
        self.train_means.update({**parts, **scores}, len(logits))
        self.keep_statistics(output)
        return total

    def on_train_epoch_start(self) -> None:
        """Enter the epoch; means of an epoch that was interrupted are forgotten."""
        super().on_train_epoch_start()
        self.train_means.finish()

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch: one call of the logger, where one a step and value would cost milliseconds."""
        super().on_train_epoch_end()
        self.log_dict({f"train/{k}": v for k, v in self.train_means.finish().items()}, sync_dist=True)

    def head_reads(self, output: ConceptOutput, batch: Batch) -> ConceptOutput:
        """What the head reads in training: predictions, partly corrected ones (RandInt), or annotations."""
        if (concepts := batch.get("concepts")) is not None:
            known = ~concepts.isnan()
            drawn = self.bottleneck.training_mask(concepts, self.step_draws())
            mask = known if self.phase.head_input == "true" else None if drawn is None else drawn & known
            output = output if mask is None else self.bottleneck.intervene(output, Intervention(mask, concepts))
        return output.detach() if self.phase.head_input == "detached" else output

    def step_draws(self, *stream: int) -> torch.Generator:
        """Random numbers of this training step and process: RandInt's, or those of another stream."""
        return step_generator(self.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank, *stream)

    def losses(self, logits: Tensor, output: ConceptOutput, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total and the unweighted parts by log name (``loss_label``, ``loss_concept``, ...)."""
        parts: dict[str, Tensor] = {}
        if self.label_matters:
            parts["label"] = self.label_loss(logits, batch["label"])
        context = LossContext(self.concept_loss, self.label_loss, self.head, logits)
        parts |= self.bottleneck.losses(output, batch, context)
        parts |= self.head.losses()
        weights = self.weights_of(parts)
        check_loss_names(self.phase, self.loss_weights, weights, self.training)
        total = torch.stack([weights[name] * loss for name, loss in parts.items() if weights[name]]).sum()
        return total, {f"loss_{name}": loss.detach() for name, loss in parts.items() if weights[name]}

    def label_loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of ``[B, L]`` class logits; override it for a label loss of your own."""
        return label_loss(logits, label, self.task, self.label_smoothing)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Prediction]:
        """Predict and score one validation batch; callbacks read the ``prediction``."""
        return {"prediction": self.evaluate(batch, batch_idx, self.val_scores)}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Prediction]:
        """Predict and score one test batch; callbacks read the ``prediction``."""
        return {"prediction": self.evaluate(batch, batch_idx, self.test_scores)}

    def evaluate(self, batch: Any, batch_idx: int, scores: EvaluationMetrics) -> Prediction:
        """Predict a batch and count it in the scores of a stage."""
        if batch_idx == 0:
            scores.reset()  # an earlier evaluation may have been interrupted
        content = self.checked(batch, batch_idx)
        prediction = self.forward(content)
        logits, output = prediction
        total, parts = self.losses(logits, output, content)
        means = {"loss": total, **parts, **self.bottleneck.diagnostics(output), **self.head.diagnostics(output)}
        scores.update(means, output.probs, logits, content, self.label_matters)
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        for name, value in self.val_scores.finish().items():
            self.log(f"val/{name}", value, prog_bar=name in ("label_acc", "concept_acc"), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self.log_dict({f"test/{k}": v for k, v in self.test_scores.finish().items()}, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Labels, probabilities, concepts, their contributions and uncertainty, see `explanation.answers`."""
        content = self.read_batch(batch)
        return answers(self, self(content), content)
