"""`create_backbone`: a backbone from a string such as ``"timm/resnet18"``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from cbm_lightning.backbones.base import Backbone
from cbm_lightning.backbones.identity import Identity
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.backbones.open_clip import OpenClipBackbone
from cbm_lightning.backbones.timm import TimmBackbone

FAMILIES: dict[str, Callable[..., Backbone]] = {"timm": TimmBackbone, "open_clip": OpenClipBackbone}


def create_backbone(spec: str | Backbone | nn.Module, **options: Any) -> Backbone:
    """Make a backbone from a string, or from a module.

    Args:
        spec: ``"timm/NAME"``, ``"open_clip/NAME"`` or ``"identity"``; a `Backbone`, which is returned as it is; or any
            other module, which `ModuleBackbone` wraps.
        options: Arguments of the backbone that is made (``pretrained``, ``frozen``, ``img_size``, ...).

    Raises:
        ValueError: The string is none of these, or the model it names is unknown.
        TypeError: The backbone does not take an option, or is made already.

    Example:
        >>> create_backbone("timm/test_resnet", img_size=64).dims.pooled
        96
    """
    if isinstance(spec, Backbone):
        if options:
            raise TypeError(f"{type(spec).__name__} is made already; give {sorted(options)} to it")
        return spec
    if isinstance(spec, nn.Module):
        return ModuleBackbone(spec, **options)
    if spec == "identity":
        return Identity(**options)
    family, _, name = spec.partition("/")
    if family in FAMILIES and name:
        return FAMILIES[family](name, **options)
    forms = ", ".join([*(f'"{known}/NAME"' for known in FAMILIES), '"identity"'])
    hint = "" if "/" in spec else f'; did you mean "timm/{spec}"?'
    raise ValueError(f"backbone: expected {forms}, a Backbone or an nn.Module, got {spec!r}{hint}")
