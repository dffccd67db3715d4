"""Backbones: images, or features computed before, become `Features`."""

from cbm_lightning.backbones.base import Backbone, ImageStats
from cbm_lightning.backbones.factory import create_backbone
from cbm_lightning.backbones.identity import Identity
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.backbones.open_clip import OpenClipBackbone
from cbm_lightning.backbones.text import OpenClipTextEncoder
from cbm_lightning.backbones.timm import TimmBackbone

__all__ = [
    "Backbone",
    "ImageStats",
    "create_backbone",
    "TimmBackbone",
    "OpenClipBackbone",
    "OpenClipTextEncoder",
    "ModuleBackbone",
    "Identity",
]
