"""ModuleBackbone: every shape of output, measured or declared widths, and no silent loss in checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cbm_lightning.backbones.identity import Identity
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.configurable import Part, build
from cbm_lightning.types import Features


class Returns(nn.Module):
    """A module of one layer whose output is reshaped."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 4, stride=4)
        self.kind = kind

    def forward(self, x: Tensor) -> object:
        maps = self.layer(x)
        outputs = {
            "map": maps,
            "tokens": maps.flatten(2).mT,
            "vector": maps.mean((2, 3)),
            "features": Features(maps.amax((2, 3))),
            "scalar": maps.sum(),
            "tuple": (maps,),
        }
        return outputs[self.kind]


class Recorded(Part):
    """A module that records its arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ("kind", "dims"),
    [
        ("map", (6, 6, (4, 8))),
        ("tokens", (6, 6, None)),
        ("vector", (6, None, None)),
        ("features", (6, None, None)),
    ],
)
def test_outputs(kind: str, dims: tuple[object, ...]) -> None:
    backbone = ModuleBackbone(Returns(kind), input_size=(3, 16, 32))
    assert backbone.dims == dims
    x = torch.rand(2, 3, 16, 32)
    features = backbone(x)
    maps = backbone.module.layer(x)
    pooled = maps.amax((2, 3)) if kind == "features" else maps.mean((2, 3))
    torch.testing.assert_close(features.pooled, pooled)
    if kind in ("map", "tokens"):
        torch.testing.assert_close(features.tokens[:, 8 + 3], maps[:, :, 1, 3])


@pytest.mark.parametrize(("kind", "message"), [("scalar", r"returned \[\]"), ("tuple", "returned tuple")])
def test_other_outputs_are_refused(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModuleBackbone(Returns(kind), input_size=(3, 16, 16))


def test_wrong_input_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"input_size: Linear does not run on an input of shape \[3, 224, 224\]"):
        ModuleBackbone(nn.Linear(5, 2))


def test_declared_widths_are_not_measured() -> None:
    backbone = ModuleBackbone(nn.Linear(5, 2), pooled_dim=2)
    assert backbone.dims == (2, None, None)
    with pytest.raises(ValueError, match="pooled_dim"):
        ModuleBackbone(nn.Linear(5, 2), token_dim=2)


def test_measuring_leaves_statistics_and_modes_alone() -> None:
    norm = nn.BatchNorm2d(3)
    module = nn.Sequential(norm, nn.Conv2d(3, 4, 3), nn.Dropout().eval())
    backbone = ModuleBackbone(module, input_size=(3, 8, 8))
    assert norm.num_batches_tracked == 0
    assert norm.training
    assert backbone.training


def test_frozen_and_freeze_norm() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    frozen = ModuleBackbone(module, input_size=(3, 8, 8), freeze_norm=True)
    frozen(torch.rand(2, 3, 8, 8)).pooled.sum().backward()
    assert module[1].running_mean.abs().max() == 0
    assert module[0].weight.grad is not None
    frozen = ModuleBackbone(module, input_size=(3, 8, 8), frozen=True).train()
    assert not frozen(torch.rand(2, 3, 8, 8)).pooled.requires_grad


def test_bare_module_has_no_plain_form() -> None:
    with pytest.raises(TypeError, match=r"bare Linear.*hand the module over again"):
        ModuleBackbone(nn.Linear(5, 2), input_size=(5,)).spec()


def test_part_is_recorded_within() -> None:
    backbone = ModuleBackbone(Recorded(3), input_size=(4,))
    restored = build(backbone.spec())
    restored.load_state_dict(backbone.state_dict())
    assert torch.equal(restored(torch.ones(1, 4)).pooled, backbone(torch.ones(1, 4)).pooled)


def test_a_backbone_within_is_a_module_like_any_other() -> None:
    assert ModuleBackbone(Identity(5), input_size=(5,)).dims == (5, None, None)
