"""Metrics of concept predictions, in torchmetrics style."""

from cbm_lightning.metrics.accuracy import ConceptAccuracy, ConceptJointAccuracy
from cbm_lightning.metrics.calibration import ConceptCalibrationError
from cbm_lightning.metrics.ranking import ConceptAUROC, ConceptAveragePrecision
from cbm_lightning.metrics.real import RealConceptError

__all__ = [
    "ConceptAccuracy",
    "ConceptJointAccuracy",
    "ConceptAUROC",
    "ConceptAveragePrecision",
    "ConceptCalibrationError",
    "RealConceptError",
]
