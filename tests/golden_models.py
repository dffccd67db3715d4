"""Models rebuilt from reference numbers, so that their concepts can be corrected by our engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbm_lightning import CBMModule, ConceptSet, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.interventions import InterventionEngine, Policy, Samples, Units
from cbm_lightning.interventions.person import Answers
from cbm_lightning.types import ConceptOutput, Features, Prediction


def load(shared: Path, name: str) -> dict[str, Tensor]:
    """The arrays of a fixture; integers as int64, numbers in single precision."""
    with np.load(shared / "golden" / "dev" / f"{name}.npz", allow_pickle=False) as arrays:
        found = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    return {key: value.float() if value.is_floating_point() else value.long() for key, value in found.items()}


def grouped(group_ids: Tensor) -> ConceptSet:
    """Concepts ``c0 ...`` in groups ``g0 ...``."""
    names = [f"c{k}" for k in range(len(group_ids))]
    groups = {
        f"g{g}": [names[k] for k in (group_ids == g).nonzero().flatten().tolist()] for g in range(group_ids.max() + 1)
    }
    return ConceptSet(names, groups)


def linear_model(
    data: dict[str, Tensor], link: str, bounds: tuple[Tensor, Tensor] | None = None
) -> tuple[CBMModule, Prediction]:
    """A model that reads its concept scores off the input, with the stored head.

    Args:
        data: A fixture with ``W``, ``b``, ``group_ids`` and ``bottleneck`` (and ``concept_logits``, if it has them).
        link: The link of the bottleneck.
        bounds: ``[K]`` values for "absent" and "present", where they are not 0 and 1.
    """
    concepts = grouped(data["group_ids"])
    bottleneck = LinearBottleneck(link)
    model = build(bottleneck, concepts, data)
    with torch.no_grad():
        bottleneck.scores.weight.copy_(torch.eye(len(concepts)))
        bottleneck.scores.bias.zero_()
        if bounds is not None:
            bottleneck.value_range.copy_(torch.stack(bounds))
    scores = data.get("concept_logits")
    if scores is None:
        scores = data["bottleneck"].logit() if link == "sigmoid" else data["bottleneck"]
    with torch.no_grad():
        return model, model({"embedding": scores})


def embedding_model(data: dict[str, Tensor]) -> tuple[CBMModule, Prediction]:
    """An embedding bottleneck with the stored vectors and probabilities."""
    concepts = grouped(data["group_ids"])
    pairs = torch.stack([data["pos_embeddings"], data["neg_embeddings"]], 2)
    bottleneck = EmbeddingBottleneck(embedding_size=pairs.shape[-1])
    model = build(bottleneck, concepts, data)
    probs = data["concept_probs"]
    features = Features(torch.zeros(len(probs), len(concepts)))
    output = ConceptOutput(features, probs.logit(), probs, bottleneck.mix(pairs, probs), extras={"pairs": pairs})
    with torch.no_grad():
        return model, model.decide(output)


def build(bottleneck: Bottleneck, concepts: ConceptSet, data: dict[str, Tensor]) -> CBMModule:
    """A model in evaluation mode with the stored linear head."""
    model = CBMModule(Identity(len(concepts)), bottleneck, concepts=concepts, num_classes=len(data["b"])).eval()
    with torch.no_grad():
        model.head.linear.weight.copy_(data["W"])
        model.head.linear.bias.copy_(data["b"])
    return model


def samples_of(prediction: Prediction, concepts: Tensor, label: Tensor) -> Samples:
    """Samples whose every concept can be corrected to the given one."""
    concepts = concepts.float()
    return answered(prediction, Answers(concepts, concepts, torch.ones_like(concepts, dtype=torch.bool)), label)


def answered(prediction: Prediction, answers: Answers, label: Tensor) -> Samples:
    """Samples of which a person says this."""
    everyone = torch.ones(len(label), dtype=torch.bool)
    return Samples(prediction, answers, label, torch.arange(len(label)), everyone)


def engine_of(model: CBMModule, unit: Any = "concept", **options: Any) -> InterventionEngine:
    """An engine whose units are concepts, groups, or a mapping of names."""
    of_units = {name: options.pop(name) for name in ("reduce", "costs") if name in options}
    return InterventionEngine(model, Units.make(model.concept_set, unit, **of_units), **options)


def planned(engine: InterventionEngine, samples: Samples, policy: Policy, last: int | None = None) -> Tensor:
    """``[B, U]`` steps that a policy decides on."""
    policy.build(engine.units)
    with torch.inference_mode():
        return engine.plan([samples], policy, last)[0]


def steps_along(order: Tensor, samples: int) -> Tensor:
    """``[B, U]`` steps along an order: ``[B, U]`` units a sample, or ``[B U]`` flat (sample, unit) pairs."""
    if order.ndim == 2:
        places = torch.arange(1, order.shape[1] + 1).expand_as(order)
        return torch.empty_like(order).scatter_(1, order, places)
    steps = torch.empty_like(order)
    steps[order] = torch.arange(len(order)) // samples + 1
    return steps.view(samples, -1)


def accuracies(engine: InterventionEngine, samples: Samples, steps: Tensor, budgets: int | None = None) -> Tensor:
    """``[R]`` label accuracies at budgets 0, 1, ..."""
    last = len(engine.units) if budgets is None else budgets - 1
    with torch.inference_mode():
        logits = engine.rollout(samples, steps, range(last + 1)).logits
    return (logits.argmax(-1) == samples.label).float().mean(1)


def mask_after(engine: InterventionEngine, steps: Tensor, budget: int) -> Tensor:
    """``[B, K]`` bool, what was asked about at a budget."""
    return engine.units.expand(steps <= budget)
