"""Every bottleneck of the package, as the contract tests make it, and what each claims beyond the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from toy_images import CLASSES, NAMES, ToyConv, batch_of

from cbm_lightning import CBMModule, bottlenecks
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.heads import LabelHead
from cbm_lightning.interventions import Samples
from cbm_lightning.interventions.person import Answers
from cbm_lightning.types import Batch, Intervention, Prediction


@dataclass(frozen=True)
class Case:
    """A bottleneck and its claims.

    Attributes:
        make: Makes it.
        head: Makes its head; its own by default.
        options: Of the module.
        closed: Whether the label follows from the concepts alone, once all of them are corrected.
        exact: Whether a corrected concept is predicted as it was corrected.
        exports: Whether ``torch.export`` takes the prediction path.
        losses: Names of its losses in a training step, beside ``label``.
        compares: Whether a loss compares the samples of a batch, and so depends on how these are divided.
    """

    make: Callable[[], Bottleneck]
    head: Callable[[], LabelHead] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    closed: bool = True
    exact: bool = True
    exports: bool = True
    losses: tuple[str, ...] = ("concept",)
    compares: bool = False


def texts() -> ConceptSet:
    """The toy concepts with text vectors of the width of the toy backbone."""
    vectors = torch.randn(len(NAMES), 8, generator=torch.Generator().manual_seed(1))
    return ConceptSet(NAMES, embeddings=vectors)


CASES: dict[str, Case] = {
    "linear": Case(lambda: bottlenecks.LinearBottleneck()),
    "logits": Case(lambda: bottlenecks.LinearBottleneck("logits", randint=0.3)),
    "hard": Case(lambda: bottlenecks.LinearBottleneck("hard")),
    "hybrid": Case(lambda: bottlenecks.LinearBottleneck(extra_dims=2), closed=False),
    "gated": Case(lambda: bottlenecks.LinearBottleneck(gates=True), losses=("concept", "l0")),
    "embedding": Case(lambda: bottlenecks.EmbeddingBottleneck(3), closed=False),
    "similarity": Case(lambda: bottlenecks.SimilarityBottleneck(), options={"concepts": texts()}, losses=()),
    "probcbm": Case(lambda: bottlenecks.ProbabilisticBottleneck(4, samples=8), losses=("concept", "kl")),
    "probcbm, sampled": Case(
        lambda: bottlenecks.ProbabilisticBottleneck(4, samples=8, inference="sample"), losses=("concept", "kl")
    ),
    "ecbm": Case(lambda: bottlenecks.EnergyBottleneck(16, steps=2), losses=("concept", "coherence", "association")),
    "scbm": Case(lambda: bottlenecks.StochasticBottleneck(samples=12), losses=("concept", "precision")),
    "scbm, global": Case(
        lambda: bottlenecks.StochasticBottleneck("global", samples=12), losses=("concept", "precision")
    ),
    "autoregressive": Case(lambda: bottlenecks.AutoregressiveBottleneck(hidden=6, samples=12)),
    "intcem": Case(
        lambda: bottlenecks.InterventionAwareBottleneck(3, unit="concept", hidden=(8,)),
        closed=False,
        losses=("concept", "imitation"),
    ),
    "sparse_cbm": Case(
        lambda: bottlenecks.ConceptLayerBottleneck(), options={"concepts": texts()}, losses=("gumbel",), compares=True
    ),
    "botcl": Case(
        lambda: bottlenecks.SlotBottleneck(width=8, initial_sum=1.0),
        options={"concepts": 5},
        losses=("retrieval", "area", "quantization", "distinctiveness", "consistency"),
        compares=True,
    ),
    "sl_cbm": Case(
        lambda: bottlenecks.SpatialBottleneck(losses=("entropy", "mask")), losses=("concept", "entropy", "mask")
    ),
}


def make(name: str, **options: Any) -> CBMModule:
    """The model of a case, with drawn weights that are the same each time."""
    case = CASES[name]
    torch.manual_seed(3)
    given = {"concepts": ConceptSet(NAMES), "num_classes": len(CLASSES), **case.options, **options}
    backbone = ToyConv(dropout=0.0)
    with torch.no_grad():
        for weight in backbone.parameters():
            weight.mul_(3.0)  # images that differ for rounded concepts too
    return CBMModule(backbone, case.make(), None if case.head is None else case.head(), **given)


def batch(n: int = 6, seed: int = 0) -> Batch:
    """Pictures of spots with masks; annotations are whole numbers, as many loaders give them."""
    rows = batch_of(n, "masks", seed)
    return {**rows, "concepts": rows["concepts"].long()}


def correction(model: CBMModule, prediction: Prediction, which: str, seed: int = 0) -> Intervention:
    """Corrections of ``"no"``, ``"some"`` or ``"all"`` concepts to drawn values of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    shape = prediction.concepts.probs.shape
    mask = {"no": torch.zeros(shape).bool(), "all": torch.ones(shape).bool()}.get(which)
    mask = torch.rand(shape, generator=generator) < 0.5 if mask is None else mask
    return Intervention(mask, (torch.rand(shape, generator=generator) < 0.5).float())


def samples(prediction: Prediction, content: Batch) -> Samples:
    """What a study corrects: the batch, about which a person knows everything."""
    # of discovered concepts nobody knows the truth, but a person may still set them
    known = content["concepts"].float()
    truth = known if known.shape == prediction.concepts.probs.shape else (prediction.concepts.probs < 0.5).float()
    everything = torch.ones_like(truth, dtype=torch.bool)
    index = torch.arange(len(truth))
    return Samples(prediction, Answers(truth, truth, everything), content["label"], index, everything[:, 0])
