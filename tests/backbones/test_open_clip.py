"""OpenClipBackbone over the kinds of image tower: embeddings, tokens, grids, weights and transforms."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import AVERAGE, COCA, CONVNEXT, EVA, RESNET, SIGLIP, VIT

from cbm_lightning.backbones.clip import canonical_name, make_clip
from cbm_lightning.backbones.open_clip import OpenClipBackbone
from cbm_lightning.configurable import build

# configuration, embedding width, token width, side of the image, side of the grid
TOWERS = {
    "vit": (VIT, 16, 32, 32, 4),
    "average": (AVERAGE, 16, 32, 32, 4),
    "coca": (COCA, 16, 32, 32, 4),
    "resnet": (RESNET, 16, 256, 64, 2),
    "siglip": (SIGLIP, 64, 64, 160, 10),
    "convnext": (CONVNEXT, 24, 64, 64, 2),
    "eva": (EVA, 24, 64, 160, 10),
}
PROJECTED = [tower for tower in TOWERS if tower != "coca"]


def make(tower: str, **options: Any) -> OpenClipBackbone:
    return OpenClipBackbone(tower, model_config=TOWERS[tower][0], **options)


@pytest.mark.parametrize("tower", TOWERS)
def test_towers(tower: str) -> None:
    _, embedding, width, size, side = TOWERS[tower]
    backbone = make(tower).eval()
    assert backbone.dims == (embedding, width, (side, side))
    x = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        features = backbone(x)
        expected = backbone.tower.visual(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(features.pooled, expected, atol=1e-5, rtol=1e-5)
    assert features.tokens.shape == (2, side * side, width)
    assert features.grid == (side, side)


@pytest.mark.parametrize("tower", TOWERS)
def test_tokens_are_in_raster_order(tower: str) -> None:
    _, _, _, size, side = TOWERS[tower]
    backbone = make(tower).eval()
    if tower == "resnet":  # open_clip starts the residual branches at zero
        torch.nn.init.ones_(backbone.tower.visual.layer4[0].bn3.weight)
    plain = torch.zeros(1, 3, size, size)
    changed = plain.clone()
    changed[:, :, : size // side, -size // side :] = torch.randn(3, size // side, size // side)
    with torch.no_grad():
        change = (backbone(changed).tokens - backbone(plain).tokens).norm(dim=-1)[0]
    assert change.argmax() == side - 1


@pytest.mark.parametrize("tower", PROJECTED)
def test_projected_tokens_share_the_space_of_the_images(tower: str) -> None:
    _, embedding, _, size, side = TOWERS[tower]
    backbone = make(tower, tokens="projected").eval()
    assert backbone.dims == (embedding, embedding, (side, side))
    assert backbone(torch.rand(2, 3, size, size)).tokens.shape == (2, side * side, embedding)


@pytest.mark.parametrize("tower", ["siglip", "convnext"])
def test_an_image_of_equal_tokens_is_embedded_like_each_of_them(tower: str) -> None:
    """What the projection of a token means, exactly, for towers that pool by attention or by averaging."""
    backbone = make(tower, tokens="projected").eval()
    token = torch.randn(64)
    visual = backbone.tower.visual
    output = token.expand(1, 100, 64) if tower == "siglip" else token[None, :, None, None].expand(1, 64, 2, 2)
    with torch.no_grad():
        projected = backbone.tower.project(token.expand(1, 1, -1))[0, 0]
        expected = visual.head(visual.trunk.forward_head(output))[0]
    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=1e-4)


def test_projecting_the_class_token_gives_the_embedding() -> None:
    backbone = make("vit").eval()
    x = torch.rand(2, 3, 32, 32)
    out = backbone.tower.visual.forward_intermediates(
        x, indices=1, normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    )
    torch.testing.assert_close(backbone.tower.project(out["image_intermediates_prefix"][0])[:, 0], backbone(x).pooled)


def test_attention_pools_have_no_projection_of_a_token() -> None:
    with pytest.raises(ValueError, match=r"projected.*CoCa.*patch"):
        make("coca", tokens="projected")


@pytest.mark.parametrize("tower", ["vit", "resnet", "convnext"])
def test_token_mean(tower: str) -> None:
    _, _, width, size, _ = TOWERS[tower]
    backbone = make(tower, pool="token_mean")
    assert backbone.dims.pooled == width
    features = backbone(torch.rand(2, 3, size, size))
    torch.testing.assert_close(features.pooled, features.tokens.mean(1))
    features.pooled.square().sum().backward()
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert len(trained) < len(list(backbone.parameters()))


@pytest.mark.parametrize(("tower", "size", "side"), [("vit", 48, 6), ("resnet", 96, 3), ("siglip", 96, 6)])
def test_img_size(tower: str, size: int, side: int) -> None:
    backbone = make(tower, img_size=size).eval()
    assert backbone.dims.grid == (side, side)
    assert backbone.img_size == (size, size)
    assert backbone.eval_transform()(Image.new("RGB", (70, 60))).shape == (3, size, size)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_images_of_another_size_are_refused(tower: str) -> None:
    with pytest.raises(ValueError, match=r"takes \d+x\d+ pixels, got 40x40.*img_size"):
        make(tower)(torch.rand(1, 3, 40, 40))


def test_frozen_tower_never_changes() -> None:
    backbone = make("resnet", frozen=True)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone.train()
    assert not backbone(torch.rand(2, 3, 64, 64)).pooled.requires_grad
    assert len(before) > 10
    assert all(torch.equal(before[name], buffer) for name, buffer in backbone.named_buffers())


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_copies_precision_and_compilation(tower: str) -> None:
    backbone = make(tower, tokens="projected").eval()
    x = torch.rand(2, 3, TOWERS[tower][3], TOWERS[tower][3])
    expected = backbone(x)
    copies = [copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone)), torch.compile(backbone, backend="eager")]
    for copied in copies:
        features = copied(x)
        torch.testing.assert_close(features.pooled, expected.pooled)
        torch.testing.assert_close(features.tokens, expected.tokens)
        assert features.grid == expected.grid
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        half = backbone(x).pooled
    assert torch.cosine_similarity(half.float(), expected.pooled).min() > 0.98


@pytest.mark.parametrize("tower", ["vit", "siglip"])
def test_local_weights_of_the_whole_model(tmp_path: Path, tower: str) -> None:
    config = TOWERS[tower][0]
    whole = make_clip(tower, model_config=config).eval()
    path = tmp_path / "clip.safetensors"
    save_file(whole.state_dict(), path)
    given = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    backbone = make(tower, checkpoint_path=str(path), preprocess=given).eval()
    x = torch.rand(1, 3, TOWERS[tower][3], TOWERS[tower][3])
    torch.testing.assert_close(backbone(x).pooled, whole.encode_image(x))

    spec = json.loads(json.dumps(backbone.spec()))
    assert (spec["init_args"]["pretrained"], spec["init_args"]["checkpoint_path"]) == (None, None)
    restored = build(spec).eval()
    restored.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(restored(x).pooled, backbone(x).pooled)
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    assert torch.equal(restored.eval_transform()(photograph), backbone.eval_transform()(photograph))
    assert restored.image_stats() == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert restored.spec() == backbone.spec()


def test_local_weights_in_another_size(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file(make_clip("vit", model_config=VIT).state_dict(), path)
    assert make("vit", checkpoint_path=str(path), img_size=48).dims.grid == (6, 6)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file(make_clip("vit", model_config=VIT).state_dict(), path)
    deeper = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "layers": 3}}
    with pytest.raises(ValueError, match=r"does not fit vit: 12 missing \(visual\.transformer\.resblocks\.2"):
        OpenClipBackbone("vit", checkpoint_path=str(path), model_config=deeper)
    with pytest.raises(ValueError, match=r"does not fit vit: RuntimeError.*size mismatch"):
        OpenClipBackbone("vit", checkpoint_path=str(path), model_config={**VIT, "embed_dim": 8})
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="does not fit"):
        make("vit", checkpoint_path=str(path))
    path.write_bytes(b"\x08\x00\x00")
    with pytest.raises(ValueError, match=r"cannot be read.*truncated"):
        make("vit", checkpoint_path=str(path))
    with pytest.raises(FileNotFoundError, match="no file at"):
        make("vit", checkpoint_path=str(tmp_path / "nowhere.pt"))


def test_transforms_by_default_are_those_of_openai() -> None:
    backbone = make("vit")
    assert backbone.image_stats().mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)
    white = backbone.eval_transform()(Image.new("RGB", (50, 40), "white"))
    mean, std = (torch.tensor(values) for values in backbone.image_stats())
    torch.testing.assert_close(white[:, 0, 0], (1 - mean) / std)
    assert backbone.train_transform()(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-B-32", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B/32", "laion2b_s34b_b79k", "ViT-B-32"),
        ("ViT-B-32-quickgelu", "openai", "ViT-B-32-quickgelu"),
        ("ViT-B-16-SigLIP", "webli", "ViT-B-16-SigLIP"),
        ("ViT-B-32", None, "ViT-B-32"),
    ],
)
def test_weights_trained_with_the_approximate_gelu_get_it(name: str, tag: str | None, expected: str) -> None:
    assert canonical_name(name, tag) == expected


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ViT-B-23", {}, r"no model 'ViT-B-23'; did you mean \['ViT-"),
        ("ViT-B-32", {"pretrained": "laion"}, "no weights 'laion' of ViT-B-32; it has .*openai"),
        ("ViT-B-32", {"pretrained": "openai", "checkpoint_path": "x.pt"}, "give no checkpoint_path"),
        ("vit", {"model_config": VIT, "preprocess": {"colour": 1}}, r"preprocess: unknown \['colour'\]"),
        ("vit", {"model_config": VIT, "preprocess": {"mean": [0.5]}}, "mean needs three numbers"),
        ("vit", {"model_config": {"embed_dim": 16}}, r"model_config: \['vision_cfg', 'text_cfg'\] missing"),
        ("vit", {"model_config": {**VIT, "vision_cfg": {"depth": 2}}}, "model_config: open_clip refuses.*depth"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OpenClipBackbone(name, **options)


def test_dropped_patches_are_refused() -> None:
    dropping = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "patch_dropout": 0.5}}
    backbone = OpenClipBackbone("vit", model_config=dropping).train()
    with pytest.raises(RuntimeError, match="8 patch tokens do not fill the grid"):
        backbone(torch.rand(1, 3, 32, 32))
