"""`PredictionTable`: what the model predicts and why, logged after validation and test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from cbm_lightning.backbones.base import ImageStats
from cbm_lightning.callbacks.evaluation import EvaluationCallback, Stage
from cbm_lightning.callbacks.loggers import log_figure, log_table, to_bytes
from cbm_lightning.callbacks.prediction_figure import draw_predictions
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.modes import evaluating
from cbm_lightning.types import Batch

if TYPE_CHECKING:
    import pandas as pd


class Explains(Protocol):
    """What `PredictionTable` needs of a LightningModule.

    ``class_names`` (a list or None) and ``backbone.image_stats()`` are used where they exist.

    Attributes:
        concept_set: The concepts by name.
    """

    concept_set: ConceptSet

    def read_batch(self, batch: Any) -> Batch:
        """A dict with ``image``, ``label`` and ``concepts``, as far as the batch has them."""

    def explain(self, batch: Any, top_k: int) -> pd.DataFrame:
        """Rows as `explanation.explain_prediction` gives them."""


class PredictionTable(EvaluationCallback):
    """Logs a table and a picture of explained predictions after validation and test.

    The table ``val/prediction_table`` (``test/...``) has a row a sample and concept: its predicted value, its
    annotation, whether the two agree, and its contribution to the logit of the predicted class. The picture
    ``val/prediction_figure`` shows the same beside the inputs. Both go to every logger of the Trainer, or to files
    where it takes numbers only, see `loggers`. The samples are the first ones of the first loader (and process).
    Modes and random states stay as they were.

    Args:
        max_samples: Samples shown.
        top_k: Concepts a sample, those that weigh most.
        every_n_epochs: Log after validation in every n-th training epoch; a test is always logged.

    Raises:
        ValueError: An argument is below 1.
        TypeError: The LightningModule cannot explain its predictions.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[PredictionTable(max_samples=6, every_n_epochs=5)], accelerator="cpu")
    """

    def __init__(self, max_samples: int = 12, top_k: int = 5, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        for name, value in {"max_samples": max_samples, "top_k": top_k}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.max_samples = max_samples
        self.top_k = top_k
        self._tables: list[pd.DataFrame] = []
        self._images: list[Tensor] = []
        self._samples = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the module can explain its predictions."""
        needed = ("concept_set", "read_batch", "explain")
        if missing := [name for name in needed if not hasattr(pl_module, name)]:
            raise TypeError(
                f"PredictionTable needs a module that explains itself, {type(pl_module).__name__} has no {missing}: "
                "use CBMModule, or give it the members of `callbacks.prediction_table.Explains`"
            )

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Forget the samples of a run that was interrupted."""
        self._clear()

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Explain a batch if samples are missing."""
        wanted = self.max_samples - self._samples
        if wanted <= 0 or dataloader_idx > 0 or not trainer.is_global_zero:
            return
        module = cast(Explains, pl_module)
        with isolate_rng(), evaluating(pl_module):
            table = module.explain(batch, self.top_k)
        table = table[table["sample"] < wanted]
        content = module.read_batch(batch)
        table = annotate(table, content, module.concept_set, getattr(pl_module, "class_names", None))
        self._tables.append(table.assign(sample=table["sample"] + self._samples))
        self._samples += table["sample"].nunique()
        image = content.get("image")
        if isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] in (1, 3):
            image_stats = getattr(getattr(pl_module, "backbone", None), "image_stats", None)
            stats = image_stats() if image_stats else None
            self._images.extend(to_bytes(displayable(image[:wanted], stats)).cpu())

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Log the predictions."""
        if self._tables:
            import pandas as pd

            table = pd.concat(self._tables, ignore_index=True)
            images = self._images if len(self._images) == self._samples else None
            log_table(trainer, f"{stage}/prediction_table", table)
            log_figure(trainer, f"{stage}/prediction_figure", draw_predictions(table, images))
        self._clear()

    def _clear(self) -> None:
        self._tables, self._images, self._samples = [], [], 0


def annotate(
    table: pd.DataFrame, batch: Batch, concepts: ConceptSet, class_names: list[str] | None = None
) -> pd.DataFrame:
    """Add what the batch knows to a table of explanations.

    Args:
        table: What ``explain`` returned for the batch.
        batch: With ``label [B]`` if it is known.
        concepts: The concepts of the table.
        class_names: Names of the classes in label order.

    Returns:
        The table with the column ``true`` (the class; None where unknown) after ``predicted``, and ``concept_right``
        (1 or 0; NaN without annotation, and for real-valued concepts) before ``contribution``.
    """
    truth: list[Any] = [None] * (int(table["sample"].max()) + 1)
    if (label := batch.get("label")) is not None:
        found = [int(value) for value in label[: len(truth)].reshape(-1).tolist()]
        truth = found if class_names is None else [class_names[value] for value in found]
    real = {name for name, kind in zip(concepts.names, concepts.kinds, strict=True) if kind == "real"}
    right = [
        float("nan") if annotation != annotation or name in real else float((probability >= 0.5) == (annotation >= 0.5))
        for name, probability, annotation in zip(
            table["concept"],
            table["concept_probability"],
            table.get("annotation", [float("nan")] * len(table)),
            strict=True,
        )
    ]
    annotated = table.assign(true=[truth[i] for i in table["sample"]], concept_right=right)
    others = [name for name in table.columns if name not in ("sample", "predicted", "contribution")]
    return annotated[["sample", "predicted", "true", *others, "concept_right", "contribution"]]


def displayable(image: Tensor, stats: ImageStats | None = None) -> Tensor:
    """A batch of images as ``[B, 3, H, W]`` in [0, 1] (uint8 stays), whatever the model reads.

    Args:
        image: ``[B, 1, H, W]`` or ``[B, 3, H, W]``: bytes, floats in [0, 1], or normalised floats.
        stats: How they were normalised. Without it normalised images are stretched to [0, 1], each on its own. Images
            that lie in [0, 1] were not normalised, whatever the backbone wants.
    """
    colour = image.expand(-1, 3, -1, -1)
    if image.dtype == torch.uint8:
        return colour
    colour = colour.float()
    if colour.min() >= 0.0 and colour.max() <= 1.0:
        return colour
    if stats is not None and len(stats.mean) == 3:
        mean, std = (colour.new_tensor(values)[:, None, None] for values in stats)
        return (colour * std + mean).clamp(0, 1)
    low, high = (bound(colour, dim=(1, 2, 3), keepdim=True) for bound in (torch.amin, torch.amax))
    return (colour - low) / (high - low).clamp(min=1e-12)
