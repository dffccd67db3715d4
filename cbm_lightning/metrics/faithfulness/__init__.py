"""Metrics of whether a model uses the pixels that saliency names, in torchmetrics style, each with its chance level."""

from cbm_lightning.metrics.faithfulness.average_drop import AverageDrop, AverageGain, AverageIncrease
from cbm_lightning.metrics.faithfulness.base import FaithfulnessMetric
from cbm_lightning.metrics.faithfulness.deletion import DeletionAUC
from cbm_lightning.metrics.faithfulness.insertion import InsertionAUC
from cbm_lightning.metrics.faithfulness.randomisation import RandomisationSimilarity

__all__ = [
    "FaithfulnessMetric",
    "DeletionAUC",
    "InsertionAUC",
    "AverageDrop",
    "AverageIncrease",
    "AverageGain",
    "RandomisationSimilarity",
]
