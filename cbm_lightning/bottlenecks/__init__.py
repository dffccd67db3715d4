"""Bottlenecks: features to concepts, one file a method."""

from cbm_lightning.bottlenecks.autoregressive import AutoregressiveBottleneck
from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.bottlenecks.botcl import SlotBottleneck
from cbm_lightning.bottlenecks.ecbm import EnergyBottleneck
from cbm_lightning.bottlenecks.embedding import EmbeddingBottleneck
from cbm_lightning.bottlenecks.intcem import InterventionAwareBottleneck
from cbm_lightning.bottlenecks.linear import LinearBottleneck
from cbm_lightning.bottlenecks.probcbm import ProbabilisticBottleneck
from cbm_lightning.bottlenecks.scbm import StochasticBottleneck
from cbm_lightning.bottlenecks.similarity import SimilarityBottleneck
from cbm_lightning.bottlenecks.sl_cbm import SpatialBottleneck
from cbm_lightning.bottlenecks.sparse_cbm import ConceptLayerBottleneck

__all__ = [
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
]
