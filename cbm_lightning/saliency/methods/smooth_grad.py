"""SmoothGrad: another attribution, averaged over noisy copies of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.methods.pixels import PixelAttribution, check_at_least
from cbm_lightning.saliency.subject import Subject

Kind = Literal["smoothgrad", "smoothgrad_sq", "vargrad"]


class SmoothGrad(PixelAttribution):
    """The mean of an attribution over images with Gaussian noise (Smilkov et al. 2017), by captum.

    The noise is drawn for each pair of an image and a concept in turn: the same call gives the same maps, but a map
    depends on what else is asked for.

    Args:
        method: What is averaged: ``"gradient"``, ``"input_x_gradient"``, ``"integrated_gradients"``, or one with
            options of its own. Its ``channels`` and ``batch_size`` count.
        samples: Noisy copies of each image.
        std: Standard deviation of the noise, in units of the pixels as the model reads them.
        kind: ``"smoothgrad"``, the mean of squares ``"smoothgrad_sq"`` (Furby et al. 2023), or the variance
            ``"vargrad"``.
        seed: Of the noise; the global random state stays as it is.

    Raises:
        ValueError: An option is out of range, or the method is none of pixels.
    """

    name = "smooth_grad"

    def __init__(
        self,
        method: str | PixelAttribution = "gradient",
        samples: int = 25,
        std: float = 0.2,
        kind: Kind = "smoothgrad",
        seed: int = 0,
    ) -> None:
        inner = SaliencyMethod.make(method)
        if not isinstance(inner, PixelAttribution) or isinstance(inner, SmoothGrad):
            raise ValueError(f"method: SmoothGrad averages attributions to pixels, not {type(inner).__name__}")
        super().__init__(inner.channels, inner.batch_size)
        check_at_least(1, samples=samples)
        if kind not in get_args(Kind):
            raise ValueError(f"kind: expected one of {get_args(Kind)}, got {kind!r}")
        if not std > 0:
            raise ValueError(f"std: expected a positive number, got {std}")
        self.inner, self.samples, self.std, self.kind, self.seed = inner, samples, float(std), kind, seed

    def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
        """Captum's ``NoiseTunnel`` around the explainer of the method."""
        from captum.attr import NoiseTunnel

        return NoiseTunnel(self.inner.explainer(forward))

    def options(self) -> dict[str, Any]:
        """One noisy copy of each image a pass, for that is what ``batch_size`` allows."""
        noise = {"nt_type": self.kind, "nt_samples": self.samples, "nt_samples_batch_size": 1, "stdevs": self.std}
        return {**self.inner.options(), **noise}

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps in the resolution of the image; captum draws from the global generator, which is put back."""
        on_gpu = image.device.type == "cuda"
        with torch.random.fork_rng([image.device] if on_gpu else []):
            # not torch.manual_seed, which would seed every device and put none of the others back
            torch.default_generator.manual_seed(self.seed)
            if on_gpu:
                with torch.cuda.device(image.device):
                    torch.cuda.manual_seed(self.seed)
            return super().attribute(subject, image, rows, concepts)
