"""What can be measured of concept maps, by short name: each metric, and what it reads of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from cbm_lightning.metrics.concept_existence import ConceptExistence
from cbm_lightning.metrics.concept_importance import ConceptGlobalImportance
from cbm_lightning.metrics.concept_location import ConceptLocation
from cbm_lightning.metrics.faithfulness import (
    AverageDrop,
    AverageGain,
    AverageIncrease,
    DeletionAUC,
    InsertionAUC,
    RandomisationSimilarity,
)
from cbm_lightning.metrics.localisation import (
    EnergyInMask,
    HalfMaxIoU,
    KeypointDistance,
    MassIoU,
    PixelAUROC,
    PixelAveragePrecision,
    PointingGame,
    RankAccuracy,
    TopKIntersection,
)
from cbm_lightning.registry import find

# what a metric may need, and where it comes from
NEEDS = {
    "masks": "concept_masks or concept_boxes in the batch",
    "points": "concept_points in the batch",
    "annotations": "annotated concepts in the batch",
    "labels": "labels in the batch",
    "classes": "one predicted class an image",
    "importance": "a head with exact contributions, and one predicted class an image",
    "values": "a bottleneck with one number a concept",
    "weight": "a linear head over one number a concept, a row a class",
}


class Seen(NamedTuple):
    """Maps of pairs of an image and a concept, and all that is known of them.

    Attributes:
        score: The model, images to concept logits.
        image: ``[B, C, H, W]``.
        maps: ``[P, H, W]`` in the size of the image.
        rows: ``[P]`` which image.
        concepts: ``[P]`` which concept.
        masks: ``[P, H, W]`` bool, or None.
        points: ``[P, 2]``, or None.
        again: Makes the maps of the same pairs once more, with the bottleneck randomised.
        annotations: ``[B, K]`` of the concepts, NaN where not known, or None.
        labels: ``[B]`` true classes, or None.
        probs: ``[B, K]`` predicted concepts.
        values: ``[B, K]`` what the head reads of each concept where that is one number, or None.
        classes: ``[B]`` predicted classes, None for several labels.
        importance: ``[B, K]`` what each concept adds to the logit of the predicted class, None where the head is not
            additive.
        weight: ``[L, K]`` of the head where a concept is one number, else None.
    """

    score: Callable[[Tensor], Tensor]
    image: Tensor
    maps: Tensor
    rows: Tensor
    concepts: Tensor
    masks: Tensor | None
    points: Tensor | None
    again: Callable[[], Tensor]
    annotations: Tensor | None
    labels: Tensor | None
    probs: Tensor
    values: Tensor | None
    classes: Tensor | None
    importance: Tensor | None
    weight: Tensor | None


class Measure(NamedTuple):
    """A metric by name.

    Attributes:
        make: ``make(num_concepts, num_classes, **options)`` makes the metric.
        update: Feeds it.
        needs: What it reads beside maps and model, of `NEEDS`.
    """

    make: Callable[..., Metric]
    update: Callable[[Any, Seen], None]
    needs: tuple[str, ...] = ()


def by_mask(metric: Metric, seen: Seen) -> None:
    """Maps against masks."""
    metric.update(seen.maps, seen.masks, seen.concepts)


def by_point(metric: Metric, seen: Seen) -> None:
    """Maps against points."""
    metric.update(seen.maps, seen.points, seen.concepts)


def by_model(metric: Metric, seen: Seen) -> None:
    """Maps against what the model does without the pixels they name."""
    metric.update(seen.score, seen.image, seen.maps, seen.rows, seen.concepts)


def by_randomisation(metric: Metric, seen: Seen) -> None:
    """Maps against those of a random bottleneck."""
    metric.update(seen.maps, seen.again(), seen.concepts)


def by_location(metric: Metric, seen: Seen) -> None:
    """Maps of the most important concepts against their points."""
    assert isinstance(metric, ConceptLocation)
    assert seen.points is not None
    assert seen.importance is not None
    assert seen.annotations is not None
    pairs = (seen.rows, seen.concepts)
    importance, present = seen.importance[pairs], seen.annotations[pairs]
    varied = seen.maps.flatten(1).amax(1) > seen.maps.flatten(1).amin(1)
    usable = (varied & (present >= 0.5) & ~seen.points.isnan().any(1)).nonzero()[:, 0]
    # the most important first within each image; maps of the others need not be laid out
    order = usable[importance[usable].argsort(descending=True, stable=True)]
    order = order[seen.rows[order].argsort(stable=True)]
    rows = seen.rows[order]
    place = torch.arange(len(order), device=rows.device) - torch.searchsorted(rows, rows)
    order, rows, place = (x[place < metric.top] for x in (order, rows, place))

    def laid_out(values: Tensor) -> Tensor:
        table = values.new_full((len(seen.image), metric.top, *values.shape[1:]), torch.nan)
        table[rows, place] = values[order]
        return table

    # a place without a pair has no point
    metric.update(laid_out(seen.maps), laid_out(seen.points), laid_out(importance).nan_to_num(), laid_out(present))


def by_existence(metric: Metric, seen: Seen) -> None:
    """The most important concepts against those that are there."""
    metric.update(seen.importance, seen.annotations)


def by_class(metric: Metric, seen: Seen) -> None:
    """The weights of concepts against their frequency in each class."""
    metric.update(seen.values, seen.annotations, seen.labels, seen.classes, seen.weight)


def _each(metric: Callable[..., Metric]) -> Callable[..., Metric]:
    return lambda num_concepts, num_classes, **options: metric(num_concepts, **options)


def _at(metric: Callable[..., Metric], **level: float) -> Callable[..., Metric]:
    return lambda num_concepts, num_classes, **options: metric(num_concepts, **level, **options)


def _alone(metric: Callable[..., Metric]) -> Callable[..., Metric]:
    return lambda num_concepts, num_classes, **options: metric(**options)


MEASURES: dict[str, Measure] = {
    "pointing_game": Measure(_each(PointingGame), by_mask, ("masks",)),
    "energy_in_mask": Measure(_each(EnergyInMask), by_mask, ("masks",)),
    "rank_accuracy": Measure(_each(RankAccuracy), by_mask, ("masks",)),
    "top_k_intersection": Measure(_each(TopKIntersection), by_mask, ("masks",)),
    "iou_at_mass": Measure(_each(MassIoU), by_mask, ("masks",)),
    **{
        f"iou_at_mass_{percent}": Measure(_at(MassIoU, mass=percent / 100), by_mask, ("masks",))
        for percent in (25, 50, 75, 95)
    },
    "iou_at_half_max": Measure(_each(HalfMaxIoU), by_mask, ("masks",)),
    "pixel_auroc": Measure(_each(PixelAUROC), by_mask, ("masks",)),
    "pixel_ap": Measure(_each(PixelAveragePrecision), by_mask, ("masks",)),
    "keypoint_distance": Measure(_each(KeypointDistance), by_point, ("points",)),
    "concept_location": Measure(_alone(ConceptLocation), by_location, ("points", "annotations", "importance")),
    "concept_existence": Measure(_alone(ConceptExistence), by_existence, ("annotations", "importance")),
    "concept_importance": Measure(
        ConceptGlobalImportance, by_class, ("annotations", "labels", "classes", "values", "weight")
    ),
    "deletion": Measure(_each(DeletionAUC), by_model),
    "insertion": Measure(_each(InsertionAUC), by_model),
    "average_drop": Measure(_each(AverageDrop), by_model),
    "average_increase": Measure(_each(AverageIncrease), by_model),
    "average_gain": Measure(_each(AverageGain), by_model),
    "randomisation": Measure(_each(RandomisationSimilarity), by_randomisation),
}
DEFAULT = {
    "masks": ("pointing_game", "energy_in_mask", "pixel_auroc", "iou_at_half_max"),
    "points": ("keypoint_distance",),
}


def make_metrics(
    wanted: Sequence[str] | Mapping[str, Mapping[str, Any] | None], num_concepts: int, num_classes: int
) -> dict[str, Metric]:
    """Metrics by name.

    Args:
        wanted: Short names, or short name to options such as ``{"iou_at_mass": {"mass": 0.5}}``.
        num_concepts: ``K``.
        num_classes: ``L``.

    Raises:
        ValueError: A name is unknown (near matches are listed), or an option is unknown or out of range.
    """
    if isinstance(wanted, str):
        raise ValueError(f"metrics: expected a list of names, got {wanted!r}")
    options = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted)
    made = {}
    for name, given in options.items():
        measure = find("metrics", name, MEASURES, own="")
        try:
            made[name] = measure.make(num_concepts, num_classes, **(given or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metrics: {name} takes no {dict(given or {})}: {error}") from error
    return made
