"""Concept bottleneck models on any timm or CLIP backbone, inside a standard Lightning Trainer."""

from importlib.metadata import PackageNotFoundError, version

from cbm_lightning.backbones import Backbone, create_backbone
from cbm_lightning.bottlenecks import (
    AutoregressiveBottleneck,
    Bottleneck,
    ConceptLayerBottleneck,
    EmbeddingBottleneck,
    EnergyBottleneck,
    InterventionAwareBottleneck,
    LinearBottleneck,
    ProbabilisticBottleneck,
    SimilarityBottleneck,
    SlotBottleneck,
    SpatialBottleneck,
    StochasticBottleneck,
)
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.contrastive import ContrastiveModule
from cbm_lightning.heads import (
    ConceptMatrixHead,
    LabelHead,
    LinearHead,
    MLPHead,
    NormalizedHead,
    PassThroughHead,
    PrototypeHead,
    ResidualHead,
)
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.module import CBMModule
from cbm_lightning.phases import Phase
from cbm_lightning.types import ConceptOutput, Features, Intervention, Prediction

try:
    __version__ = version("cbm-lightning")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0.0.0"

__all__ = [
    "CBMModule",
    "ContrastiveModule",
    "ConceptSet",
    "Phase",
    "ConceptLoss",
    "Backbone",
    "create_backbone",
    "Bottleneck",
    "LinearBottleneck",
    "EmbeddingBottleneck",
    "InterventionAwareBottleneck",
    "ProbabilisticBottleneck",
    "EnergyBottleneck",
    "StochasticBottleneck",
    "AutoregressiveBottleneck",
    "SimilarityBottleneck",
    "ConceptLayerBottleneck",
    "SlotBottleneck",
    "SpatialBottleneck",
    "LabelHead",
    "LinearHead",
    "MLPHead",
    "ResidualHead",
    "PrototypeHead",
    "NormalizedHead",
    "ConceptMatrixHead",
    "PassThroughHead",
    "Features",
    "ConceptOutput",
    "Intervention",
    "Prediction",
]
