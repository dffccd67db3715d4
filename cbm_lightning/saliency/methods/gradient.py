"""The slope of the concept score in each pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cbm_lightning.saliency.methods.pixels import ChannelReduction, PixelAttribution


class Gradient(PixelAttribution):
    """How much the concept score changes with each pixel (Simonyan et al. 2014), by captum.

    Args:
        channels: See `PixelAttribution`; the largest absolute slope by default, as in the paper.
        batch_size: Images a pass at most.
    """

    name = "gradient"

    def __init__(self, channels: ChannelReduction = "max_abs", batch_size: int = 32) -> None:
        super().__init__(channels, batch_size)

    def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
        """Captum's ``Saliency``."""
        from captum.attr import Saliency

        return Saliency(forward)

    def options(self) -> dict[str, Any]:
        """Signed slopes; ``channels`` says what becomes of the sign."""
        return {"abs": False}
