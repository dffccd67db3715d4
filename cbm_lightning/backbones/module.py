"""`ModuleBackbone`: any ``nn.Module`` as a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbm_lightning.backbones.base import Backbone, probe, split_map
from cbm_lightning.configurable import Configurable
from cbm_lightning.types import FeatureDims, Features


class ModuleBackbone(Backbone):
    """Wraps a module that returns vectors ``[B, D]``, a map ``[B, D, h, w]``, tokens ``[B, N, D]`` or `Features`.

    Maps and tokens are averaged for the pooled vector.

    Args:
        module: The module.
        input_size: Shape of one input, for measuring the widths.
        pooled_dim: Width of the pooled vector, for modules that cannot be run on zeros; then nothing is measured.
        token_dim: Width of the tokens, along with ``pooled_dim``; None if there are none.
        frozen: Never train: no gradients, evaluation mode always.
        freeze_norm: Train, but keep BatchNorm layers in evaluation mode with fixed statistics.

    Raises:
        ValueError: The module does not run on an input of that size, returns something else, or ``token_dim`` is given
            without ``pooled_dim``.

    Example:
        >>> backbone = ModuleBackbone(nn.Conv2d(3, 8, 4, stride=4), input_size=(3, 32, 32))
        >>> backbone.dims
        FeatureDims(pooled=8, tokens=8, grid=(8, 8))
    """

    def __init__(
        self,
        module: nn.Module,
        input_size: Sequence[int] = (3, 224, 224),
        *,
        pooled_dim: int | None = None,
        token_dim: int | None = None,
        frozen: bool = False,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__(frozen=frozen, freeze_norm=freeze_norm)
        if token_dim is not None and pooled_dim is None:
            raise ValueError("pooled_dim: expected a width beside token_dim, got None")
        self.module = module
        self.dims = self._measure(input_size) if pooled_dim is None else FeatureDims(pooled_dim, token_dim)
        self.freeze()

    def encode(self, x: Tensor) -> Features:
        """Features of an input batch."""
        output = self.module(x)
        if isinstance(output, Features):
            return output
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"{type(self.module).__name__} returned {found}; a backbone returns [B, D], [B, D, h, w], [B, N, D] or "
                "Features"
            )
        if output.ndim == 2:
            return Features(output)
        tokens, grid = split_map(output) if output.ndim == 4 else (output, None)
        return Features(tokens.mean(1), tokens, grid=grid)

    def portable_init_args(self) -> dict[str, Any]:
        """The arguments, if the module is a part that records its own.

        Raises:
            TypeError: It is a bare module, which cannot be written into a checkpoint.
        """
        if not isinstance(self.module, Configurable):
            raise TypeError(
                f"the backbone is a bare {type(self.module).__name__}, which cannot be written into a checkpoint; "
                "hand the module over again when loading"
            )
        return super().portable_init_args()

    def _measure(self, input_size: Sequence[int]) -> FeatureDims:
        parameter = next(self.module.parameters(), None)
        device = None if parameter is None else parameter.device
        try:
            return probe(self.encode, self, torch.zeros(1, *input_size, device=device))
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(
                f"input_size: {type(self.module).__name__} does not run on an input of shape {list(input_size)} "
                f"({error}); give the right input_size, or pooled_dim and token_dim"
            ) from error
