"""Integrated gradients: an account of the score from a baseline image to the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

from torch import Tensor

from cbm_lightning.saliency.methods.pixels import ChannelReduction, PixelAttribution, check_at_least

Quadrature = Literal["gausslegendre", "riemann_trapezoid", "riemann_middle", "riemann_left", "riemann_right"]


class IntegratedGradients(PixelAttribution):
    """Slopes along the line from a baseline image, times the way (Sundararajan et al. 2017), by captum.

    The sum over pixels is the score of the image less that of the baseline, up to the error of the quadrature.

    Args:
        n_steps: Points on the line, a forward and a backward pass each.
        baseline: Value of every pixel of the baseline as the model reads it; 0 is the mean colour of normalised images.
        quadrature: Rule of integration, as captum calls it.
        channels: See `PixelAttribution`.
        batch_size: Images a pass at most.

    Raises:
        ValueError: ``n_steps`` or ``batch_size`` is below 1.
    """

    name = "integrated_gradients"

    def __init__(
        self,
        n_steps: int = 50,
        baseline: float = 0.0,
        quadrature: Quadrature = "gausslegendre",
        channels: ChannelReduction = "sum",
        batch_size: int = 32,
    ) -> None:
        super().__init__(channels, batch_size)
        check_at_least(1, n_steps=n_steps)
        if quadrature not in get_args(Quadrature):
            raise ValueError(f"quadrature: expected one of {get_args(Quadrature)}, got {quadrature!r}")
        self.n_steps = n_steps
        self.baseline = baseline
        self.quadrature = quadrature

    def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
        """Captum's ``IntegratedGradients``."""
        from captum.attr import IntegratedGradients as Explainer

        return Explainer(forward)

    def options(self) -> dict[str, Any]:
        """Steps and baseline, and as many images a pass as everywhere."""
        return {
            "n_steps": self.n_steps,
            "baselines": self.baseline,
            "method": self.quadrature,
            "internal_batch_size": self.batch_size,
        }
