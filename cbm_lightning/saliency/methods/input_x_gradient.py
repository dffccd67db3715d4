"""The slope of the concept score times the pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cbm_lightning.saliency.methods.pixels import PixelAttribution


class InputXGradient(PixelAttribution):
    """Gradient times input (Shrikumar et al. 2017), by captum. A pixel of the mean colour has no saliency.

    Args:
        channels: See `PixelAttribution`.
        batch_size: Images a pass at most.
    """

    name = "input_x_gradient"

    def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
        """Captum's ``InputXGradient``."""
        from captum.attr import InputXGradient as Explainer

        return Explainer(forward)
