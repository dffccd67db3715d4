"""Occlusion: how much the score falls when a window of the image is covered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.saliency.methods.base import SaliencyMethod
from cbm_lightning.saliency.methods.pixels import check_at_least
from cbm_lightning.saliency.subject import Subject


class Occlusion(SaliencyMethod):
    """The fall of the concept score under a covering window, averaged over windows (Zeiler and Fergus 2014), by captum.

    It needs no gradient, and one pass a window serves all concepts of an image.

    Args:
        window: Side of the window in pixels; an eighth of the image by default.
        stride: Pixels from window to window; half the window by default.
        baseline: Value of covered pixels as the model reads them; 0 is the mean colour of normalised images.
        batch_size: Images a pass at most.

    Raises:
        ValueError: A size is below 1, or (when it is used) the window is larger than the image or smaller than the
            stride.
    """

    name = "occlusion"

    def __init__(
        self, window: int | None = None, stride: int | None = None, baseline: float = 0.0, batch_size: int = 32
    ) -> None:
        given = {"window": window, "stride": stride, "batch_size": batch_size}
        check_at_least(1, **{field: value for field, value in given.items() if value is not None})
        self.window, self.stride, self.baseline, self.batch_size = window, stride, baseline, batch_size

    def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
        """Maps in the resolution of the image."""
        from captum.attr import Occlusion as Explainer

        channels, height, width = image.shape[1:]
        window = self.window or max(min(height, width) // 8, 1)
        stride = self.stride or max(window // 2, 1)
        if window > min(height, width) or stride > window:
            raise ValueError(
                f"window, stride: expected a window within {height}x{width} pixels and a stride of at most its side, "
                f"got {window} and {stride}"
            )
        options: dict[str, Any] = {
            "sliding_window_shapes": (channels, window, window),
            "strides": (channels, stride, stride),
            "baselines": self.baseline,
            "perturbations_per_eval": self.batch_size,
        }
        maps = image.new_zeros(len(rows), height, width)
        for row in rows.unique().tolist():
            pairs = (rows == row).nonzero()[:, 0]
            wanted = concepts[pairs]

            def scores(pixels: Tensor, wanted: Tensor = wanted) -> Tensor:
                return subject.logits(pixels)[:, wanted]

            with torch.no_grad():
                fall = Explainer(scores).attribute(image[row : row + 1], **options)
            # a window covers all channels, which therefore agree
            maps[pairs] = fall[:, 0].to(maps)
        return maps
