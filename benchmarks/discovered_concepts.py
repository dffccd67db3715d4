"""Do concepts that are discovered from the label alone match the attributes that were drawn? Birds, and digits.

    python benchmarks/discovered_concepts.py --shared ../shared --figure benchmarks/discovered_concepts.png

1. Birds of 12 species (recipe ``botcl``), each attribute of which is drawn anew with a probability of 0.3. ``purity``
   is `ConceptPurity` on test images: the mean of ``|2 AUROC - 1|`` over the best one-to-one assignment of 20 discovered
   concepts to 25 attributes. Beside it ``chance``, with annotations permuted over all images, and ``class``, with
   annotations permuted among the images of a species: what the same concepts would score if they knew the species
   and nothing else of the bird. As in the paper a linear layer on the backbone is trained on the label first; *slots*
   go on from that backbone, *scratch* is the recipe as it is, *paper's start* the recipe with competition and without a
   threshold, *untrained* its model with drawn weights. What else is found in the backbone of the linear layer: 20
   *units* of that layer, the mean over cells of 20 principal components of the tokens (*pca*), and the nearness of the
   nearest cell to each of 20 centres (*k-means*). ``label`` is the accuracy of slots, and of the linear layer.
2. Digits (MNIST, 6,000 to train on, 3,000 to test), with a small network and 20 concepts, with the reconstruction of
   the paper's variant and without, beside a linear layer on the same network: label accuracy, and the squared error of
   reconstructions beside that of the mean image.

A seed is that of the weights and of the birds. Of every table the mean (and standard deviation) over seeds.
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from lightning.pytorch import Trainer, seed_everything
from runs import QUIET, trained
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cbm_lightning import CBMModule
from cbm_lightning.backbones import TimmBackbone
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.bottlenecks import LinearBottleneck, SlotBottleneck
from cbm_lightning.callbacks.exemplars_figure import Exemplars, draw_exemplars
from cbm_lightning.callbacks.loggers import to_bytes
from cbm_lightning.callbacks.prediction_table import displayable
from cbm_lightning.data import RenderedBirds
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.metrics import ConceptPurity
from cbm_lightning.types import Batch

RECIPE = yaml.safe_load(files("cbm_lightning.recipes").joinpath("botcl.yaml").read_text())
PAPER = {"model": {"init_args": {"bottleneck": {"init_args": {"competition": True, "initial_sum": None}}}}}
LINEAR = {
    "model": {
        "init_args": {
            "bottleneck": {"class_path": "LinearBottleneck", "init_args": {"link": "logits"}},
            "concepts": None,
            "loss_weights": {"concept": 0.0},
        }
    }
}
OTHERS: dict[str, dict[str, Any]] = {"scratch": {}, "paper's start": PAPER}
DISCOVERED = 20
AT_ONCE = 250


# ---------------------------------------------------------------- birds


def birds(seed: int, options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """A row a way to discover concepts."""
    linear = trained("botcl", "linear", seed, folder, LINEAR)
    slots = trained("botcl", "slots", seed, folder, pretrained_by(linear, folder / f"linear-{seed}" / "backbone.pt"))
    names = slots_data(seed).concept_set.names
    batch, train = images(slots, seed, options.stage, options.images), images(slots, seed, "train", 1000)
    truth, label = batch["concepts"], batch["label"]
    tokens, seen = cells(linear, batch), cells(linear, train)
    found = {
        "slots": (slots, activations(slots, batch)),
        "untrained": (None, activations(untrained(seed), batch)),
        "units": (linear, activations(linear, batch)[:, :DISCOVERED]),
        "pca": (None, principal(tokens, seen)),
        "k-means": (None, nearness(tokens, seen, seed)),
    }
    for name in options.also:
        other = trained("botcl", name.replace(" ", "-"), seed, folder, OTHERS[name])
        found[name] = (other, activations(other, batch))
    rows = []
    for name, (model, scores) in found.items():
        purity = measured(scores, truth, list(names))
        known = measured(scores, truth[within_classes(label, seed)], list(names)).summary().value
        summary = purity.summary()
        row = {"concepts": name, "label": float("nan") if model is None else accuracy(model, batch)}
        rows.append({**row, "purity": float(summary.value), "class": float(known), "chance": float(summary.chance)})
        if name == "slots":
            print(f"seed {seed}\n{purity.table().round(2).to_string()}", flush=True)
    return pd.DataFrame(rows).assign(seed=seed)


def pretrained_by(model: CBMModule, path: Path) -> dict[str, Any]:
    """Start from the backbone of a model, which is written to a file."""
    torch.save(model.backbone.model.state_dict(), path)
    return {"model": {"init_args": {"backbone": {"init_args": {"checkpoint_path": str(path)}}}}}


def slots_data(seed: int, **options: Any) -> RenderedBirds:
    return RenderedBirds(**{**RECIPE["data"]["init_args"], **options, "seed": seed})


def images(model: CBMModule, seed: int, split: str, number: int) -> Batch:
    """The first images of a split, as the model reads them."""
    numbers = {"num_train": 1, "num_val": 1, "num_test": 1, f"num_{split}": number}
    data = slots_data(seed, **numbers).follow(model)
    data.setup("test" if split == "test" else "fit")
    return data.splits[split].__getitems__(list(range(number)))


def untrained(seed: int) -> CBMModule:
    """The recipe's model before training."""
    seed_everything(seed)
    given = RECIPE["model"]["init_args"]
    slots = SlotBottleneck(**given["bottleneck"]["init_args"])
    return CBMModule(TimmBackbone(**given["backbone"]["init_args"]), slots, concepts=DISCOVERED, num_classes=12).eval()


@torch.no_grad()
def activations(model: CBMModule, batch: Batch) -> Tensor:
    """``[N, K]`` scores of the concepts."""
    return torch.cat([model(some).concepts.logits for some in batch["image"].split(AT_ONCE)])


@torch.no_grad()
def accuracy(model: CBMModule, batch: Batch) -> float:
    said = torch.cat([model(some).logits.argmax(1) for some in batch["image"].split(AT_ONCE)])
    return float((said == batch["label"]).float().mean())


@torch.no_grad()
def cells(model: CBMModule, batch: Batch) -> Tensor:
    """``[N, cells, D]`` tokens of the backbone."""
    return torch.cat([model.backbone(some).tokens for some in batch["image"].split(AT_ONCE)])


def principal(tokens: Tensor, seen: Tensor) -> Tensor:
    """``[N, 20]``, the principal components of seen tokens, averaged over the cells of an image."""
    flat = seen.flatten(0, 1)
    directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False).Vh[:DISCOVERED]
    return tokens.mean(1) @ directions.T


def nearness(tokens: Tensor, seen: Tensor, seed: int) -> Tensor:
    """``[N, 20]``, minus the distance of the nearest cell of an image to each centre of a k-means of seen tokens."""
    some = seen.flatten(0, 1)[torch.randperm(seen[..., 0].numel(), generator=torch.Generator().manual_seed(seed))]
    centres = KMeans(DISCOVERED, n_init=1, random_state=seed).fit(some[:20000].numpy()).cluster_centers_
    return -torch.cdist(tokens, torch.from_numpy(centres).to(tokens)).amin(1)


def measured(scores: Tensor, truth: Tensor, names: list[str]) -> ConceptPurity:
    purity = ConceptPurity(names)
    purity.update(scores, truth)
    return purity


def within_classes(label: Tensor, seed: int) -> Tensor:
    """``[N]`` a permutation of the images of each class."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(label))
    for members in ((label == value).nonzero().flatten() for value in label.unique()):
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order


def draw(options: argparse.Namespace, folder: Path) -> None:
    """The images that activate each slot of the first seed most, beside the attribute it was matched with."""
    model = CBMModule.load_from_checkpoint(str(folder / f"slots-{options.seeds[0]}" / "finished.ckpt")).eval()
    batch = images(model, options.seeds[0], options.stage, options.images)
    with torch.no_grad():
        outputs = [model(some).concepts for some in batch["image"].split(AT_ONCE)]
    logits, probs, maps = (torch.cat([getattr(o, name) for o in outputs]) for name in ("logits", "probs", "maps"))
    table = measured(logits, batch["concepts"], list(slots_data(0).concept_set.names)).table()
    pictures = to_bytes(displayable(batch["image"], model.backbone.image_stats()))
    rows = []
    for line in table.itertuples():
        best = logits[:, line.slot].topk(5).indices
        name = f"{line.concept}\n{line.score:+.2f}".replace("-", "−")
        rows.append(Exemplars(name, pictures[best], probs[best, line.slot], maps[best, line.slot]))
    draw_exemplars(rows).savefig(options.figure)


# ---------------------------------------------------------------- digits


def digits(seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """A row a model of the digits."""
    splits = read_digits(options.shared / "data" / "mnist10k")
    train, test = splits["train"], splits[options.stage]
    weights = {"area": 1.0, "quantization": 0.1, "retrieval": 0.0, "distinctiveness": 0.0, "consistency": 0.0}
    slots = {"width": 32, "competition": False, "initial_sum": 1.0}
    settings: dict[str, tuple[Any, dict[str, float]]] = {
        "slots": (SlotBottleneck(**slots), weights),
        "slots, reconstructing": (
            SlotBottleneck(**slots, reconstruction=[1, 28, 28]),
            {**weights, "reconstruction": 1.0},
        ),
        "linear": (LinearBottleneck("logits"), {"concept": 0.0}),
    }
    rows = []
    for name, (bottleneck, given) in settings.items():
        seed_everything(seed)
        layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()
        )
        model = CBMModule(
            ModuleBackbone(layers, (1, 28, 28)),
            bottleneck,
            concepts=DISCOVERED,
            num_classes=10,
            loss_weights=given,
            lr=0.005,
            lr_scheduler="OneCycleLR",
        )
        quiet = {**QUIET, "callbacks": [], "logger": False, "enable_checkpointing": False}
        rows_of = train if not isinstance(bottleneck, LinearBottleneck) else with_unknown_concepts(train)
        loader = DataLoader(TensorDataset(rows_of), 128, shuffle=True, collate_fn=TensorDataset.collate)
        Trainer(max_epochs=options.digit_epochs, **quiet).fit(model, loader)
        model.eval()
        row = {"model": name, "label": accuracy(model, test), "reconstruction": float("nan")}
        if name.endswith("reconstructing"):
            row["reconstruction"] = reconstruction_error(model, test)
        row["mean image"] = float((test["image"] - train["image"].mean(0)).square().mean())
        rows.append(row)
    return pd.DataFrame(rows).assign(seed=seed)


def with_unknown_concepts(rows: Batch) -> Batch:
    """A linear bottleneck wants annotations, which its losses then leave out."""
    return {**rows, "concepts": torch.full((len(rows["label"]), DISCOVERED), torch.nan)}


@torch.no_grad()
def reconstruction_error(model: CBMModule, batch: Batch) -> float:
    errors = [
        (model.bottleneck.decode(model(image).concepts.values) - image).square().mean((1, 2, 3))
        for image in batch["image"].split(AT_ONCE)
    ]
    return float(torch.cat(errors).mean())


def read_digits(folder: Path) -> dict[str, Batch]:
    """6,000 digits to train on, 1,000 to choose settings on and 3,000 to test, shuffled by a fixed seed."""
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        image = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(-1, 1, 28, 28).float() / 255
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        label = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    order = torch.randperm(len(label), generator=torch.Generator().manual_seed(0))
    parts = order.split([6000, 1000, 3000])
    return {
        name: {"image": image[rows], "label": label[rows]}
        for name, rows in zip(("train", "val", "test"), parts, strict=True)
    }


def show(found: pd.DataFrame, by: str) -> None:
    """A Markdown table of the mean and standard deviation over seeds, a row a value of ``by``."""
    groups = found.drop(columns="seed").groupby(by, sort=False)
    mean, deviation = groups.mean(), groups.std()
    print(f"| {by} | {' | '.join(mean.columns)} |\n|{' --- |' * (len(mean.columns) + 1)}")
    for name, row in mean.iterrows():
        spreads = deviation.loc[name]
        texts = ["" if pd.isna(value) else f"{value:.3f} ({spreads[key]:.3f})" for key, value in row.items()]
        print(f"| {name} | {' | '.join(texts)} |")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=["birds", "digits"], default=["birds", "digits"])
    parser.add_argument("--images", type=int, default=2000, help="of birds to measure on")
    parser.add_argument("--stage", choices=["val", "test"], default="test", help="val to choose settings on")
    parser.add_argument("--also", nargs="+", choices=list(OTHERS), default=[], help="train these too")
    parser.add_argument("--digit_epochs", type=int, default=8)
    parser.add_argument("--shared", type=Path, help="folder with data/mnist10k, for the digits")
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and use those that are there")
    parser.add_argument("--figure", type=Path, help="where to draw the concepts of the first seed")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    if "birds" in options.parts:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.models or Path(scratch)
            found = pd.concat([birds(seed, options, folder) for seed in options.seeds])
            print(f"\nbirds, best possible label accuracy {slots_data(0).bayes_accuracy():.3f}")
            show(found, "concepts")
            if options.figure:
                draw(options, folder)
    if "digits" in options.parts:
        if options.shared is None:
            parser.error("the digits need --shared; leave them out with --parts birds")
        found = pd.concat([digits(seed, options) for seed in options.seeds])
        print("\ndigits")
        show(found, "model")


if __name__ == "__main__":
    run()
