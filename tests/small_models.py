"""Small models of every kind with drawn weights, and samples to correct: for tests of interventions."""

from __future__ import annotations

from typing import Any

import torch
from golden_models import answered
from torch import Tensor

from cbm_lightning import CBMModule, ConceptSet, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.heads import LabelHead, MLPHead, ResidualHead
from cbm_lightning.interventions import Person, Samples
from cbm_lightning.randomness import Randomness

WIDTH, CLASSES = 7, 4
CONCEPTS = ConceptSet(
    ["red", "blue", "small", "large", "huge", "wet"],
    groups={"colour": ["red", "blue"], "size": ["small", "large", "huge"]},
)
MIXED = ConceptSet(
    ["red", "blue", "green", "weight", "wet"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["categorical", "categorical", "categorical", "real", "binary"],
)


def small_model(
    bottleneck: Bottleneck,
    head: LabelHead | None = None,
    task: Any = "multiclass",
    concepts: ConceptSet = CONCEPTS,
    seed: int = 0,
) -> CBMModule:
    """A model in evaluation mode whose weights are large enough for corrections to matter."""
    classes = 2 if task == "binary" else CLASSES
    model = CBMModule(Identity(WIDTH), bottleneck, head, concepts=concepts, num_classes=classes, task=task).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
        if isinstance(bottleneck, LinearBottleneck) and bottleneck.link in ("logits", "relu"):
            spread = torch.rand(2, len(concepts), generator=generator) + 0.5
            low = torch.where(concepts.is_real(), 0.0, -spread[0] if bottleneck.link == "logits" else 0.1)
            bottleneck.value_range.copy_(torch.stack([low, torch.where(concepts.is_real(), 1.0, 2 * spread[1])]))
    return model


MODELS = {
    "sigmoid": lambda: small_model(LinearBottleneck("sigmoid")),
    "logits": lambda: small_model(LinearBottleneck("logits")),
    "relu": lambda: small_model(LinearBottleneck("relu")),
    "hard": lambda: small_model(LinearBottleneck("hard")),
    "hybrid": lambda: small_model(LinearBottleneck("logits", extra_dims=2)),
    "embedding": lambda: small_model(EmbeddingBottleneck(3)),
    "mlp": lambda: small_model(LinearBottleneck("sigmoid"), MLPHead([9])),
    "residual": lambda: small_model(LinearBottleneck("sigmoid"), ResidualHead()),
    "residual mlp": lambda: small_model(EmbeddingBottleneck(3), ResidualHead(MLPHead([9]))),
    "binary": lambda: small_model(LinearBottleneck("logits"), task="binary"),
    "multilabel": lambda: small_model(EmbeddingBottleneck(3), task="multilabel"),
    "mixed": lambda: small_model(LinearBottleneck("logits"), concepts=MIXED),
}
# where bottleneck and head are linear, so that look-ahead is a rank-one update
LINEAR = [name for name in MODELS if "mlp" not in name]


def true_concepts(concepts: ConceptSet, n: int, generator: torch.Generator) -> Tensor:
    """``[n, K]`` drawn annotations that respect the kinds."""
    drawn = (torch.rand(n, len(concepts), generator=generator) < 0.5).float()
    for members in concepts.categorical_groups():
        one = torch.randint(len(members), (n,), generator=generator)
        drawn[:, members] = torch.nn.functional.one_hot(one, len(members)).float()
    real = concepts.is_real()
    drawn[:, real] = torch.randn(n, int(real.sum()), generator=generator)
    return drawn


def small_samples(model: CBMModule, n: int = 9, missing: float = 0.0, seed: int = 1, **person: Any) -> Samples:
    """Predicted samples and what a person says of them; ``missing`` of the annotations are unknown."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prediction = model({"embedding": torch.randn(n, WIDTH, generator=generator)})
    concepts = true_concepts(model.concept_set, n, generator)
    concepts[torch.rand(concepts.shape, generator=generator) < missing] = torch.nan
    shape = (n, model.num_classes) if model.task == "multilabel" else (n,)
    label = torch.randint(2 if model.task == "multilabel" else model.num_classes, shape, generator=generator)
    randomness = Randomness(0, "person", torch.arange(n))
    answers = Person(model.concept_set, **person).answer(concepts, label, None, randomness)
    return answered(prediction, answers, label)


def rows(samples: Samples, chosen: Tensor) -> Samples:
    """Some of the samples, with what belongs to them."""
    n = len(samples)
    output = samples.prediction.concepts.map(lambda x: x[chosen] if len(x) == n else x)
    picked = samples.answers
    return Samples(
        type(samples.prediction)(samples.prediction.logits[chosen], output),
        type(picked)(picked.told[chosen], picked.truth[chosen], picked.answerable[chosen]),
        samples.label[chosen],
        samples.index[chosen],
        samples.counted[chosen],
        None if samples.group is None else samples.group[chosen],
    )
