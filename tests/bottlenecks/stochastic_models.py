"""Small stochastic bottlenecks with drawn weights, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cbm_lightning.bottlenecks import StochasticBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, LossContext

ABC = ConceptSet(["a", "b", "c"])
GROUPED = ConceptSet(
    ["red", "wet", "blue", "green"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["categorical", "binary", "categorical", "categorical"],
)


def make(*args: Any, concepts: ConceptSet = ABC, strength: float = 1.0, **options: Any) -> StochasticBottleneck:
    """A bottleneck in evaluation mode on features of width 5, with weights that make the covariances differ."""
    bottleneck = StochasticBottleneck(*args, **{"samples": 40, **options})
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    with torch.no_grad():
        for weight in bottleneck.parameters():
            weight.normal_(0.0, strength)
    return bottleneck.eval()


def predict(bottleneck: StochasticBottleneck, n: int = 6) -> ConceptOutput:
    return bottleneck(Features(torch.randn(n, 5)))


def covariance_of(output: ConceptOutput) -> Tensor:
    scale = output.extras["scale"]
    return scale @ scale.mT


def context(**options: Any) -> LossContext:
    nothing = torch.nn.Identity()
    return LossContext(nothing, lambda logits, label: logits.sum(), nothing, torch.zeros(1, 1))
