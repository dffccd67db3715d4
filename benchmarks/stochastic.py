"""Is the label better predicted by concepts that are drawn together? Drawn birds whose attributes hang together.

    python benchmarks/stochastic.py --folder runs/stochastic

A backbone is trained once a seed, with a plain linear bottleneck, and frozen. Each bottleneck is then trained anew on
its features, and its head on the annotated concepts, so that nothing but the distribution of hard concepts differs:
independent (`linear`), from a Gaussian over their scores (`scbm`, amortised and global), or one after another
(`autoregressive`). The label is a function of the attributes; half of the images hide one of them, and all are small,
so that concepts err. Attributes are independent (``correlation`` 0) or go together.

1. ``concepts`` is their accuracy, ``joint`` minus the log-likelihood of all 25 (of `scbm` with its 100 draws, so an
   upper bound), ``label`` the accuracy and ``nll`` minus the log-likelihood of the label over 100 draws of concepts;
   ``soft`` is the latter where the head reads probabilities instead.
2. What goes together in the draws: for pairs of concepts of different attributes, the covariance that the draws of an
   image have, on average over test images, and that of what probabilities leave unexplained, the products of
   ``c - p``. ``agreement`` is the correlation of the two over pairs, ``found`` the slope of the first on the second (1
   if it is as strong). ``scores`` is the correlation, over the same pairs, of the learned correlation of scores and the
   true one of the concepts (of all annotations).

Numbers are means over seeds, with standard deviations. What an earlier call left in the folder is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch import Trainer, seed_everything
from runs import spread, trained
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.bottlenecks import AutoregressiveBottleneck, Bottleneck, LinearBottleneck, StochasticBottleneck
from cbm_lightning.bottlenecks.draws import ConceptNoise
from cbm_lightning.data import CachedFeatures, RenderedBirds
from cbm_lightning.phases import Phase
from cbm_lightning.types import Batch, ConceptOutput, LossContext

QUIET: dict[str, Any] = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "logger": False,
    "accelerator": "cpu",
}
METHODS = ["linear", "scbm", "scbm, global", "autoregressive"]
DRAWS = 100


def birds(options: argparse.Namespace, correlation: float, **sizes: int) -> dict[str, Any]:
    """The birds; labels follow from attributes that are all drawn anew."""
    return {
        "rule": "linear",
        "within_class_variation": 0.0,
        "group_correlation": correlation,
        "occlusion": 0.3,
        "hide_part": 0.5,
        "size": options.pixels,
        "num_train": options.num_train,
        "num_val": 1000,
        "num_test": 2000,
        **sizes,
    }


def features(options: argparse.Namespace, correlation: float, seed: int) -> CachedFeatures:
    """The birds of a seed through the frozen backbone of that seed."""
    given = birds(options, correlation)
    model = {"backbone": {"init_args": {"img_size": options.pixels}}}
    overrides = {
        "trainer": {"max_epochs": options.backbone_epochs},
        "model": {"init_args": model},
        "data": {"init_args": given},
    }
    backbone = trained("quickstart", f"backbone-{correlation}", seed, options.folder, overrides).backbone
    images = RenderedBirds(**given, seed=seed, batch_size=256)
    return CachedFeatures(images, backbone, cache_dir=str(options.folder / "features"), batch_size=128, seed=seed)


def bottleneck(name: str) -> tuple[Bottleneck, dict[str, float]]:
    """A method and the weights of its losses, those of its recipe."""
    match name:
        case "linear":
            return LinearBottleneck("sigmoid"), {}
        case "autoregressive":
            return AutoregressiveBottleneck(samples=DRAWS), {}
        case "scbm":
            return StochasticBottleneck(samples=DRAWS), {"precision": 1.0}
        case _:
            return StochasticBottleneck("global", samples=DRAWS), {"precision": 1.0}


def fitted(name: str, options: argparse.Namespace, seed: int, data: CachedFeatures) -> CBMModule:
    """A method trained on the features: the concepts, then the head on annotations."""
    seed_everything(seed)
    method, weights = bottleneck(name)
    phases = [
        Phase("concepts", ["bottleneck"], options.epochs, loss_weights={"label": 0.0}),
        Phase("labels", ["head"], options.head_epochs, "true", {"concept": 0.0, "precision": 0.0}, lr=0.03),
    ]
    if name not in ("scbm", "scbm, global"):
        phases[1] = Phase("labels", ["head"], options.head_epochs, "true", {"concept": 0.0}, lr=0.03)
    model = CBMModule(
        "identity", method, data=data, phases=phases, loss_weights=weights, lr=options.lr, lr_scheduler="OneCycleLR"
    )
    epochs = options.epochs + options.head_epochs
    Trainer(max_epochs=epochs, limit_val_batches=0, num_sanity_val_steps=0, **QUIET).fit(model, data)
    return model.eval()


@torch.no_grad()
def row(name: str, model: CBMModule, stage: str, data: CachedFeatures, truth: Tensor) -> dict[str, float]:
    """One line of the tables."""
    batch = images_of(data, stage)
    concepts, label = batch["concepts"], batch["label"]
    output = model(batch).concepts
    context = LossContext(model.concept_loss, model.label_loss, model.head, output.values)
    joint = model.bottleneck.losses(output, batch, context)["concept"]
    if not isinstance(model.bottleneck, StochasticBottleneck):
        joint = joint * concepts.shape[1]
    soft = model.head(output.replace(values=output.probs, sample_dim=False))
    drawn = draws(model, output)
    hard = model.head(output.replace(values=drawn, sample_dim=True))
    pairs = across(data)
    known, found = residual(concepts, output.probs)[pairs], covariance(drawn)[pairs]
    learned = {}
    if output.distribution is not None:
        learned["scores"] = pearson(correlation_of(output.distribution.covariance_matrix.mean(0))[pairs], truth[pairs])
    return {
        "concepts": float(((output.probs >= 0.5) == (concepts >= 0.5)).float().mean()),
        "joint": float(joint),
        "label": float((hard.argmax(-1) == label).float().mean()),
        "nll": float(model.label_loss(hard, label)),
        "soft": float(model.label_loss(soft, label)),
        "agreement": pearson(found, known) if name != "linear" else float("nan"),
        "found": float((found * known).sum() / known.square().sum()) if name != "linear" else float("nan"),
        "scores": learned.get("scores", float("nan")),
    }


def images_of(data: CachedFeatures, stage: str) -> Batch:
    """The features and annotations of a split as one batch."""
    data.setup("validate" if stage == "val" else stage)
    batches = list(data.val_dataloader() if stage == "val" else data.test_dataloader())
    return {name: torch.cat([batch[name] for batch in batches]) for name in ("embedding", "concepts", "label")}


def draws(model: CBMModule, output: ConceptOutput) -> Tensor:
    """``[S, B, K]`` hard concepts: the model's own, or independent ones."""
    if output.sample_dim:
        return output.values
    noise = ConceptNoise(model.concept_set, DRAWS, "benchmark").fixed
    return (output.logits + noise.unsqueeze(1) > 0).float()


def across(data: CachedFeatures) -> Tensor:
    """``[K, K]`` bool, pairs of concepts of different attributes, each once."""
    concepts = data.concept_set
    group = torch.zeros(len(concepts), dtype=torch.long)
    for number, members in enumerate(concepts.group_indices().values()):
        group[members] = number
    return (group[:, None] != group).triu(1)


def covariance(drawn: Tensor) -> Tensor:
    """``[K, K]`` covariance of ``[S, B, K]`` draws of an image, on average over images."""
    centred = drawn - drawn.mean(0)
    return torch.einsum("sbj,sbk->jk", centred, centred) / drawn.shape[1] / (len(drawn) - 1)


def residual(concepts: Tensor, probs: Tensor) -> Tensor:
    """``[K, K]`` covariance of what probabilities leave unexplained."""
    left = concepts - probs
    return left.mT @ left / len(left)


def correlation_of(matrix: Tensor) -> Tensor:
    """``[K, K]`` correlations of a covariance."""
    deviation = matrix.diagonal().sqrt()
    return matrix / deviation[:, None] / deviation


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two lists of numbers."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/stochastic"), help="where runs and features are kept")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--correlations", type=float, nargs="+", default=[0.0, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--num_train", type=int, default=3000)
    parser.add_argument("--backbone_epochs", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--head_epochs", type=int, default=8)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--stage", choices=["val", "test"], default="test", help="val to choose settings on")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    rows = []
    for correlation in options.correlations:
        for seed in options.seeds:
            data = features(options, correlation, seed)
            truth = torch.corrcoef(data.annotations("train")[0].T)
            for name in options.methods:
                kept = options.folder / f"{options.stage}-{correlation}-{name}-{seed}.json"
                if not kept.exists():
                    model = fitted(name, options, seed, data)
                    kept.write_text(json.dumps(row(name, model, options.stage, data, truth)))
                numbers = json.loads(kept.read_text())
                rows.append({"correlation": correlation, "method": name, "seed": seed, **numbers})
    print(spread(pd.DataFrame(rows), ["correlation", "method"]).to_string())


if __name__ == "__main__":
    run()
