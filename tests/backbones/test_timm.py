"""TimmBackbone over the families of timm: widths, tokens, grids, pooling, freezing, weights and transforms."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cbm_lightning.backbones.timm import TimmBackbone
from cbm_lightning.configurable import build

TINY_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6), "window_size": 4}
TINY_DEIT = {"depth": 1, "embed_dim": 48}

# name, side of the input, further arguments, pooled width, token width, side of the grid
FAMILIES = [
    ("test_resnet.r160_in1k", 64, {}, 96, 96, 2),
    ("resnet10t", 64, {}, 512, 512, 2),
    ("test_convnext", 64, {}, 64, 64, 2),
    ("mobilenetv3_small_050", 64, {}, 1024, 288, 2),
    ("lcnet_050", 64, {}, 1280, 256, 2),
    ("mobilenetv2_035", 64, {}, 1280, 1280, 2),
    ("vgg11", 64, {"mlp_ratio": 0.01}, 4096, 512, 2),
    ("test_efficientnet", 64, {}, 256, 256, 2),
    ("regnetx_002", 64, {}, 368, 368, 2),
    ("test_nfnet", 64, {}, 192, 192, 2),
    ("test_mambaout", 64, {}, 256, 64, 2),
    ("test_maxvit", 64, {}, 128, 128, 2),
    ("swin_tiny_patch4_window7_224", 64, TINY_SWIN, 192, 192, 2),
    ("test_vit", 64, {}, 64, 64, 4),
    ("test_vit_relpos", 64, {}, 96, 96, 4),
    ("deit_tiny_distilled_patch16_224", 64, TINY_DEIT, 48, 48, 4),
    ("xcit_nano_12_p8_224", 32, {"depth": 1}, 128, 128, 4),
    ("gmlp_ti16_224", 64, {}, 128, 128, 4),
    ("hiera_tiny_224", 64, {"embed_dim": 24, "stages": (1, 1, 1, 1)}, 192, 192, 2),
    ("volo_d1_224", 64, {}, 384, 384, 4),
]


def photograph(width: int = 90, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("name", "size", "args", "pooled", "width", "side"), FAMILIES)
def test_families(name: str, size: int, args: dict[str, Any], pooled: int, width: int, side: int) -> None:
    backbone = TimmBackbone(name, img_size=size, model_args=args).eval()
    assert backbone.dims == (pooled, width, (side, side))
    x = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        features = backbone(x)
        torch.testing.assert_close(features.pooled, backbone.model(x), atol=1e-5, rtol=1e-5)
    assert features.grid == (side, side)
    assert features.tokens is not None
    assert features.tokens.shape == (2, side * side, width)
    assert features.pooled.shape == (2, pooled)


@pytest.mark.parametrize(
    ("name", "args"),
    [("test_resnet", {}), ("test_mambaout", {}), ("swin_tiny_patch4_window7_224", TINY_SWIN), ("test_vit", {}),
     ("deit_tiny_distilled_patch16_224", TINY_DEIT)],
)  # fmt: skip
def test_tokens_are_in_raster_order(name: str, args: dict[str, Any]) -> None:
    """A change in the top right of the image changes a token at the end of the first rows most."""
    backbone = TimmBackbone(name, img_size=128, model_args=args).eval()
    h, w = backbone.dims.grid or ()
    plain = torch.zeros(1, 3, 128, 128)
    changed = plain.clone()
    changed[:, :, : 128 // h, -128 // w :] = torch.randn(3, 128 // h, 128 // w)
    with torch.no_grad():
        change = (backbone(changed).tokens - backbone(plain).tokens).norm(dim=-1)[0]
    assert change.reshape(h, w)[:2, -2:].max() == change.max() > 0


def test_prefix_tokens_are_left_out() -> None:
    backbone = TimmBackbone("deit_tiny_distilled_patch16_224", img_size=64, model_args=TINY_DEIT).eval()
    x = torch.rand(1, 3, 64, 64)
    whole = backbone.model.forward_features(x)
    assert whole.shape[1] == 2 + 16
    torch.testing.assert_close(backbone(x).tokens, whole[:, 2:])


def test_channels_last_maps_are_turned() -> None:
    backbone = TimmBackbone("swin_tiny_patch4_window7_224", img_size=128, model_args=TINY_SWIN).eval()
    x = torch.rand(1, 3, 128, 128)
    features = backbone(x)
    expected = backbone.model.forward_features(x)
    assert expected.shape == (1, 4, 4, 192)
    for row, column in [(0, 0), (0, 3), (2, 1)]:
        torch.testing.assert_close(features.tokens[:, 4 * row + column], expected[:, row, column])


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "regnetx_002"])
def test_grid_follows_the_input(name: str) -> None:
    features = TimmBackbone(name, img_size=64).eval()(torch.rand(1, 3, 96, 160))
    assert features.grid == (3, 5)
    assert features.tokens.shape[1] == 15


@pytest.mark.parametrize("name", ["pit_ti_224", "coat_tiny"])
def test_models_without_patch_tokens_say_so(name: str) -> None:
    args = {"pit_ti_224": {"depth": (1, 1, 1)}, "coat_tiny": {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1}}
    backbone = TimmBackbone(name, img_size=64, model_args=args[name]).eval()
    assert backbone.dims[1:] == (None, None)
    features = backbone(torch.rand(1, 3, 64, 64))
    assert features.tokens is None
    assert features.grid is None
    with pytest.raises(ValueError, match=r"token_mean.*stage"):
        TimmBackbone(name, img_size=64, pool="token_mean", model_args=args[name])


def test_output_stride_refines_the_grid() -> None:
    weights = TimmBackbone("test_resnet", img_size=64)
    fine = TimmBackbone("test_resnet", img_size=64, output_stride=8)
    fine.load_state_dict(weights.state_dict())
    assert weights.dims.grid == (2, 2)
    assert fine.dims == (96, 96, (8, 8))


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224", "vgg11"])
def test_output_stride_is_refused_where_it_does_nothing(name: str) -> None:
    with pytest.raises(ValueError, match="output_stride"):
        TimmBackbone(name, img_size=64, output_stride=8)


def test_native_pool_differs_from_the_token_mean_in_convnext() -> None:
    native = TimmBackbone("test_convnext", img_size=64).eval()
    mean = TimmBackbone("test_convnext", img_size=64, pool="token_mean").eval()
    mean.load_state_dict(native.state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        by_native, by_mean = native(x), mean(x)
    torch.testing.assert_close(by_native.tokens, by_mean.tokens)
    torch.testing.assert_close(by_mean.pooled, by_native.tokens.mean(1))
    assert (by_native.pooled - by_mean.pooled).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "stage", "width", "side"),
    [("test_resnet", 2, 48, 8), ("test_vit", 1, 64, 4), ("test_convnext", 1, 32, 8), ("pit_ti_224", 1, 128, 4)],
)
def test_stage_gives_tokens_of_an_intermediate_layer(name: str, stage: int, width: int, side: int) -> None:
    native = TimmBackbone(name, img_size=64, stage=stage).eval()
    mean = TimmBackbone(name, img_size=64, stage=stage, pool="token_mean").eval()
    mean.load_state_dict(native.state_dict())
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        by_native, by_mean = native(x), mean(x)
        torch.testing.assert_close(by_native.pooled, native.model(x), atol=1e-5, rtol=1e-5)
        expected = native.model.forward_intermediates(x, indices=[stage], norm=False, intermediates_only=True)[0]
    assert native.dims[1:] == (width, (side, side))
    assert mean.dims == (width, width, (side, side))
    torch.testing.assert_close(by_native.tokens, expected.flatten(2).mT)
    torch.testing.assert_close(by_mean.tokens, by_native.tokens)
    torch.testing.assert_close(by_mean.pooled, by_native.tokens.mean(1))


@pytest.mark.parametrize(
    ("name", "options"),
    [("test_resnet", {"stage": 2}), ("test_convnext", {}), ("mobilenetv3_small_050", {}), ("test_vit", {"stage": 1})],
)
def test_every_trained_parameter_gets_a_gradient(name: str, options: dict[str, Any]) -> None:
    backbone = TimmBackbone(name, img_size=64, pool="token_mean", **options)
    assert any(not parameter.requires_grad for parameter in backbone.parameters())
    backbone(torch.rand(2, 3, 64, 64)).pooled.sum().backward()
    without = [n for n, parameter in backbone.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert without == []


def batch_norm_state(module: nn.Module) -> list[Tensor]:
    return [b.clone() for n, b in module.named_buffers() if "running" in n or "tracked" in n]


def test_frozen_backbone_never_changes() -> None:
    backbone = TimmBackbone("test_resnet", img_size=64, frozen=True)
    assert not any(module.training for module in backbone.modules())  # before anybody calls train()
    before = batch_norm_state(backbone)
    backbone.train()
    features = backbone(torch.rand(4, 3, 64, 64))
    assert not features.pooled.requires_grad
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert len(before) > 10
    assert all(torch.equal(a, b) for a, b in zip(before, batch_norm_state(backbone), strict=True))


def test_freeze_norm_keeps_statistics_while_the_rest_trains() -> None:
    backbone = TimmBackbone("test_resnet", img_size=64, freeze_norm=True)
    before = batch_norm_state(backbone)
    backbone(torch.rand(4, 3, 64, 64)).pooled.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, batch_norm_state(backbone), strict=True))
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert backbone.model.layer1.training
    free = TimmBackbone("test_resnet", img_size=64)
    before = batch_norm_state(free)
    free(torch.rand(4, 3, 64, 64))
    assert not any(torch.equal(a, b) for a, b in zip(before, batch_norm_state(free), strict=True))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_copies_precision_and_compilation(name: str) -> None:
    backbone = TimmBackbone(name, img_size=64).eval()
    x = torch.rand(2, 3, 64, 64)
    expected = backbone(x)
    copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), torch.compile(backbone, backend="eager")]
    for copied in copies:
        features = copied(x)
        torch.testing.assert_close(features.pooled, expected.pooled)
        torch.testing.assert_close(features.tokens, expected.tokens)
        assert features.grid == expected.grid
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = backbone(x).pooled
    assert torch.cosine_similarity(half.float(), expected.pooled).min() > 0.99


def test_random_numbers_are_drawn_by_the_weights_alone() -> None:
    import timm

    torch.manual_seed(1)
    timm.create_model("test_resnet", num_classes=0)
    expected = torch.rand(1)
    torch.manual_seed(1)
    TimmBackbone("test_resnet", img_size=64, pool="token_mean")
    assert torch.equal(torch.rand(1), expected)


def test_transforms_follow_the_weights() -> None:
    backbone = TimmBackbone("vit_base_patch16_224.augreg_in21k", img_size=64, model_args={"depth": 1, "embed_dim": 48})
    assert backbone.image_stats() == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    image = backbone.eval_transform()(photograph())
    assert image.shape == backbone.train_transform()(photograph()).shape == (3, 64, 64)
    white = backbone.eval_transform()(Image.new("RGB", (80, 80), "white"))
    assert torch.equal(white, torch.ones(3, 64, 64))
    assert TimmBackbone("test_resnet").img_size == 160


def test_crop_pct_1_keeps_the_whole_square() -> None:
    pixels = np.zeros((80, 80, 3), dtype=np.uint8)
    pixels[:4] = 255
    cropped = TimmBackbone("test_resnet", img_size=64, mean=[0] * 3, std=[1] * 3, crop_pct=0.8).eval_transform()
    whole = TimmBackbone("test_resnet", img_size=64, mean=[0] * 3, std=[1] * 3, crop_pct=1.0).eval_transform()
    assert cropped(Image.fromarray(pixels)).max() < 0.2
    assert whole(Image.fromarray(pixels)).max() > 0.9


def test_restored_backbone_needs_no_weights_and_prepares_pixels_alike() -> None:
    backbone = TimmBackbone(
        "test_resnet", img_size=64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), output_stride=8, crop_pct=0.9
    ).eval()
    spec = backbone.spec()
    assert spec["init_args"]["pretrained"] is False
    assert spec["init_args"]["checkpoint_path"] is None
    restored = build(spec).eval()
    restored.load_state_dict(backbone.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(restored(x).pooled, backbone(x).pooled)
    assert restored.image_stats() == backbone.image_stats()
    assert torch.equal(restored.eval_transform()(photograph()), backbone.eval_transform()(photograph()))
    assert restored.spec() == spec


def test_statistics_of_tagged_weights_survive_without_the_weights() -> None:
    spec = TimmBackbone("test_vit.r160_in1k").spec()
    assert spec["init_args"]["mean"] == [0.5, 0.5, 0.5]
    assert spec["init_args"]["std"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, r"no model 'resnet81'; did you mean \['resnet"),
        ("resnet18.nonsense", {}, "no weights 'nonsense' of resnet18; it has .*a1_in1k"),
        ("test_resnet", {"pretrained": True, "checkpoint_path": "weights.pth"}, "give one"),
        ("test_resnet", {"stage": 5}, "stages 0 to 4, got 5"),
        ("test_resnet", {"img_size": 0}, "img_size"),
        ("test_resnet", {"mean": [0.5]}, r"mean: expected a number a channel \(3\)"),
        ("test_resnet", {"crop_pct": 1.5}, "crop_pct"),
        ("test_resnet", {"model_args": {"num_classes": 10}}, "num_classes"),
        ("test_resnet", {"model_args": {"colour": 10}}, "refuses an option.*colour"),
        ("test_resnet", {"model_args": {"in_chans": 1}}, r"mean: expected a number a channel \(1\)"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmBackbone(name, **options)


def test_grey_images() -> None:
    backbone = TimmBackbone("test_resnet", img_size=64, mean=[0.5], std=[0.5], model_args={"in_chans": 1})
    assert backbone.eval()(torch.rand(1, 1, 64, 64)).pooled.shape == (1, 96)


def test_dropped_patches_are_refused() -> None:
    backbone = TimmBackbone("test_vit", img_size=64, model_args={"patch_drop_rate": 0.5}).train()
    with pytest.raises(RuntimeError, match="8 patch tokens do not fill the grid"):
        backbone(torch.rand(1, 3, 64, 64))


def test_real_weights_reproduce_reference_features(shared: Path) -> None:
    """Six photographs against features that were computed from the same weights elsewhere."""
    data = shared / "data"
    photos = np.load(data / "cub10" / "cub10_images160.npz", allow_pickle=False)
    reference = np.load(data / "cub10" / "cub10_mobilenetv2_features.npz", allow_pickle=False)
    backbone = TimmBackbone(
        "mobilenetv2_100",
        checkpoint_path=str(data / "weights_mobilenetv2" / "mobilenetv2_100_inat_bird_fp16.safetensors"),
        frozen=True,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        crop_pct=1.0,
        model_args={"pad_type": "same"},
    )
    transform = backbone.eval_transform()
    chosen = list(range(0, 540, 90))
    jpegs = [photos["jpeg"][photos["offset"][i] : photos["offset"][i + 1]].tobytes() for i in chosen]
    features = backbone(torch.stack([transform(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs]))
    expected = torch.from_numpy(reference["inat_bird"][chosen]).float()
    torch.testing.assert_close(features.pooled, expected, atol=5e-3, rtol=1e-2)
    restored = build(backbone.spec())
    restored.load_state_dict(backbone.state_dict())
    assert restored.image_stats() == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
