"""`ConceptConditionals`: which concepts make up a class, and which go together, as a model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cbm_lightning.callbacks.conditionals_figure import draw_conditionals
from cbm_lightning.callbacks.evaluation import NamedEvaluation, Stage
from cbm_lightning.callbacks.loggers import log_figure, log_table
from cbm_lightning.callbacks.passes import Positions, flatten, gather_rows, prediction_of
from cbm_lightning.concepts import ConceptSet

if TYPE_CHECKING:
    import pandas as pd


class KnowsConditionals(Protocol):
    """What `ConceptConditionals` needs of a bottleneck.

    Attributes:
        concepts: The concepts by name.
    """

    concepts: ConceptSet

    def concepts_given_label(self, concepts: Tensor) -> Tensor:
        """``[L, K]`` ``p(c_k | y)``, in sums over the concept vectors that ``[N, K]`` predictions contain."""

    def concepts_given_label_and_concept(self, concepts: Tensor, label: int) -> Tensor:
        """``[K, K]`` ``p(c_k | y, c_j)`` with ``c_j`` in rows; NaN where ``c_j`` never holds."""


class ConceptConditionals(NamedEvaluation):
    """Logs ``p(c_k | y)`` of every class and ``p(c_k | y, c_j)`` of one, for bottlenecks that know them.

    The predicted concepts of the evaluated split say which concept vectors there are. Logged are the tables
    ``{val,test}/conditionals/given_label`` (a row a class and concept, beside the share among the annotated samples of
    the class) and ``.../given_label_and_concept`` (a row a pair of concepts), both as heat maps in ``.../figure``, and
    the scalar ``.../error``, the mean absolute difference between probability and share. Of several loaders, the first
    counts.

    Args:
        label: Name or number of the class whose pairs of concepts are shown.
        stages: Where to run: ``"val"``, ``"test"`` or both.
        every_n_epochs: Run in every n-th validation of a fit.
        name: Stands in the log keys, so that several of them (for several classes) can work in one Trainer.

    Attributes:
        given_label: ``[L, K]`` of the latest evaluation, None before the first.
        given_label_and_concept: ``[K, K]`` of the latest evaluation, None before the first.

    Raises:
        ValueError: An option is out of range; in ``setup``, there is no such class, or labels are not classes that
            exclude each other.
        TypeError: In ``setup``, the bottleneck knows no conditional probabilities.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[ConceptConditionals(label=2)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        label: int | str = 0,
        stages: Sequence[Stage] = ("test",),
        every_n_epochs: int = 1,
        name: str = "conditionals",
    ) -> None:
        super().__init__(stages, name, every_n_epochs)
        self.label = label
        self.given_label: Tensor | None = None
        self.given_label_and_concept: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._positions: Positions | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that the model knows what is asked for."""
        self.refuse_namesakes(trainer)
        bottleneck = getattr(pl_module, "bottleneck", None)
        needed = ("concepts", "concepts_given_label", "concepts_given_label_and_concept")
        if missing := [name for name in needed if not hasattr(bottleneck, name)]:
            raise TypeError(
                f"ConceptConditionals: {type(bottleneck).__name__} has no {missing}, so it knows no probabilities of "
                "concepts given a class: use a bottleneck that models concepts and label jointly, or give it the "
                "members of `callbacks.concept_conditionals.KnowsConditionals`"
            )
        if getattr(pl_module, "task", "multiclass") == "multilabel":
            raise ValueError("ConceptConditionals: expected classes that exclude each other, got a multilabel task")
        self._class_of(pl_module)

    def begin(self, trainer: Trainer, pl_module: LightningModule, stage: Stage, loaders: Any) -> None:
        """Forget an evaluation that was interrupted."""
        self._rows, self._positions = [], None
        if self.wanted(trainer, pl_module, stage):
            self._positions = Positions(flatten(loaders)[0], trainer.world_size, trainer.global_rank)

    def take(
        self, trainer: Trainer, pl_module: LightningModule, stage: Stage, outputs: Any, batch: Any, dataloader_idx: int
    ) -> None:
        """Keep the predicted concepts of a batch, and what is known of it."""
        if self._positions is None or dataloader_idx > 0:
            return
        module = cast(Any, pl_module)
        content = module.read_batch(batch)
        probs = prediction_of(trainer, module, outputs, content).concepts.probs.detach().float()
        _, first = self._positions.take(len(probs))
        truth = content.get("concepts")
        truth = torch.full_like(probs, torch.nan) if truth is None else truth.to(probs)
        counted = first.to(probs.device)
        self._rows.append((probs[counted], truth[counted], content["label"].view(len(probs))[counted]))

    def finish(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        """Compute and log; a collective call when there are several processes."""
        if self._positions is None or not self._rows:
            return
        rows, self._rows, self._positions = self._rows, [], None
        probs, truth, labels = (gather_rows(torch.cat(column)) for column in zip(*rows, strict=True))
        bottleneck = cast(KnowsConditionals, pl_module.bottleneck)
        label = self._class_of(pl_module)
        with torch.no_grad():
            self.given_label = bottleneck.concepts_given_label(probs).cpu()
            self.given_label_and_concept = bottleneck.concepts_given_label_and_concept(probs, label).cpu()
        share = annotated_share(truth, labels, len(self.given_label)).cpu()
        prefix = f"{stage}/{self.name}"
        error = (self.given_label - share).abs().nanmean()
        pl_module.log(f"{prefix}/error", error, sync_dist=trainer.world_size > 1)
        if trainer.is_global_zero:
            classes, names = self._class_names(pl_module), list(bottleneck.concepts.names)
            log_table(trainer, f"{prefix}/given_label", class_table(self.given_label, share, classes, names))
            pairs = self.given_label_and_concept
            log_table(trainer, f"{prefix}/given_label_and_concept", pair_table(pairs, classes[label], names))
            log_figure(trainer, f"{prefix}/figure", draw_conditionals(self.given_label, pairs, classes, names, label))

    def _class_names(self, pl_module: LightningModule) -> list[str]:
        module = cast(Any, pl_module)
        return getattr(module, "class_names", None) or [str(y) for y in range(module.num_classes)]

    def _class_of(self, pl_module: LightningModule) -> int:
        names = self._class_names(pl_module)
        if isinstance(self.label, str) and self.label in names:
            return names.index(self.label)
        if isinstance(self.label, int) and 0 <= self.label < len(names):
            return self.label
        raise ValueError(f"label: expected a class from 0 to {len(names) - 1} or its name, got {self.label!r}")


def annotated_share(concepts: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``[L, K]`` mean annotation of each concept among the samples of a class, NaN where there is none.

    Args:
        concepts: ``[N, K]`` annotations, NaN where unknown.
        labels: ``[N]`` classes.
        classes: ``L``.

    Example:
        >>> annotated_share(torch.tensor([[1.0], [0.0], [float("nan")]]), torch.tensor([0, 0, 1]), 2)
        tensor([[0.5000],
                [   nan]])
    """
    known = (~concepts.isnan()).to(concepts)
    member = torch.nn.functional.one_hot(labels.long(), classes).to(concepts)
    return (member.T @ concepts.nan_to_num(nan=0.0)) / (member.T @ known)


def class_table(given_label: Tensor, share: Tensor, classes: list[str], concepts: list[str]) -> pd.DataFrame:
    """A row a class and concept: ``class``, ``concept``, ``probability`` and ``annotated``."""
    import pandas as pd

    cells = [(y, k) for y in range(len(classes)) for k in range(len(concepts))]
    return pd.DataFrame(
        {
            "class": [classes[y] for y, _ in cells],
            "concept": [concepts[k] for _, k in cells],
            "probability": given_label.flatten().tolist(),
            "annotated": share.flatten().tolist(),
        }
    )


def pair_table(pairs: Tensor, label: str, concepts: list[str]) -> pd.DataFrame:
    """A row a pair of concepts: ``class``, ``given`` concept, ``concept`` and its ``probability``."""
    import pandas as pd

    cells = [(j, k) for j in range(len(concepts)) for k in range(len(concepts))]
    return pd.DataFrame(
        {
            "class": [label] * len(cells),
            "given": [concepts[j] for j, _ in cells],
            "concept": [concepts[k] for _, k in cells],
            "probability": pairs.flatten().tolist(),
        }
    )
