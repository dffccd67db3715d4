"""Metrics of concepts, in torchmetrics style: how well they are predicted, where they look, what rests on them."""

from cbm_lightning.metrics.accuracy import ConceptAccuracy, ConceptJointAccuracy
from cbm_lightning.metrics.brier import ConceptBrierScore
from cbm_lightning.metrics.calibration import ConceptCalibrationError
from cbm_lightning.metrics.concept_existence import ConceptExistence
from cbm_lightning.metrics.concept_importance import ConceptGlobalImportance
from cbm_lightning.metrics.concept_location import ConceptLocation
from cbm_lightning.metrics.concept_purity import ConceptPurity
from cbm_lightning.metrics.faithfulness import (
    AverageDrop,
    AverageGain,
    AverageIncrease,
    DeletionAUC,
    InsertionAUC,
    RandomisationSimilarity,
)
from cbm_lightning.metrics.leakage import (
    Completeness,
    ConceptTaskLeakage,
    ConditionalLeakage,
    HeadOnTruth,
    InterConceptLeakage,
    NicheImpurity,
    OracleImpurity,
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
from cbm_lightning.metrics.ranking import ConceptAUROC, ConceptAveragePrecision
from cbm_lightning.metrics.real import RealConceptError

__all__ = [
    "ConceptAccuracy",
    "ConceptJointAccuracy",
    "ConceptAUROC",
    "ConceptAveragePrecision",
    "ConceptBrierScore",
    "ConceptCalibrationError",
    "RealConceptError",
    "PointingGame",
    "EnergyInMask",
    "RankAccuracy",
    "TopKIntersection",
    "MassIoU",
    "HalfMaxIoU",
    "PixelAUROC",
    "PixelAveragePrecision",
    "KeypointDistance",
    "ConceptLocation",
    "ConceptExistence",
    "ConceptPurity",
    "ConceptGlobalImportance",
    "DeletionAUC",
    "InsertionAUC",
    "AverageDrop",
    "AverageIncrease",
    "AverageGain",
    "RandomisationSimilarity",
    "ConceptTaskLeakage",
    "InterConceptLeakage",
    "ConditionalLeakage",
    "HeadOnTruth",
    "OracleImpurity",
    "NicheImpurity",
    "Completeness",
]
