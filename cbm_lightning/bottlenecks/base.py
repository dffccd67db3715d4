"""The contract of a bottleneck: `Features` become a `ConceptOutput`, and a person can correct it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.configurable import Part
from cbm_lightning.heads import LabelHead, LinearHead
from cbm_lightning.labels import Task
from cbm_lightning.types import Batch, ConceptOutput, FeatureDims, Features, Intervention, LossContext, ValueLayout


class Bottleneck(Part):
    """Predicts concepts from features and lays out what the label head reads.

    A method implements `build`, `forward` and `intervene`; everything else has a default.

    Args:
        randint: Probability with which a concept is corrected to its annotation during training (RandInt,
            Espinosa Zarlenga et al. 2022, section 4). The concept loss always sees the prediction.
        randint_scope: Draw the corrected concepts anew for each ``"sample"`` (the paper), or once for the whole
            ``"batch"`` (the official code).

    Attributes:
        concepts: The concept set, known after `build`.
        layout: How ``values`` is laid out, known after `build`.
        task: What the label is; the module sets it before `build`.
        needs_concepts: Whether training needs annotated concepts in the batch.
        needs_label: Whether it learns from the label's gradient, so that no phase may train it without.
        needs_annotations: Whether `fit_annotations` must see the training annotations before training.
        discovers: Whether it finds concepts of its own. Annotations in batches are of other concepts then, and are set
            aside; ``concepts`` of the module says how many to find.
        owns_label: Whether it predicts the label itself, as ``label_logits``. It goes with a `PassThroughHead`.
        statistics_size: How many of the latest training predictions `fit_statistics` wants; 0 for none.
        generator: In a training step, what is drawn in `forward` is drawn from it (it lives on the CPU); None in
            evaluation, where a prediction must not depend on the other samples of the batch.

    Raises:
        ValueError: ``randint`` lies outside [0, 1], or the scope is unknown.
    """

    concepts: ConceptSet
    layout: ValueLayout
    task: Task = "multiclass"
    needs_concepts: bool = True
    needs_label: bool = False
    needs_annotations: bool = False
    discovers: bool = False
    owns_label: bool = False
    statistics_size: int = 0
    generator: torch.Generator | None = None

    def __init__(self, *, randint: float = 0.0, randint_scope: Literal["sample", "batch"] = "sample") -> None:
        super().__init__()
        if not 0.0 <= randint <= 1.0:
            raise ValueError(f"randint: expected a probability in [0, 1], got {randint}")
        if randint_scope not in ("sample", "batch"):
            raise ValueError(f"randint_scope: expected 'sample' or 'batch', got {randint_scope!r}")
        self.randint = randint
        self.randint_scope = randint_scope

    @abstractmethod
    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        """Make the parameters; called once by the module, which knows every size. Sets ``concepts`` and ``layout``."""

    @abstractmethod
    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        """Predict concepts.

        Args:
            features: What the backbone saw.
            concepts: ``[B, K]`` annotations in training, for methods with teacher forcing; None otherwise.
        """

    @abstractmethod
    def intervene(self, output: ConceptOutput, intervention: Intervention) -> ConceptOutput:
        """Redo the output with corrected concepts. Reads ``output.features``; never runs the backbone."""

    @contextmanager
    def drawing(self, generator: torch.Generator) -> Iterator[None]:
        """A training step inside the block: draws come from ``generator``."""
        self.generator = generator
        try:
            yield
        finally:
            self.generator = None

    def default_head(self) -> LabelHead:
        """The head that goes with the method where the user names none."""
        return LinearHead()

    def directions(self, output: ConceptOutput) -> Tensor | None:
        """The line along which a correction moves the numbers of a concept, for fast look-ahead.

        Returns:
            ``[B, K, m]`` (``[1, K, m]`` if all samples share it) of any length, or None, the default, unless correcting
            a concept changes its own numbers only, along this line, whatever the value, and `refine` is the identity.
        """
        return None

    def concept_maps(self, output: ConceptOutput) -> Tensor | None:
        """Where each concept score comes from, exactly and without another pass.

        Returns:
            ``[B, K, h, w]``, or None where there is no such thing. By default the ``maps`` that the bottleneck computed
            with. For a score that is linear in the mean of the tokens, what each cell adds to it: the mean over cells
            is the score without what depends on no place (a bias).

        Raises:
            ValueError: There would be such maps, but not with these features; the message says why.
        """
        return output.maps

    def query_scores(self, output: ConceptOutput, mask: Tensor) -> Tensor | None:
        """``[B, U]`` raw scores of a learned policy: which unit (group) to ask about next, or None without one.

        Args:
            output: The output with the corrections so far.
            mask: ``[B, K]`` bool, the corrections so far.
        """
        return None

    def losses(self, output: ConceptOutput, batch: Batch, context: LossContext) -> dict[str, Tensor]:
        """Unweighted losses by name, on the un-intervened output. By default the supervised concept loss.

        A loss called ``label`` takes the place of the module's. Losses that exist in training steps alone, where
        ``generator`` is not None, are fine.
        """
        return {"concept": context.concept_loss(output.logits, batch["concepts"])}

    def training_mask(self, concepts: Tensor, generator: torch.Generator) -> Tensor | None:
        """``[B, K]`` bool, which concepts to correct in a training step (RandInt), or None for none.

        A bottleneck whose values are samples may return ``[S, B, K]``, another mask a sample, if its `intervene` takes
        one.
        """
        if self.randint == 0.0:
            return None
        rows = len(concepts) if self.randint_scope == "sample" else 1
        draw = torch.rand(rows, concepts.shape[1], generator=generator)
        return (draw < self.randint).to(concepts.device).expand(concepts.shape)

    def fit_annotations(self, concepts: Tensor) -> None:
        """Initialise from ``[N, K]`` training annotations (NaN where unknown), before the optimizer exists."""

    def fit_statistics(self, logits: Tensor, probs: Tensor) -> None:
        """Set buffers from the latest training predictions, ``logits [n, K]`` and ``probs [n, K]``.

        Write into them in place (``buffer.copy_(...)``): it may be called in inference mode.
        """

    def refine(self, output: ConceptOutput, head: torch.nn.Module, intervention: Intervention | None) -> ConceptOutput:
        """Improve an output in evaluation by optimisation, given head and corrections; identity by default."""
        return output

    def on_progress(self, fraction: float) -> None:
        """Told before each training step how much of the training is done, in [0, 1]; for temperatures.

        What is set here belongs in a buffer, so that a restored model has it too.
        """

    def constrain(self) -> None:
        """Project parameters after an optimizer step; for non-negative weights and the like."""

    def diagnostics(self, output: ConceptOutput) -> dict[str, Tensor]:
        """Scalars worth logging in evaluation, by name."""
        return {}
