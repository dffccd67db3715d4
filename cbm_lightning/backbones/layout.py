"""Where a timm model keeps its patch tokens: in a feature map, in a sequence, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cbm_lightning.backbones.base import split_map

Grid = tuple[int, int]


@dataclass(frozen=True)
class TokenLayout:
    """How to read tokens out of what ``forward_features`` of one model returns.

    Attributes:
        rank: Dimensions of the output: 4 for a map, 3 for a sequence, 0 where it holds no patch tokens.
        channels_last: Whether a map is ``[B, h, w, D]``.
        prefix: Class, distillation and register tokens before the patches of a sequence.
        reduction: Pixels a patch and side, which gives a sequence its grid.
        padded: Whether a last, partial patch is kept (the model pads) or lost.
    """

    rank: int
    channels_last: bool = False
    prefix: int = 0
    reduction: int = 1
    padded: bool = False

    @classmethod
    def of(cls, model: Any, output: Any, height: int, width: int) -> TokenLayout:
        """Find the layout from an example.

        Args:
            model: A timm model.
            output: What its ``forward_features`` returned for an image of the given size.
            height: Pixels of the image.
            width: Pixels of the image.
        """
        if not isinstance(output, Tensor):
            return cls(rank=0)  # several scales at once
        if output.ndim == 4:
            return cls(rank=4, channels_last=getattr(model, "output_fmt", "NCHW") == "NHWC")
        feature_info = getattr(model, "feature_info", None)
        if output.ndim != 3 or not feature_info:
            return cls(rank=0)
        declared = getattr(model, "num_prefix_tokens", None)
        reduction = int(feature_info[-1]["reduction"])
        for padded in (False, True):
            h, w = _grid(height, width, reduction, padded)
            prefix = output.shape[1] - h * w
            if prefix == declared or (declared is None and prefix in (0, 1)):
                return cls(rank=3, prefix=prefix, reduction=reduction, padded=padded)
        return cls(rank=0)  # class tokens only

    def read(self, output: Any, height: int, width: int) -> tuple[Tensor | None, Grid | None]:
        """Tokens ``[B, N, D]`` in raster order and their grid, for an image of the given size.

        Raises:
            RuntimeError: The patches do not fill the grid, because the model drops some.
        """
        if self.rank == 0:
            return None, None
        if self.rank == 4:
            return split_map(output, self.channels_last)
        grid = _grid(height, width, self.reduction, self.padded)
        tokens = output[:, self.prefix :]
        if tokens.shape[1] != grid[0] * grid[1]:
            raise RuntimeError(
                f"{tokens.shape[1]} patch tokens do not fill the grid {grid} of a {height}x{width} image; a model that "
                "drops patches (patch_drop_rate) has no concept maps"
            )
        return tokens, grid


def _grid(height: int, width: int, reduction: int, padded: bool) -> Grid:
    rounded: Callable[[float], int] = math.ceil if padded else math.floor
    return rounded(height / reduction), rounded(width / reduction)
