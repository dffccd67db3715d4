"""`Identity`: features that were computed before."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cbm_lightning.backbones.base import Backbone
from cbm_lightning.types import FeatureDims, Features


class Identity(Backbone):
    """Hands on precomputed features: vectors ``[B, D]``, or tokens ``[B, N, D]`` whose mean is the pooled vector.

    Args:
        dim: Width ``D``; taken from the datamodule by default.
        tokens: Whether the inputs are tokens.

    Attributes:
        dims: Known from construction on, or from `build` on where ``dim`` comes from the datamodule.

    Raises:
        ValueError: ``dim`` is not positive.

    Example:
        >>> backbone = Identity()
        >>> backbone.build(feature_dim=512)
        >>> backbone.dims
        FeatureDims(pooled=512, tokens=None, grid=None)
    """

    def __init__(self, dim: int | None = None, *, tokens: bool = False) -> None:
        super().__init__()
        self.tokens = tokens
        self.dim: int | None = None
        if dim is not None:
            self._set(dim)

    def build(self, feature_dim: int | None) -> None:
        """Take the width from the datamodule where none was given.

        Raises:
            ValueError: Neither knows it, or the two differ.
        """
        if feature_dim is not None and self.dim not in (None, feature_dim):
            raise ValueError(f"dim: the backbone expects features of width {self.dim}, the data has {feature_dim}")
        if self.dim is None:
            if feature_dim is None:
                raise ValueError("dim: the width of the features is unknown; give Identity(dim) or data that knows it")
            self._set(feature_dim)

    def encode(self, x: Tensor) -> Features:
        """The features as they come.

        Raises:
            ValueError: The shape is not that of the features promised.
        """
        rank = 3 if self.tokens else 2
        if x.ndim != rank or (self.dim is not None and x.shape[-1] != self.dim):
            expected = f"[B, N, {self.dim}]" if self.tokens else f"[B, {self.dim}]"
            raise ValueError(
                f"features: expected {expected}, got {list(x.shape)}; Identity(tokens=True) takes [B, N, D], "
                "tokens=False takes [B, D]"
            )
        return Features(x.mean(1), x) if self.tokens else Features(x)

    def portable_init_args(self) -> dict[str, Any]:
        """The arguments, with the width that the datamodule gave."""
        return {**super().portable_init_args(), "dim": self.dim}

    def _set(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"dim: expected a positive width, got {dim}")
        self.dim = dim
        self.dims = FeatureDims(dim, dim if self.tokens else None)
