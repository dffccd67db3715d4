"""Tiny models of every kind whose concepts can be localised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_clip import RESNET, VIT
from torch import Tensor, nn
from torch.nn.functional import gelu

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.backbones.base import Backbone
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.backbones.open_clip import OpenClipBackbone
from cbm_lightning.backbones.timm import TimmBackbone
from cbm_lightning.bottlenecks import Bottleneck, LinearBottleneck
from cbm_lightning.saliency.last_map import MapLayer, find_map
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import Features, masked_mean

NAMES = ["red", "round", "wet"]
TINY_SWIN = {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 6), "window_size": 4}


def model_of(
    backbone: Backbone | nn.Module,
    bottleneck: Bottleneck | None = None,
    concepts: Sequence[str] | ConceptSet | int = tuple(NAMES),
    size: int = 32,
) -> CBMModule:
    """A model in evaluation mode whose BatchNorm layers have seen something; a bare module takes images of ``size``."""
    wrapped = backbone if isinstance(backbone, Backbone) else ModuleBackbone(backbone, (3, size, size))
    known = list(concepts) if isinstance(concepts, tuple) else concepts
    model = CBMModule(wrapped, bottleneck or LinearBottleneck("logits"), concepts=known, num_classes=2).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            # open_clip starts the residual branches at zero
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def timm_model(name: str, bottleneck: Bottleneck | None = None, **options: Any) -> CBMModule:
    return model_of(TimmBackbone(name, **{"img_size": 64, **options}), bottleneck)


def clip_model(config: dict[str, Any], bottleneck: Bottleneck | None = None, **options: Any) -> CBMModule:
    return model_of(OpenClipBackbone("tiny", model_config=config, **options), bottleneck)


def conv_net() -> nn.Sequential:
    """Images of 32 pixels to a map ``[B, 12, 8, 8]``, with BatchNorm, dropout and a ReLU in place."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 4, stride=4),
        nn.BatchNorm2d(10),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(10, 12, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Vector(nn.Module):
    """Whatever a function makes of the images with a convolution: a vector, of which a backbone shows no map."""

    def __init__(self, read: Callable[[Vector, Tensor], Tensor], width: int = 12, side: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, side, stride=side)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


def smooth_net() -> nn.Module:
    """Smooth in its pixels."""
    return Vector(lambda net, x: torch.tanh(net.conv(torch.tanh(net.stem(x)))).mean((2, 3)))


class TinyViT(nn.Module):
    """A transformer with a class token by hand; the pooled vector is the class token or the mean of the patches.

    Args:
        pool: ``"class"`` or ``"mean"``.
        shows_tokens: Return the tokens and their grid, or the pooled vector alone.
        depth: Number of layers.
    """

    def __init__(self, pool: str = "mean", shows_tokens: bool = True, depth: int = 2) -> None:
        super().__init__()
        self.pool, self.shows_tokens = pool, shows_tokens
        self.patch = nn.Conv2d(3, 16, 8, stride=8)
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(depth))
        self.attention = nn.ModuleList(nn.MultiheadAttention(16, 2, batch_first=True) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor | Features:
        patches = self.patch(x)
        tokens = torch.cat([self.first.expand(len(x), 1, 16), patches.flatten(2).transpose(1, 2)], 1)
        for norm, attention, mlp in zip(self.norms, self.attention, self.mlp, strict=True):
            normed = norm(tokens)
            tokens = tokens + attention(normed, normed, normed, need_weights=False)[0]
            tokens = tokens + gelu(mlp(tokens))
        tokens = self.norm(tokens)
        pooled = tokens[:, 0] if self.pool == "class" else tokens[:, 1:].mean(1)
        if not self.shows_tokens:
            return pooled
        return Features(pooled, tokens[:, 1:], grid=(patches.shape[2], patches.shape[3]))


class MaskedCells(nn.Module):
    """Cells of 8 pixels, of which those that are black in the image are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 8, stride=8)

    def forward(self, x: Tensor) -> Features:
        cells = self.conv(x)
        tokens = cells.flatten(2).transpose(1, 2)
        real = nn.functional.max_pool2d(x.abs().amax(1, keepdim=True), 8).flatten(1) > 0
        return Features(masked_mean(tokens, real), tokens, real, (cells.shape[2], cells.shape[3]))


def images(n: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def images_for(model: CBMModule, n: int = 2) -> Tensor:
    """Images of the size that the backbone of a model expects."""
    size = getattr(model.backbone, "img_size", 32)
    return images(n, size if isinstance(size, int) else size[0])


def scores_of(model: CBMModule, image: Tensor) -> Tensor:
    """``[B, K]`` concept scores."""
    with torch.no_grad():
        return model(image).concepts.logits


def place_of(model: CBMModule, layer: str | None = None) -> tuple[str, MapLayer]:
    """Where Grad-CAM reads a model: the name of the module in the backbone, and the place."""
    found = find_map(Subject(model), images_for(model, 1), layer)
    return next(name for name, module in model.backbone.named_modules() if module is found.module), found


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# a model of each kind that Grad-CAM reads, and where it is last a map
MAPPED: dict[str, tuple[Callable[[], CBMModule], str, Any]] = {
    "user map": (lambda: model_of(conv_net()), "module", ((8, 8), False, None)),
    "user vector": (lambda: model_of(smooth_net()), "module.conv", ((8, 8), False, None)),
    "user vit": (lambda: model_of(TinyViT("class")), "module.norms.1", ((4, 4), False, 1)),
    "user vit, mean": (lambda: model_of(TinyViT("mean")), "module.norm", ((4, 4), False, 1)),
    "user vit, vector": (lambda: model_of(TinyViT("class", False)), "module.norms.1", ((4, 4), False, 1)),
    "timm cnn": (lambda: timm_model("test_resnet"), "model.layer4", ((2, 2), False, None)),
    "timm cnn, stage": (lambda: timm_model("test_resnet", stage=2), "model.layer2", ((8, 8), False, None)),
    "timm vit": (lambda: timm_model("test_vit"), "model.blocks.5.norm1", ((4, 4), False, 1)),
    "timm vit, mean": (lambda: timm_model("test_vit", pool="token_mean"), "model.norm", ((4, 4), False, 1)),
    "timm swin": (
        lambda: timm_model("swin_tiny_patch4_window7_224", model_args=TINY_SWIN),
        "model.norm",
        ((2, 2), True, None),
    ),
    "clip vit": (lambda: clip_model(VIT), "tower.visual.transformer.resblocks.1.ln_1", ((4, 4), False, 1)),
    "clip resnet": (lambda: clip_model(RESNET), "tower.visual.layer4", ((2, 2), False, None)),
}
