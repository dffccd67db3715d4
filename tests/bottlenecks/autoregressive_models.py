"""Small autoregressive bottlenecks with drawn weights, and their equations written out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from cbm_lightning.bottlenecks import AutoregressiveBottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.losses import ConceptLoss
from cbm_lightning.types import ConceptOutput, FeatureDims, Features, LossContext

ABC = ConceptSet(["a", "b", "c"])
# the group comes in the middle, with a member on either side of a concept
GROUPED = ConceptSet(
    ["dry", "red", "wet", "blue", "green"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["binary", "categorical", "binary", "categorical", "categorical"],
)


def make(concepts: ConceptSet = ABC, strength: float = 1.0, **options: Any) -> AutoregressiveBottleneck:
    """A bottleneck in evaluation mode on features of width 5 whose concepts depend on each other."""
    bottleneck = AutoregressiveBottleneck(**{"hidden": 4, "samples": 40, **options})
    bottleneck.build(FeatureDims(5), concepts, num_classes=2)
    with torch.no_grad():
        for weight in bottleneck.parameters():
            weight.normal_(0.0, strength)
        bottleneck.from_concepts.mul_(2.0)
    return bottleneck.eval()


def predict(bottleneck: AutoregressiveBottleneck, n: int = 4) -> ConceptOutput:
    with torch.no_grad():
        return bottleneck(Features(torch.randn(n, 5)))


def score(bottleneck: AutoregressiveBottleneck, x: Tensor, k: int, before: dict[int, float]) -> float:
    """Logit of a concept of one sample: a network on the features and the concepts before it."""
    hidden = bottleneck.hidden
    total = bottleneck.out_bias[k].item()
    for unit in range(hidden):
        row = k * hidden + unit
        inner = (bottleneck.from_features.weight[row] @ x + bottleneck.from_features.bias[row]).item()
        inner += sum(bottleneck.from_concepts[k, unit, j].item() * c for j, c in before.items())
        total += bottleneck.out_weight[k, unit].item() * (inner if inner > 0 else 0.01 * inner)
    return total


def chances(bottleneck: AutoregressiveBottleneck, x: Tensor) -> dict[tuple[int, ...], float]:
    """Probability of every combination of three binary concepts, by the chain rule."""
    found = {}
    for row in itertools.product((0, 1), repeat=3):
        chance = 1.0
        for k in range(3):
            p = 1 / (1 + math.exp(-score(bottleneck, x, k, {j: float(row[j]) for j in range(k)})))
            chance *= p if row[k] else 1 - p
        found[row] = chance
    return found


def context(loss: ConceptLoss | None = None, concepts: ConceptSet = ABC) -> LossContext:
    loss = ConceptLoss() if loss is None else loss
    loss.build(concepts)
    return LossContext(loss, lambda logits, label: logits.sum(), torch.nn.Identity(), torch.zeros(1, 1))
