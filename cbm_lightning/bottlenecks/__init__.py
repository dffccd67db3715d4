"""Bottlenecks: features to concepts, one file a method."""

from cbm_lightning.bottlenecks.base import Bottleneck
from cbm_lightning.bottlenecks.embedding import EmbeddingBottleneck
from cbm_lightning.bottlenecks.linear import LinearBottleneck
from cbm_lightning.bottlenecks.similarity import SimilarityBottleneck

__all__ = ["Bottleneck", "LinearBottleneck", "EmbeddingBottleneck", "SimilarityBottleneck"]
