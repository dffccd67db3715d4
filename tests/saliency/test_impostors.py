"""What has the shape of a feature map and is none: attention over tokens, and gates of one channel."""

from __future__ import annotations

import pytest
import torch
from saliency.models import conv_net, images, model_of, place_of
from torch import Tensor, nn

from cbm_lightning.saliency import SmoothGrad, concept_maps


class PlainAttention(nn.Module):
    """Self-attention as people write it, its weights ``[B, 1, T, T]`` through a module of their own."""

    def __init__(self, width: int, dropout: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.weights = nn.Sequential(nn.Softmax(dim=-1), nn.Dropout(0.1)) if dropout else nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        return x + (self.weights(query @ key.transpose(-2, -1)) @ value).squeeze(1)


class PlainViT(nn.Module):
    """A class token and 2x2 patches: fewer tokens than pixels, so that attention looks like a map of 5x5 cells."""

    def __init__(self, dropout: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 16, stride=16)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.blocks = nn.Sequential(PlainAttention(12, dropout), PlainAttention(12, dropout))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        classed: Tensor = self.blocks(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1))
        return classed[:, 0]


class AttentionPooling(nn.Module):
    """A map ``[B, 12, 8, 8]`` averaged with weights from a score of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*conv_net())
        self.score = nn.Conv2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.features(x)
        weights = self.score(found).flatten(2).softmax(-1)
        pooled: Tensor = (found.flatten(2) * weights).sum(-1)
        return pooled


class Gated(nn.Module):
    """A map multiplied by a gate of one channel, the last thing that happens before pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*conv_net())
        self.gate = nn.Sequential(nn.Conv2d(12, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        found = self.features(x)
        return (found * self.gate(found)).mean((2, 3))


@pytest.mark.parametrize("dropout", [False, True])
def test_attention_over_tokens_is_no_map(dropout: bool) -> None:
    torch.manual_seed(0)
    name, place = place_of(model_of(PlainViT(dropout)))
    assert name.endswith("blocks.1.norm")
    assert (place.grid, place.prefix) == ((2, 2), 1)


@pytest.mark.parametrize("net", [AttentionPooling, Gated])
def test_a_gate_of_one_channel_is_no_map(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = model_of(net())
    name, place = place_of(model)
    assert name.partition("features")[1] == "features"
    assert place.grid == (8, 8)
    maps = concept_maps(model, images(), "grad_cam", resolution="method").flatten(2)
    # concepts differ in more than their sign
    assert torch.cosine_similarity(maps[:, 0], maps[:, 1]).abs().max() < 0.999


def test_smooth_grad_seeds_no_device_that_it_does_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seed: int) -> None:
        raise AssertionError("seeded every device")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    maps = concept_maps(model_of(nn.Sequential(*conv_net())), images(), SmoothGrad(samples=2))
    assert maps.isfinite().all()
