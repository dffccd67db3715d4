"""Concept bottleneck models on any timm or CLIP backbone, inside a standard Lightning Trainer."""

from importlib.metadata import PackageNotFoundError, version

from cbm_lightning.backbones import Backbone, create_backbone
from cbm_lightning.bottlenecks import Bottleneck, EmbeddingBottleneck, LinearBottleneck, SimilarityBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead, LinearHead, MLPHead, ResidualHead
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
    "ConceptSet",
    "Phase",
    "ConceptLoss",
    "Backbone",
    "create_backbone",
    "Bottleneck",
    "LinearBottleneck",
    "EmbeddingBottleneck",
    "SimilarityBottleneck",
    "LabelHead",
    "LinearHead",
    "MLPHead",
    "ResidualHead",
    "Features",
    "ConceptOutput",
    "Intervention",
    "Prediction",
]
