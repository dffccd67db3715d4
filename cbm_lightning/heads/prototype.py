"""A prototype a class: the head that classifies by distance (Kim et al., ICML 2023)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cbm_lightning.heads.base import LabelHead
from cbm_lightning.labels import Task
from cbm_lightning.types import ConceptOutput, FeatureDims, ValueLayout


class PrototypeHead(LabelHead):
    """Class logits as negative distances to learned prototypes (Probabilistic CBM, Kim et al. 2023).

    ``h = W z + b`` and ``logit_y = -d * sqrt(mean((h - g_y)^2))`` with a prototype ``g_y`` a class and a learned scale
    ``d``. A yes or no (a binary label, each of several labels) has two prototypes, and its logit is the difference.
    Predicted and corrected concepts go the same way, at the same scale.

    Args:
        hidden: Width of the space of the prototypes; 128 in the paper.
        scale: Where the scale ``d`` starts; 5 in the paper.

    Raises:
        ValueError: ``hidden`` is below 1 or ``scale`` is not positive.

    Example:
        >>> head = PrototypeHead(hidden=16)
        >>> head.build(FeatureDims(8), ValueLayout(concepts=3, width=4), num_classes=2, task="multiclass")
        >>> values = torch.randn(5, 12)
        >>> head.classify(values, None).shape
        torch.Size([5, 2])
    """

    def __init__(self, hidden: int = 128, scale: float = 5.0) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"hidden: expected a width of at least 1, got {hidden}")
        if not 0.0 < scale < math.inf:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        self.hidden = hidden
        self.initial_scale = scale

    def build(self, dims: FeatureDims, layout: ValueLayout, num_classes: int, task: Task) -> None:
        """Make the linear map, and prototypes drawn from the standard normal distribution."""
        super().build(dims, layout, num_classes, task)
        self.project = nn.Linear(layout.size, self.hidden)
        outcomes = 1 if task == "multiclass" else 2
        self.prototypes = nn.Parameter(torch.randn(outcomes, self.num_outputs, self.hidden))
        self.scale = nn.Parameter(torch.tensor(float(self.initial_scale)))

    def classify(self, values: Tensor, output: ConceptOutput) -> Tensor:
        """Compare with the prototypes, in single precision."""
        with torch.autocast(values.device.type, enabled=False):
            weight, bias = self.project.weight.float(), self.project.bias.float()
            prototypes = self.prototypes.float().flatten(0, 1)
            scaled: Tensor = self.scale.float() * root_mean_square(linear(values.float(), weight, bias), prototypes)
            if self.task == "multiclass":
                return -scaled
            absent, present = scaled.unflatten(-1, (2, self.num_outputs)).unbind(-2)
            difference: Tensor = absent - present
            return difference

    @torch.no_grad()
    def uncertainty(self, output: ConceptOutput) -> Tensor | None:
        """``[B]`` the geometric mean of the variances of ``h`` along its principal axes.

        These are the singular values of ``W S W^T``, where ``S`` holds the variances of the concept embeddings; of a
        space wider than they are, the ones that are not zero of necessity. It is 0 where so many concepts are corrected
        that ``h`` no longer varies along all axes.

        Returns:
            None with a bottleneck that predicts no variances: it keeps no ``log_variance [B, K, m]`` in the extras.
        """
        held = output.extras.get("log_variance")
        if held is None:
            return None
        # a determinant of this size needs double precision, which not every device has
        log_variance = held.flatten(1).cpu().double()
        weight = self.project.weight[:, : log_variance.shape[1]].cpu().double()
        axes = min(weight.shape)
        if axes == len(weight):
            covariance = (weight * log_variance.exp().unsqueeze(1)) @ weight.T
            volume = torch.linalg.slogdet(covariance).logabsdet
        else:
            volume = torch.linalg.slogdet(weight.T @ weight).logabsdet + log_variance.sum(1)
        varies = log_variance.isfinite().sum(1) >= axes
        return torch.where(varies, (volume / axes).exp(), 0.0).to(held.device, torch.float32)


def root_mean_square(points: Tensor, centres: Tensor) -> Tensor:
    """``[..., C]`` distances of ``[..., H]`` points to ``[C, H]`` centres, divided by the square root of ``H``.

    By a matrix product: with many samples and classes all differences would not fit into memory.
    """
    squared = points.square().sum(-1, keepdim=True) - 2.0 * (points @ centres.T) + centres.square().sum(-1)
    # the root of zero has no gradient
    return (squared / points.shape[-1]).clamp(min=1e-12).sqrt()
