"""Attention rollout: where a transformer looks, whatever the concept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from saliency.models import (
    TINY_SWIN,
    TinyViT,
    clip_model,
    conv_net,
    has_hooks,
    images,
    images_for,
    model_of,
    scores_of,
    timm_model,
)
from tiny_clip import AVERAGE, COCA, EVA, RESNET, VIT
from torch import Tensor, nn
from torch.testing import assert_close

from cbm_lightning import CBMModule
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.saliency import concept_maps
from cbm_lightning.saliency.attention import attention_weights
from cbm_lightning.types import Features

TINY_BEIT = {"depth": 2, "embed_dim": 48, "num_heads": 2}

# a transformer of each kind, and how many layers and heads it has, of how many tokens, patches and others
TRANSFORMERS: dict[str, tuple[Callable[[], CBMModule], int, int, int, int]] = {
    "by hand": (lambda: model_of(TinyViT("class")), 2, 2, 16, 1),
    "timm": (lambda: timm_model("test_vit"), 6, 2, 16, 1),
    "timm, two tokens": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", model_args={"depth": 2, "embed_dim": 48}),
        2,
        3,
        16,
        2,
    ),
    "timm, relative positions": (lambda: timm_model("test_vit_relpos"), 9, 3, 16, 0),
    "clip": (lambda: clip_model(VIT), 2, 2, 16, 1),
    "clip, timm": (lambda: clip_model(EVA), 6, 2, 100, 1),
}

# the last attention reaches the pooled vector through patches, though there is a class token
AVERAGED: dict[str, Callable[[], CBMModule]] = {
    "by hand": lambda: model_of(TinyViT("mean")),
    "timm, mean of tokens": lambda: timm_model("test_vit", pool="token_mean"),
    "timm, norm after the mean": lambda: timm_model("test_vit", model_args={"global_pool": "avg"}),
    "beit": lambda: timm_model("beit_base_patch16_224", model_args=TINY_BEIT),
    "clip, norm after the mean": lambda: clip_model(AVERAGE),
}


class ClassAttention(nn.Module):
    """A transformer in whose last layer the class token alone attends, as in CaiT and VOLO."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = TinyViT("class")
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Features:
        features = self.layers(x)
        tokens = torch.cat([features.pooled[:, None], features.tokens], 1)
        weights = self.attn_drop((tokens[:, None, :1] @ tokens[:, None].transpose(2, 3)).softmax(-1))
        return Features((weights @ tokens[:, None])[:, 0, 0], features.tokens, grid=features.grid)


REFUSED: dict[str, Callable[[], CBMModule]] = {
    "convolutions": lambda: timm_model("test_resnet"),
    "convolutions of a user": lambda: model_of(conv_net()),
    "attention in the pool alone": lambda: clip_model(RESNET),
    "windows": lambda: timm_model("swin_tiny_patch4_window7_224", model_args=TINY_SWIN),
    "windows and grids": lambda: timm_model("test_maxvit"),
    "queries of its own": lambda: clip_model(COCA),
    "attention between channels": lambda: timm_model(
        "xcit_nano_12_p8_224", img_size=32, model_args={"depth": 1, "embed_dim": 32, "num_heads": 2}
    ),
    "a layer of another kind": lambda: model_of(ClassAttention()),
    "no tokens": lambda: model_of(TinyViT("class", shows_tokens=False)),
}


def caught(model: CBMModule, image: Tensor) -> list[Tensor]:
    with attention_weights(model.backbone) as layers:
        scores_of(model, image)
    return layers


def rollout(model: CBMModule, image: Tensor) -> Tensor:
    return concept_maps(model, image, "attention_rollout", resolution="method")


def rolled(layers: list[Tensor]) -> Tensor:
    """``[B, T, T]`` how much of each token of the input is in each of the output."""
    total = torch.eye(layers[0].shape[-1])
    for weights in layers:
        total = (weights.mean(1) + torch.eye(weights.shape[-1])) / 2 @ total
    return total


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_attention_of_every_layer(kind: str) -> None:
    make, depth, heads, patches, others = TRANSFORMERS[kind]
    model = make()
    image = images_for(model)
    before = scores_of(model, image)
    layers = caught(model, image)
    tokens = patches + others
    assert [tuple(weights.shape) for weights in layers] == [(2, heads, tokens, tokens)] * depth
    for weights in layers:
        assert weights.min() >= 0
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not has_hooks(model)
    assert_close(scores_of(model, image), before)


@pytest.mark.parametrize("kind", [kind for kind in TRANSFORMERS if "relative" not in kind])
def test_what_reaches_the_class_token(kind: str) -> None:
    make, _, _, patches, others = TRANSFORMERS[kind]
    model = make()
    image = images_for(model)
    # DeiT averages the distillation token with it
    expected = rolled(caught(model, image))[:, :others, others:].mean(1)
    maps = rollout(model, image)
    assert_close(maps[:, 0].flatten(1), expected, rtol=1e-4, atol=1e-6)
    assert maps.flatten(2).shape[2] == patches
    # the rest reaches it from what is before the patches, itself above all
    assert (maps[:, 0].sum((1, 2)) < 1).all()


@pytest.mark.parametrize("kind", AVERAGED)
def test_what_reaches_the_mean_of_the_patches(kind: str) -> None:
    model = AVERAGED[kind]()
    image = images_for(model)
    expected = rolled(caught(model, image))[:, 1:, 1:].mean(1)
    assert_close(rollout(model, image)[:, 0].flatten(1), expected, rtol=1e-4, atol=1e-6)


def test_without_a_class_token_every_patch_counts() -> None:
    model = timm_model("test_vit_relpos")
    image = images_for(model)
    maps = rollout(model, image)[:, 0]
    assert_close(maps.flatten(1), rolled(caught(model, image)).mean(1), rtol=1e-4, atol=1e-6)
    assert_close(maps.sum((1, 2)), torch.ones(2))


def test_one_layer_by_hand() -> None:
    """A class token that attends to two patches by what the image shows there."""

    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(1, 1, bias=False, batch_first=True)
            nn.init.ones_(self.attention.in_proj_weight)

        def forward(self, x: Tensor) -> Features:
            patches = x.mean((1, 2)).unsqueeze(-1)
            tokens = torch.cat([torch.ones(len(x), 1, 1), patches], 1)
            out = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            return Features(out[:, 0], out[:, 1:], grid=(1, 2))

    model = model_of(ModuleBackbone(OneLayer(), (3, 4, 2)))
    image = torch.tensor([2.0, -1.0]).expand(1, 3, 4, 2)
    attention = torch.tensor([1.0, 2.0, -1.0]).softmax(0)
    assert_close(rollout(model, image)[0, 0, 0], attention[1:] / 2)


def test_all_concepts_have_one_map_and_images_do_not_mind_their_neighbours() -> None:
    model = timm_model("test_vit")
    image = images_for(model, 4)
    maps = rollout(model, image)
    assert torch.equal(maps, maps[:, :1].expand_as(maps))
    assert (maps[0] - maps[1]).abs().max() > 1e-6
    for b in range(4):
        assert_close(rollout(model, image[b : b + 1])[0], maps[b], rtol=1e-4, atol=1e-6)
    assert torch.equal(concept_maps(model, image, "attention_rollout", ["wet"], "method"), maps[:, :1])


# ---------------------------------------------------------------- what is left behind


def flags(model: CBMModule) -> list[bool]:
    return [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]


def test_layers_fuse_again_afterwards() -> None:
    model = timm_model("test_vit")
    blocks = model.backbone.model.blocks
    blocks[2].attn.fused_attn = False
    before = flags(model)
    assert True in before
    rollout(model, images_for(model))
    assert flags(model) == before
    blocks[3].register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rollout(model, images_for(model))
    assert flags(model) == before
    assert [len(module._forward_hooks) for module in model.modules() if module._forward_hooks] == [1]


@pytest.mark.parametrize("kind", ["by hand", "clip"])
def test_compiled_backbones_have_the_same_map(kind: str) -> None:
    model = TRANSFORMERS[kind][0]()
    image = images_for(model)
    expected = rollout(model, image)
    model.backbone.compile(backend="eager")
    scores_of(model, image)
    assert_close(rollout(model, image), expected)


def test_arguments_of_attention_by_position() -> None:
    class ByPosition(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 8, stride=8)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Features:
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            # no padding mask, and no weights
            tokens = tokens + self.attention(tokens, tokens, tokens, None, False)[0]
            return Features(tokens.mean(1), tokens, grid=(4, 4))

    assert rollout(model_of(ByPosition()), images()).shape == (2, 3, 4, 4)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", REFUSED)
def test_other_backbones_say_what_would_help(kind: str) -> None:
    model = REFUSED[kind]()
    before = flags(model)
    with pytest.raises(ValueError, match="attention_rollout needs a vision transformer whose every layer attends glob"):
        rollout(model, images_for(model))
    assert not has_hooks(model)
    assert flags(model) == before
