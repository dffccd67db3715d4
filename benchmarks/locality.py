"""Is a concept localised that never comes alone? And which method places concepts best? Drawn birds with known masks.

    python benchmarks/locality.py --figure benchmarks/locality.png

The recipe ``locality`` trains two models a seed: *tied*, on birds whose beak and tail always change together (thick
with fan, long with long, hooked with forked), and *separable*, on the same birds with a tail that is independent of the
beak (``group_correlation: 0``). The third model of a seed, *coarse*, is separable too, with the backbone's own grid of
2x2. A seed is that of the weights and of the birds.

1. Exact maps of both models on the same test images, of which there are two sets: *together*, drawn as the tied
   training images were, and *apart*, the same birds with one of the six pairs of beak and tail that tied birds never
   show. ``energy`` and ``hits`` (the pointing game) are those of the concept's own mask, and chance is its ``area``;
   the ``partner`` of a beak is the tail, whatever its shape, and the other way round. ``likeness`` is the cosine of a
   concept's map with that of the concept that always comes with it.
2. Which part the models go by: the value of beak (tail) with the highest score is the bird's ``own``, or the one that
   the ``partner`` stands for in tied birds. ``accuracy`` is that of each concept by itself.
3. Every saliency method on the separable model and its own test images, exact maps of the coarse model, and the most
   energy that any map on a grid can have in the masks (all of it in one cell). On fewer images: ``randomisation``, the
   cosine with the map of a random bottleneck, and ``average_drop``, what a concept loses where its image is multiplied
   by its map, each beside its chance level.

Each concept counts the same, however often it is seen. Numbers are means over seeds, with standard deviations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.callbacks.prediction_table import displayable
from cbm_lightning.cli import main
from cbm_lightning.data import RenderedBirds
from cbm_lightning.saliency import SaliencyStudy, concept_maps, upsample
from cbm_lightning.saliency.localisation import energy_in_mask, pointing_game
from cbm_lightning.saliency.randomisation import map_similarity
from cbm_lightning.types import Batch

sys.path.append(str(Path(__file__).resolve().parent))
from locality_figure import Bird, Look, draw

BEAKS, TAILS = ("thick", "long", "hooked"), ("fan", "long", "forked")
PARTNERS = {f"beak: {beak}": f"tail: {tail}" for beak, tail in zip(BEAKS, TAILS, strict=True)}
PARTNERS |= {tail: beak for beak, tail in PARTNERS.items()}
APART = [
    {"beak": beak, "tail": tail} for beak in BEAKS for tail in TAILS if f"tail: {tail}" != PARTNERS[f"beak: {beak}"]
]
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "separable": {"data": {"group_correlation": 0.0}},
    "coarse": {"data": {"group_correlation": 0.0}, "backbone": {"stage": None, "pool": "native", "model_args": None}},
}
METHODS = [
    "exact",
    "grad_cam",
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smooth_grad",
    "occlusion",
]
PLACED, CHECKED = ["energy_in_mask", "pointing_game", "pixel_auroc"], ["randomisation", "average_drop"]
OTHERS = "all others"
AT_ONCE = 64


# ---------------------------------------------------------------- models and images


def train(name: str, seed: int, options: argparse.Namespace, folder: Path) -> CBMModule:
    """The model of a seed by the command line, or the one that an earlier run left in the folder."""
    home = folder / f"{name}-{seed}"
    finished = home / "finished.ckpt"
    if not finished.exists():
        home.mkdir(parents=True, exist_ok=True)
        config = home / "overrides.yaml"
        config.write_text(yaml.safe_dump(overrides(name, seed, options)))
        arguments = ["fit", "--config", "locality", "--config", str(config), "--seed_everything", str(seed)]
        cli = main([*arguments, "--trainer.logger.save_dir", str(home)])
        Path(cli.trainer.checkpoint_callback.last_model_path).replace(finished)
    return CBMModule.load_from_checkpoint(str(finished)).eval()


def overrides(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What differs from the recipe: the saliency is measured here, on more than the callback measures."""
    keep_last = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": [keep_last]}
    # the head takes the last epoch
    trainer = {"max_epochs": options.epochs + 1, **quiet}
    data = {"num_train": options.num_train, "num_test": 100, "seed": seed, **MODELS[name].get("data", {})}
    backbone = {"init_args": MODELS[name].get("backbone", {})}
    return {"trainer": trainer, "data": {"init_args": data}, "model": {"init_args": {"backbone": backbone}}}


def test_images(model: CBMModule, number: int, **options: Any) -> Batch:
    """The first test images of the recipe's birds, as the model reads them."""
    recipe = yaml.safe_load(files("cbm_lightning.recipes").joinpath("locality.yaml").read_text())
    given = {**recipe["data"]["init_args"], "num_train": 1, "num_val": 1, "num_test": number, **options}
    birds = RenderedBirds(**given).follow(model)
    birds.setup("test")
    return birds.splits["test"].__getitems__(list(range(number)))


def exact_maps(model: CBMModule, image: Tensor) -> Tensor:
    """``[B, K, H, W]``."""
    return torch.cat([concept_maps(model, some, "exact") for some in image.split(AT_ONCE)])


# ---------------------------------------------------------------- 1. and 2. tied against separable


def compare(seed: int, options: argparse.Namespace, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both models on both sets of images: where maps lie, a row a concept, and what is answered, a row a part."""
    placed, answered = [], []
    for name in ("tied", "separable"):
        model = train(name, seed, options, folder)
        for images, held_out in (("together", None), ("apart", APART)):
            batch = test_images(model, options.images, seed=seed, held_out=held_out)
            run = {"images": images, "model": name, "seed": seed}
            maps = exact_maps(model, batch["image"])
            placed.append(placement(maps, batch["concept_masks"], model.concept_set.names).assign(**run))
            answered.append(answers(model, batch).assign(**run))
    return pd.concat(placed), pd.concat(answered)


def placement(maps: Tensor, masks: Tensor, names: Sequence[str]) -> pd.DataFrame:
    """Where the maps ``[B, K, H, W]`` of concepts lie that are to be seen; a row a concept."""
    rows = []
    for k, name in enumerate(names):
        seen = masks[:, k].flatten(1).any(1)
        part = part_of(name)
        row: dict[str, Any] = {"concepts": part}
        row |= in_part(maps[seen, k], masks[seen, k], "")
        if part != OTHERS:
            partner = names.index(PARTNERS[name])
            # the part whatever its shape: apart, the partner's own shape is not there
            place = masks[seen][:, columns(names, part_of(PARTNERS[name]))].any(1)
            row |= in_part(maps[seen, k], place, "partner's ")
            row["likeness"] = float(map_similarity(maps[seen, k], maps[seen, partner]).nanmean())
        rows.append(row)
    return pd.DataFrame(rows)


def in_part(maps: Tensor, masks: Tensor, whose: str) -> dict[str, float]:
    """Area, energy and pointing game of maps ``[P, H, W]`` whose masks are not empty."""
    energy, hits = energy_in_mask(maps, masks), pointing_game(maps, masks)
    counted = ~energy.values.isnan()
    return {
        f"{whose}area": float(energy.chance[counted].mean()),
        f"{whose}energy": float(energy.values[counted].mean()),
        f"{whose}hits": float(hits.values.nanmean()),
    }


@torch.no_grad()
def answers(model: CBMModule, batch: Batch) -> pd.DataFrame:
    """Which value of beak and tail the model names: the bird's own, or the one its other part stands for."""
    names, truth = model.concept_set.names, batch["concepts"]
    output = model(batch).concepts
    right = ((output.probs >= 0.5) == (truth >= 0.5)).float()
    rows = []
    for part, other in (("beak", "tail"), ("tail", "beak")):
        own, partner = columns(names, part), columns(names, other)
        said = output.logits[:, own].argmax(1)
        by_own, by_partner = said == truth[:, own].argmax(1), said == truth[:, partner].argmax(1)
        shares = {"accuracy": right[:, own].mean(), "own": by_own.float().mean(), "partner": by_partner.float().mean()}
        rows.append({"concepts": part, **{key: float(share) for key, share in shares.items()}})
    rest = [k for k, name in enumerate(names) if part_of(name) == OTHERS]
    return pd.DataFrame([*rows, {"concepts": OTHERS, "accuracy": float(right[:, rest].mean())}])


def part_of(name: str) -> str:
    """``beak``, ``tail`` or neither."""
    return name.split(":")[0] if name in PARTNERS else OTHERS


def columns(names: Sequence[str], part: str) -> list[int]:
    """Positions of a part's values, in the order in which beaks and tails are partners."""
    return [names.index(name) for name in PARTNERS if part_of(name) == part]


# ---------------------------------------------------------------- 3. methods


def methods(seed: int, options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """A row a method: what is measured, and its chance level."""
    model, coarse = (train(name, seed, options, folder) for name in ("separable", "coarse"))
    batch = test_images(model, options.method_images, seed=seed, group_correlation=0.0)
    some = {name: value[: options.checked] for name, value in batch.items()}
    rows = []
    for name, subject, method in [("exact, 2x2", coarse, "exact"), *((method, model, method) for method in METHODS)]:
        row: dict[str, Any] = {"method": name, "accuracy": accuracy(subject, batch)}
        for metrics, images in ((PLACED, batch), (CHECKED, some)):
            study = SaliencyStudy(subject, method, metrics)
            study.update(images)
            found = study.compute()
            row |= {metric: float(found.values[metric]) for metric in metrics}
            row |= {f"{metric} chance": float(found.chance[metric]) for metric in metrics}
        rows.append(row)
        print(f"seed {seed}, {name}: {', '.join(f'{metric} {row[metric]:.3f}' for metric in PLACED)}", flush=True)
    for side in (2, 8, 16):
        rows.append({"method": f"best cell of {side}x{side}", "energy_in_mask": ceiling(batch["concept_masks"], side)})
    return pd.DataFrame(rows).assign(seed=seed)


@torch.no_grad()
def accuracy(model: CBMModule, batch: Batch) -> float:
    """Of all concepts."""
    return float(((model(batch).concepts.probs >= 0.5) == (batch["concepts"] >= 0.5)).float().mean())


def ceiling(masks: Tensor, side: int) -> float:
    """The mean over concepts of the energy in the mask if all saliency lies in the cell that is best for it."""
    cells = upsample(torch.eye(side * side).unflatten(1, (side, side)), (masks.shape[-2], masks.shape[-1])).flatten(1)
    shares = cells / cells.sum(1, keepdim=True)
    best = [(mask[mask.any(1)].float() @ shares.T).amax(1).mean() for mask in masks.flatten(2).unbind(1)]
    return float(torch.stack(best).nanmean())


# ---------------------------------------------------------------- report


def report(placed: pd.DataFrame, answered: pd.DataFrame, found: pd.DataFrame) -> None:
    """Markdown tables."""
    keys = ["images", "concepts", "model"]
    order = [[i, c, m] for i in ("together", "apart") for c in ("beak", "tail", OTHERS) for m in ("tied", "separable")]
    measured = ["area", "energy", "hits", "partner's area", "partner's energy", "partner's hits", "likeness"]
    show(placed.groupby([*keys, "seed"])[measured].mean().reset_index(), keys, order, measured)
    show(answered, keys, order, ["accuracy", "own", "partner"])
    measured = PLACED + [column for metric in CHECKED for column in (metric, f"{metric} chance")]
    show(found, ["method"], [[name] for name in found["method"].unique()], measured)
    chance = ", ".join(f"{metric} {found[f'{metric} chance'].mean():.3f}" for metric in PLACED)
    known = found.set_index("method")["accuracy"]
    print(f"\nchance: {chance}")
    print(f"concept accuracy: {known['exact'].mean():.3f} on the fine grid, {known['exact, 2x2'].mean():.3f} on 2x2")


def show(table: pd.DataFrame, keys: list[str], order: list[list[str]], measured: list[str]) -> None:
    """A row for each of ``order``, mean and standard deviation over seeds."""
    groups = table.groupby(keys)[measured]
    mean, std = groups.mean(), groups.std(ddof=0)
    print(f"\n| {' | '.join([*keys, *measured])} |")
    print("| --- |" + " --- |" * (len(keys) + len(measured) - 1))
    for names in order:
        key = tuple(names) if len(names) > 1 else names[0]
        pairs = zip(mean.loc[key], std.loc[key], strict=True)
        cells = ["" if pd.isna(value) else f"{value:.3f} ± {spread:.3f}" for value, spread in pairs]
        print(f"| {' | '.join([*names, *cells])} |")


# ---------------------------------------------------------------- figure


def birds(options: argparse.Namespace, folder: Path) -> list[Bird]:
    """The first test bird of each beak whose beak and tail are both to be seen, under both models of the first seed."""
    models = {name: train(name, 0, options, folder) for name in ("tied", "separable")}
    batch = test_images(models["tied"], options.images, seed=0)
    names, masks = models["tied"].concept_set.names, batch["concept_masks"]
    pictures = displayable(batch["image"], models["tied"].backbone.image_stats())
    found = []
    for beak in (name for name in PARTNERS if part_of(name) == "beak"):
        pair = [names.index(beak), names.index(PARTNERS[beak])]
        row = int(masks[:, pair].flatten(2).any(2).all(1).nonzero()[0])
        shown = {names[k]: mask for k, mask in zip(pair, masks[row, pair], strict=True)}
        areas = {part_of(name): float(mask.float().mean()) for name, mask in shown.items()}
        title = " and ".join(f"{name.split(': ')[1]} {part_of(name)}" for name in shown)
        looks = {name: looks_at(model, batch["image"][row], shown) for name, model in models.items()}
        found.append(Bird(title, pictures[row], areas, looks))
    return found


def looks_at(model: CBMModule, image: Tensor, shown: dict[str, Tensor]) -> list[Look]:
    """Where a beak and its tail look in an image ``[3, H, W]``, of whose concepts the masks are given."""
    found = []
    for name, own in shown.items():
        map_ = concept_maps(model, image[None], "exact", [name])[0, 0]
        partner = PARTNERS[name]
        on_it, elsewhere = energy_in_mask(map_.expand(2, -1, -1), torch.stack([own, shown[partner]])).values.tolist()
        found.append(Look(name, map_, own, shown[partner], on_it, elsewhere, part_of(partner)))
    return found


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="in which concepts train")
    parser.add_argument("--num_train", type=int, default=8000, help="birds to train on")
    parser.add_argument("--images", type=int, default=512, help="test images of each kind that compare the models")
    parser.add_argument("--method_images", type=int, default=64, help="test images that compare the methods")
    parser.add_argument("--checked", type=int, default=16, help="of them for randomisation and drop")
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and use those that are there")
    parser.add_argument("--figure", type=Path, help="where to draw maps of the first seed")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        seeds = range(options.seeds)
        placed, answered = (
            pd.concat(tables) for tables in zip(*(compare(s, options, folder) for s in seeds), strict=True)
        )
        found = pd.concat([methods(seed, options, folder) for seed in seeds])
        report(placed, answered, found)
        if options.figure:
            draw(birds(options, folder)).savefig(options.figure)


if __name__ == "__main__":
    run()
