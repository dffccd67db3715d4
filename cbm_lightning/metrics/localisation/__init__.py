"""Metrics of where saliency lies, in torchmetrics style, each with its chance level."""

from cbm_lightning.metrics.localisation.base import LocalisationMetric
from cbm_lightning.metrics.localisation.energy import EnergyInMask
from cbm_lightning.metrics.localisation.half_max_iou import HalfMaxIoU
from cbm_lightning.metrics.localisation.keypoint_distance import KeypointDistance
from cbm_lightning.metrics.localisation.mass_iou import MassIoU
from cbm_lightning.metrics.localisation.pixel_auroc import PixelAUROC
from cbm_lightning.metrics.localisation.pixel_average_precision import PixelAveragePrecision
from cbm_lightning.metrics.localisation.pointing_game import PointingGame
from cbm_lightning.metrics.localisation.rank_accuracy import RankAccuracy
from cbm_lightning.metrics.localisation.top_k import TopKIntersection

__all__ = [
    "LocalisationMetric",
    "PointingGame",
    "EnergyInMask",
    "RankAccuracy",
    "TopKIntersection",
    "MassIoU",
    "HalfMaxIoU",
    "PixelAUROC",
    "PixelAveragePrecision",
    "KeypointDistance",
]
