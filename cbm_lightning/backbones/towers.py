"""The three kinds of image tower in open_clip, read in one way: the embedding of the image, and its patch tokens."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.backbones.base import split_map
from cbm_lightning.backbones.layout import Grid, TokenLayout
from cbm_lightning.modes import evaluating


class Tower(nn.Module):
    """An image tower of open_clip.

    Args:
        visual: The tower.
    """

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Grid | None]:
        """Images to their embeddings ``[B, E]``, patch tokens ``[B, N, D]`` and grid."""

    @abstractmethod
    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens ``[B, N, D]`` to ``[B, N, E]``: where an image that shows only this patch would be embedded."""


class TransformerTower(Tower):
    """A vision transformer of open_clip. Its tokens are those of the last block after the final norm."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        self._layout = TokenLayout(rank=3, reduction=visual.patch_size[0])
        # with attention pooling the final norm has the width of the embedding, not of the tokens
        self._normed = visual.attn_pool is None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Grid | None]:
        """Images to their embeddings ``[B, E]``, patch tokens ``[B, N, D]`` and grid."""
        _check_size(x, self.visual.image_size)
        out = self.visual.forward_intermediates(x, indices=1, normalize_intermediates=self._normed, output_fmt="NLC")
        tokens, grid = self._layout.read(out["image_intermediates"][0], x.shape[-2], x.shape[-1])
        return out["image_features"], tokens, grid

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens through the projection of the class token.

        Raises:
            ValueError: The tower pools by attention, which has no projection of a single token.
        """
        if not self._normed:
            raise ValueError("tokens: 'projected' is not defined for towers that pool by attention (CoCa); use 'patch'")
        projected: Tensor = tokens @ self.visual.proj
        return projected


class ResNetTower(Tower):
    """A modified ResNet of CLIP. Its tokens are the cells of the last feature map, before the attention pool."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Grid | None]:
        """Images to their embeddings ``[B, E]``, patch tokens ``[B, N, D]`` and grid."""
        size = self.visual.image_size
        _check_size(x, (size, size) if isinstance(size, int) else tuple(size))
        out = self.visual.forward_intermediates(x, indices=1)
        tokens, grid = split_map(out["image_intermediates"][0])
        return out["image_features"], tokens, grid

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens through the value and output projections of the attention pool (Zhou et al., MaskCLIP, 2022)."""
        pool = self.visual.attnpool
        projected: Tensor = pool.c_proj(pool.v_proj(tokens))
        return projected


class TimmTower(Tower):
    """A timm model as image tower (SigLIP, EVA, ConvNeXt). Its tokens are those of ``forward_features``."""

    def __init__(self, visual: Any) -> None:
        super().__init__(visual)
        height, width = visual.image_size
        with evaluating(self), torch.no_grad():
            output = visual.trunk.forward_features(torch.zeros(1, 3, height, width))
        self._layout = TokenLayout.of(visual.trunk, output, height, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Grid | None]:
        """Images to their embeddings ``[B, E]``, patch tokens ``[B, N, D]`` and grid."""
        output = self.visual.trunk.forward_features(x)
        tokens, grid = self._layout.read(output, x.shape[-2], x.shape[-1])
        return self._embed(output), tokens, grid

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens through the pooling and projection of the tower, each alone."""
        batch, count, width = tokens.shape
        alone = tokens.reshape(batch * count, 1, width)
        if self._layout.rank == 4:
            cell = (1, 1, width) if self._layout.channels_last else (width, 1, 1)
            embedded = self._embed(alone.reshape(-1, *cell))
        else:
            # the token also stands in for the class token, so that any pooling (first, mean, attention) returns it
            embedded = self._embed(alone.expand(-1, self._layout.prefix + 1, -1))
        return embedded.reshape(batch, count, -1)

    def _embed(self, output: Any) -> Tensor:
        embedded: Tensor = self.visual.head(self.visual.trunk.forward_head(output))
        return embedded


def make_tower(visual: Any) -> Tower:
    """The tower for an open_clip image model.

    Raises:
        ValueError: It is of a kind not known here.
    """
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    kinds: dict[type, type[Tower]] = {
        VisionTransformer: TransformerTower,
        ModifiedResNet: ResNetTower,
        TimmModel: TimmTower,
    }
    for kind, tower in kinds.items():
        if isinstance(visual, kind):
            return tower(visual)
    raise ValueError(f"open_clip image towers of type {type(visual).__name__} are not supported")


def _check_size(x: Tensor, expected: tuple[int, int]) -> None:
    if x.shape[-2:] != expected:
        raise ValueError(
            f"image: this tower takes {expected[0]}x{expected[1]} pixels, got {x.shape[-2]}x{x.shape[-1]}; resize the "
            "images or set img_size"
        )
