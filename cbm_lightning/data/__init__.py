"""Datamodules: every one knows its concepts and classes before it reads an image."""

from cbm_lightning.data.base import ConceptDataModule
from cbm_lightning.data.cached_features import CachedFeatures
from cbm_lightning.data.concept_folder import ConceptFolder
from cbm_lightning.data.cub import CUB200
from cbm_lightning.data.precomputed_features import PrecomputedFeatures
from cbm_lightning.data.rendered_birds import RenderedBirds

__all__ = ["ConceptDataModule", "RenderedBirds", "ConceptFolder", "CUB200", "CachedFeatures", "PrecomputedFeatures"]
