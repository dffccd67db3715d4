"""Do maps that are the computation lie better than maps of a linear bottleneck? Drawn birds with known masks.

    python benchmarks/spatial_concepts.py --figure benchmarks/spatial_concepts.png

A seed is that of the weights and of the birds. First a linear bottleneck is trained with its backbone, whose grid has
12x12 cells. As in the paper, the backbone is then frozen, and spatial bottlenecks (recipe ``sl_cbm``) are trained on
it: without a regulariser, with the entropy of each cell, and with masks for a tenth or all of the training images.

``energy`` is the share of positive saliency inside a concept's mask, ``hits`` the pointing game, ``AUROC`` that of the
pixels, and chance is the ``area`` of the mask; ``on bird`` is the share of saliency on any part that shows a concept,
so that ``energy / on bird`` says how well concepts are told apart there. Each concept counts the same, however often it
is seen. Beside them the accuracies of concepts and label on the same test images. Numbers are means over seeds, with
standard deviations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from matplotlib.figure import Figure

from cbm_lightning import CBMModule
from cbm_lightning.callbacks.prediction_table import displayable
from cbm_lightning.callbacks.saliency_figure import COLOURS
from cbm_lightning.data import RenderedBirds
from cbm_lightning.saliency import SaliencyStudy, concept_maps, visible_pairs
from cbm_lightning.saliency.localisation import energy_in_mask
from cbm_lightning.types import Batch

sys.path.append(str(Path(__file__).resolve().parent))
from runs import trained

METRICS = {"energy_in_mask": "energy", "pointing_game": "hits", "pixel_auroc": "AUROC"}
# the recipe keeps the best by its own loss, which differs between the variants
KEEP_LAST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": None, "save_last": True},
}
LINEAR = {"class_path": "LinearBottleneck", "init_args": {"link": "sigmoid"}}
CONCEPT, SPATIAL_LR = 10.0, 0.02
SHOWN = ["beak: long", "tail: forked", "crest: present", "wing colour: red"]


class Variant(NamedTuple):
    """A spatial bottleneck.

    Attributes:
        weights: Losses beside that of the concepts, with their weights.
        masked: Share of the training images that have masks.
    """

    weights: dict[str, float]
    masked: float = 0.0


VARIANTS = {
    "spatial": Variant({}),
    "spatial, entropy": Variant({"entropy": 0.2}),
    "spatial, 10 % masks": Variant({"mask": 5.0}, masked=0.1),
    "spatial, all masks": Variant({"mask": 5.0}, masked=1.0),
}


class PartlyMasked(RenderedBirds):
    """Birds of whose training images only the first have masks.

    Args:
        masked: Share of the training images.
        options: Of `RenderedBirds`.
    """

    def __init__(self, masked: float = 1.0, **options: Any) -> None:
        super().__init__(masks=True, **options)
        self.masked = masked

    def setup(self, stage: str | None = None) -> None:
        """Draw the splits, and hide masks of the training images."""
        super().setup(stage)
        if "train" in self.splits:
            dataset: Any = self.splits["train"]
            dataset.transform = hiding(dataset.transform, round(self.masked * len(dataset)))


def hiding(transform: Callable[[Batch], Batch], kept: int) -> Callable[[Batch], Batch]:
    """Empty the masks of all but the first images."""

    def hide(rows: Batch) -> Batch:
        batch = transform(rows)
        shown = batch["index"] < kept
        return {**batch, "concept_masks": batch["concept_masks"] & shown[:, None, None, None]}

    return hide


# ---------------------------------------------------------------- models


def linear(seed: int, options: argparse.Namespace) -> CBMModule:
    """The linear bottleneck of a seed, trained with its backbone."""
    model = overrides(options, LINEAR, {"concept": CONCEPT}, {}, masked=0.0)
    return trained("sl_cbm", "linear", seed, options.models, model)


def spatial(variant: Variant, name: str, seed: int, options: argparse.Namespace) -> CBMModule:
    """A spatial bottleneck on the backbone of the linear one of the same seed."""
    weights = options.models / f"backbone-{seed}.pt"
    if not weights.exists():
        torch.save(linear(seed, options).backbone.model.state_dict(), weights)
    bottleneck = {"class_path": "SpatialBottleneck", "init_args": {"losses": list(variant.weights)}}
    backbone = {"checkpoint_path": str(weights.resolve()), "frozen": True}
    model = overrides(options, bottleneck, {"concept": CONCEPT, **variant.weights}, backbone, variant.masked)
    model["model"]["init_args"]["lr"] = SPATIAL_LR
    return trained(
        "sl_cbm", name.replace(" ", "_").replace(",", "").replace("%", "percent"), seed, options.models, model
    )


def overrides(
    options: argparse.Namespace,
    bottleneck: dict[str, Any],
    weights: dict[str, float],
    backbone: dict[str, Any],
    masked: float,
) -> dict[str, Any]:
    """What differs from the recipe."""
    data = {"class_path": "spatial_concepts.PartlyMasked", "init_args": {"masked": masked, **birds(options)}}
    model = {"bottleneck": bottleneck, "loss_weights": weights, "backbone": {"init_args": backbone}}
    trainer = {"max_epochs": options.epochs, "callbacks": [KEEP_LAST]}
    return {"trainer": trainer, "data": data, "model": {"init_args": model}}


def birds(options: argparse.Namespace) -> dict[str, Any]:
    """The birds of the recipe, but as many as are asked for."""
    recipe = yaml.safe_load(files("cbm_lightning.recipes").joinpath("sl_cbm.yaml").read_text())
    numbers = {"num_train": options.num_train, "num_val": options.images, "num_test": options.images}
    return {**recipe["data"]["init_args"], **numbers}


# ---------------------------------------------------------------- measurements


def measured(seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a model and method."""
    data = RenderedBirds(**{**birds(options), "num_train": 1, "seed": seed}, masks=True)
    model = linear(seed, options)
    data.follow(model).setup("validate" if options.stage == "val" else "test")
    batch = data.splits[options.stage].__getitems__(list(range(options.images)))
    rows = [row("linear, Grad-CAM", model, "grad_cam", batch), row("linear, exact maps", model, "exact", batch)]
    for name in options.variants:
        rows.append(row(name, spatial(VARIANTS[name], name, seed, options), "exact", batch))
    for found in rows:
        print(
            seed,
            {key: value if isinstance(value, str) else round(value, 3) for key, value in found.items()},
            flush=True,
        )
    return [{**found, "seed": seed} for found in rows]


def row(name: str, model: CBMModule, method: str, batch: Batch) -> dict[str, Any]:
    """Where the maps of a model lie, and how right it is."""
    study = SaliencyStudy(model, method, list(METRICS))
    study.update(batch)
    result = study.compute()
    with torch.no_grad():
        logits, concepts = model(batch)
    right = (concepts.probs >= 0.5) == (batch["concepts"] >= 0.5)
    found: dict[str, Any] = {"maps": name} | {METRICS[key]: float(value) for key, value in result.values.items()}
    found |= {"area": float(result.chance["energy_in_mask"]), "on bird": on_bird(model, method, batch)}
    found["concepts"] = float(right.float().mean())
    return {**found, "label": float((logits.argmax(1) == batch["label"]).float().mean())}


def on_bird(model: CBMModule, method: str, batch: Batch) -> float:
    """Share of the positive saliency on any part that shows a concept, a mean over concepts."""
    maps = torch.cat([concept_maps(model, image, method) for image in batch["image"].split(50)])
    pairs = visible_pairs(maps, batch["concept_masks"])
    inside = energy_in_mask(pairs.maps, batch["concept_masks"].any(1)[pairs.rows]).values
    each = [inside[pairs.concepts == k].nanmean() for k in pairs.concepts.unique()]
    return float(torch.stack(each).nanmean())


def show(table: pd.DataFrame) -> None:
    """A row a model and method, mean and standard deviation over seeds."""
    groups = table.groupby("maps", sort=False)
    mean, deviation = groups.mean(), groups.std(ddof=0)
    print(f"\n| {' | '.join(['maps', *mean.columns])} |")
    print("| --- |" + " --- |" * len(mean.columns))
    for name in mean.index:
        pairs = zip(mean.loc[name], deviation.loc[name], strict=True)
        print(f"| {name} | {' | '.join(f'{a:.3f} ± {b:.3f}' for a, b in pairs)} |")


# ---------------------------------------------------------------- figure


def draw(options: argparse.Namespace) -> Figure:
    """Birds of the first seed, and where some of their concepts look under each model; pyplot does not know of it."""
    data = RenderedBirds(**{**birds(options), "num_train": 1, "seed": 0}, masks=True)
    models = {"linear": linear(0, options)}
    models |= {name: spatial(VARIANTS[name], name, 0, options) for name in options.variants}
    data.follow(models["linear"]).setup("test")
    batch = data.splits["test"].__getitems__(list(range(options.images)))
    names = models["linear"].concept_set.names
    pictures = displayable(batch["image"], models["linear"].backbone.image_stats())
    shown = batch["concept_masks"].flatten(2).any(2)
    pairs = [(int(shown[:, names.index(name)].nonzero()[i]), name) for i, name in enumerate(SHOWN)]
    figure = Figure(
        figsize=(1.7 * (len(models) + 1), 1.9 * len(pairs)), dpi=150, facecolor="white", layout="constrained"
    )
    for axes, (i, name) in zip(figure.subplots(len(pairs), len(models) + 1), pairs, strict=True):
        picture, mask = pictures[i], batch["concept_masks"][i, names.index(name)]
        axes[0].imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
        axes[0].set_title(name, fontsize=8)
        for place, (title, model) in zip(axes[1:], models.items(), strict=True):
            heat = concept_maps(model, batch["image"][i : i + 1], "exact", [name])[0, 0].clamp(min=0)
            energy = float((heat * mask).sum() / heat.sum().clamp(min=1e-12))
            place.imshow(picture.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)
            place.imshow((heat / heat.max().clamp(min=1e-12)).numpy(), cmap=COLOURS, vmin=0, vmax=1, alpha=0.6)
            place.contour(mask.float().numpy(), levels=[0.5], colors="#4dd2ff", linewidths=1)
            place.set_title("\n".join([*title.split(", ", 1), f"{energy:.0%} inside"]), fontsize=7)
        for place in axes:
            place.axis("off")
    return figure


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--num_train", type=int, default=3000, help="birds to train on")
    parser.add_argument("--images", type=int, default=400, help="images to measure maps on")
    parser.add_argument("--stage", choices=["val", "test"], default="test", help="settings were chosen on val")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and use those that are there")
    parser.add_argument("--figure", type=Path, help="where to draw maps of the first seed")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    with tempfile.TemporaryDirectory() as scratch:
        options.models = options.models or Path(scratch)
        options.models.mkdir(parents=True, exist_ok=True)
        table = pd.DataFrame([found for seed in options.seeds for found in measured(seed, options)])
        show(table.drop(columns="seed"))
        if options.figure:
            draw(options).savefig(options.figure)


if __name__ == "__main__":
    run()
