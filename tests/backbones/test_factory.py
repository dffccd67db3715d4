"""create_backbone: strings, modules and what is said of other strings."""

from __future__ import annotations

import pytest
from tiny_clip import VIT
from torch import nn

from cbm_lightning.backbones import Identity, ModuleBackbone, OpenClipBackbone, TimmBackbone, create_backbone


def test_strings() -> None:
    backbone = create_backbone("timm/test_resnet", img_size=64, frozen=True)
    assert isinstance(backbone, TimmBackbone)
    assert backbone.frozen
    assert backbone.dims.grid == (2, 2)
    assert isinstance(create_backbone("open_clip/tiny", model_config=VIT), OpenClipBackbone)
    assert isinstance(create_backbone("identity", dim=4), Identity)


def test_modules() -> None:
    backbone = Identity(3)
    assert create_backbone(backbone) is backbone
    assert isinstance(create_backbone(nn.Linear(4, 2), input_size=(4,)), ModuleBackbone)
    with pytest.raises(TypeError, match=r"made already; give \['frozen'\]"):
        create_backbone(backbone, frozen=True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet18", 'did you mean "timm/resnet18"'),
        ("torchvision/resnet18", '"timm/NAME", "open_clip/NAME", "identity"'),
        ("timm/", '"timm/NAME"'),
        ("timm/resnet81", "no model 'resnet81'"),
        ("open_clip/ViT-B-23", "no model 'ViT-B-23'"),
    ],
)
def test_unknown_strings(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(spec)
