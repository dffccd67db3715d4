"""Which value the head reads where a person corrected a concept."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from cbm_lightning.concepts import ConceptSet
from cbm_lightning.registry import Named
from cbm_lightning.types import ConceptOutput, Intervention


class CollapseWarning(UserWarning):
    """Correcting a concept changes nothing, because "absent" and "present" stand for the same value."""


class InterventionValues(Named, ABC, field="values"):
    """Turns what a person says, 0 or 1 or between, into what a bottleneck is told.

    Subclass it for a strategy of your own, with a ``name`` for YAML files.

    Attributes:
        name: Short name in YAML files.
        needs_train: Whether `fit` wants the concept logits of the training data.
        couples_groups: Whether what the model is told of a concept depends on other concepts, members of its
            categorical group or all that are corrected; set by `build`. Look-ahead then predicts anew for each concept.
    """

    needs_train: bool = False
    couples_groups: bool = False

    def build(self, concepts: ConceptSet) -> None:
        """Get to know the concepts; called once before anything else."""
        self.concepts = concepts

    def fit(self, logits: Tensor, concepts: Tensor) -> None:
        """Learn from training predictions: concept ``logits [N, K]`` and annotations ``[N, K]`` (NaN unknown)."""

    def state_dict(self) -> dict[str, Tensor]:
        """What `fit` learned."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `fit` learned."""

    @abstractmethod
    def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
        """What the bottleneck is told.

        Args:
            output: The prediction before any correction.
            told: ``[B, K]`` what the person says.
            mask: ``[B, K]`` bool, where.
        """


class OwnValues(InterventionValues):
    """The bottleneck's own scale: 0 and 1 for probabilities, percentiles of training predictions for scores.

    The percentiles are the ones that the bottleneck keeps in its checkpoint (Koh et al. 2020); an embedding bottleneck
    mixes its two vectors.
    """

    name = "own"

    def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
        """What the person says, as it is."""
        return Intervention(mask, told)


class BinaryValues(InterventionValues):
    """The bottleneck's own scale, what the person says rounded to 0 or 1; real-valued concepts stay as they are."""

    name = "binary"

    def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
        """The nearer of 0 and 1; NaN stays NaN, which takes a concept out."""
        kept = self.concepts.is_real().to(told.device) | told.isnan()
        return Intervention(mask, torch.where(kept, told, (told >= 0.5).to(told)))


class LogitValues(InterventionValues):
    """Base of strategies that say on the logit scale what "absent" and "present" are; linear in between.

    Attributes:
        logit_range: ``[2, K]``, absent and present; 0 and 1 for real-valued concepts, which stay as they are. None
            before `fit`, for strategies that need it.
    """

    logit_range: Tensor | None = None

    def build(self, concepts: ConceptSet) -> None:
        """Get to know the concepts."""
        super().build(concepts)
        self.couples_groups = bool(concepts.categorical_groups())

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Set ``logit_range`` from ``[K]`` bounds, and warn of concepts whose bounds meet."""
        bounds = torch.stack([low, high])
        real = self.concepts.is_real()
        bounds[:, real] = torch.tensor([[0.0], [1.0]]).to(bounds)
        self.logit_range = bounds
        if upside_down := [self.concepts.names[k] for k in (bounds[0] > bounds[1]).nonzero().flatten().tolist()]:
            warnings.warn(
                f"the {self.name} values for 'absent' lie above those for 'present' for {len(upside_down)} concepts, "
                f"{listed(upside_down)}: the model predicts them upside down, and correcting them moves its input the "
                "wrong way. Check their annotations, or choose values='constant'",
                CollapseWarning,
                stacklevel=2,
            )
        if dead := [self.concepts.names[k] for k in (bounds[0] == bounds[1]).nonzero().flatten().tolist()]:
            warn_of_collapse(dead, f"the {self.name} values")

    def state_dict(self) -> dict[str, Tensor]:
        """The range."""
        return {} if self.logit_range is None else {"logit_range": self.logit_range}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the range."""
        self.logit_range = state.get("logit_range")

    def correction(self, output: ConceptOutput, told: Tensor, mask: Tensor) -> Intervention:
        """The point between absent and present, on the logit scale; the predicted logit where nobody corrects."""
        if self.logit_range is None:
            raise RuntimeError(f"the {self.name} values were never fitted; call fit, or let InterventionEvaluation do")
        low, high = self.logit_range.to(output.logits)
        corrected = mask & ~told.isnan()
        return Intervention(mask, told, torch.where(corrected, low + (high - low) * told, output.logits))


class PercentileValues(LogitValues):
    """Percentiles of each concept's training predictions (Koh et al. 2020; "empirical percentile" in SCBM).

    Taken on the logit scale of the training data in evaluation mode, with linear interpolation; every link to the head
    is monotone, so they are also the percentiles of what the head reads, up to the interpolation.

    Args:
        quantiles: What "absent" and "present" stand for, in [0, 1].

    Raises:
        ValueError: The quantiles are not two increasing numbers in [0, 1].
    """

    name = "percentile"
    needs_train = True

    def __init__(self, quantiles: Sequence[float] = (0.05, 0.95)) -> None:
        self.quantiles = check_quantiles(quantiles)

    def fit(self, logits: Tensor, concepts: Tensor) -> None:
        """Take the percentiles over all samples."""
        self.set_range(*percentiles(logits, self.quantiles))


class ClassConditionalValues(LogitValues):
    """A low percentile among the training samples without a concept, a high one among those with it.

    As in Havasi et al. (NeurIPS 2022), without interpolation: element ``int(n q)`` of the sorted predictions. A concept
    that is always absent (or present) in training falls back to the percentile over all samples.

    Args:
        quantiles: Of the samples without, and of those with the concept; in [0, 1].

    Raises:
        ValueError: The quantiles are not two increasing numbers in [0, 1].
    """

    name = "class_conditional_percentile"
    needs_train = True

    def __init__(self, quantiles: Sequence[float] = (0.05, 0.95)) -> None:
        self.quantiles = check_quantiles(quantiles)

    def fit(self, logits: Tensor, concepts: Tensor) -> None:
        """Take the percentiles."""
        fallback = percentiles(logits, self.quantiles)
        self.set_range(
            *(
                conditional_percentile(logits, (concepts >= 0.5) == present, ~concepts.isnan(), q, fallback[present])
                for present, q in enumerate(self.quantiles)
            )
        )


class ConstantValues(LogitValues):
    """The same probability for all concepts ("simple percentile" in SCBM), or the same logit (-5 and 5 in cem).

    Args:
        low: Stands for "absent".
        high: Stands for "present".
        scale: Whether the two are a ``"probability"`` or a ``"logit"``.

    Raises:
        ValueError: ``low`` is not below ``high``, or a probability lies outside (0, 1).
    """

    name = "constant"

    def __init__(self, low: float = 0.05, high: float = 0.95, scale: str = "probability") -> None:
        if scale not in ("probability", "logit"):
            raise ValueError(f"scale: expected 'probability' or 'logit', got {scale!r}")
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"low, high: expected finite numbers, got {low} and {high}")
        if not low < high or (scale == "probability" and not (low > 0.0 and high < 1.0)):
            raise ValueError(f"low, high: expected low < high, probabilities inside (0, 1), got {low} and {high}")
        self.bounds = torch.tensor([low, high])
        self.bounds = self.bounds.logit() if scale == "probability" else self.bounds

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: the range follows from the arguments."""
        return {}

    def build(self, concepts: ConceptSet) -> None:
        """Make the range."""
        super().build(concepts)
        self.set_range(*self.bounds[:, None].repeat(1, len(concepts)))


def check_quantiles(quantiles: Sequence[float]) -> tuple[float, float]:
    """Two increasing numbers in [0, 1].

    Raises:
        ValueError: They are something else.
    """
    if not isinstance(quantiles, Sequence) or len(quantiles) != 2:
        raise ValueError(f"quantiles: expected two increasing numbers in [0, 1], got {quantiles!r}")
    if not 0.0 <= quantiles[0] < quantiles[1] <= 1.0:
        raise ValueError(f"quantiles: expected two increasing numbers in [0, 1], got {list(quantiles)}")
    return float(quantiles[0]), float(quantiles[1])


def percentiles(predictions: Tensor, quantiles: Sequence[float]) -> Tensor:
    """``[Q, K]`` quantiles of ``[N, K]`` predictions, concept by concept, with linear interpolation."""
    wanted = predictions.new_tensor(list(quantiles))
    # a column at a time: torch.quantile refuses more than 16 million elements
    return torch.stack([torch.quantile(column, wanted) for column in predictions.unbind(1)], 1)


def conditional_percentile(
    predictions: Tensor, selected: Tensor, known: Tensor, quantile: float, fallback: Tensor
) -> Tensor:
    """``[K]`` element ``int(n q)`` of each concept's sorted predictions among the selected, annotated samples.

    Args:
        predictions: ``[N, K]``.
        selected: ``[N, K]`` bool.
        known: ``[N, K]`` bool.
        quantile: In [0, 1].
        fallback: ``[K]``, for concepts of which no sample is selected.
    """
    chosen = selected & known
    count = chosen.sum(0)
    ascending = predictions.masked_fill(~chosen, torch.inf).sort(0).values
    # in double precision, like the official int(n * q)
    place = (
        (count.cpu().double() * quantile)
        .long()
        .to(count.device)
        .clamp(max=len(predictions) - 1)
        .minimum((count - 1).clamp(min=0))
    )
    found = ascending.gather(0, place.unsqueeze(0))[0]
    return torch.where(count > 0, found, fallback)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def warn_of_collapse(names: Sequence[str], owner: str) -> None:
    """Warn that correcting concepts changes nothing."""
    warnings.warn(
        f"{owner} for 'absent' and 'present' meet for {len(names)} concepts, {listed(names)}: correcting them changes "
        "nothing. The model predicts the same score for every training sample; retrain it, or choose values='constant'",
        CollapseWarning,
        stacklevel=2,
    )
