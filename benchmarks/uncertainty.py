"""Is a concept uncertain where it cannot be told? Birds with hidden and blended parts, and photographs people dispute.

    python benchmarks/uncertainty.py --shared ../shared

The bottleneck and head of the recipe ``probcbm`` (Probabilistic CBM, Kim et al. 2023) beside a linear bottleneck with a
linear head, concepts first and then the head. Both read the same frozen backbone, which was trained once a setting with
the linear bottleneck, on images of its own; a seed is that of weights, draws, training images and drawn test images.

1. *Birds*: of the training and test images, ``--share`` show one attribute as a blend of two values, as many have one
   attribute removed from sight, and as many a leaf in front. ``blended``, ``hidden`` and ``behind the leaf`` are the
   AUROC of the uncertainty of a concept for telling test images in which that is so of the concept from those in which
   nothing is wrong with it, the mean over concepts. ``rank`` is the rank correlation with how far the blend is from
   either value, over the images in which the concept is blended or plain, the mean over concepts. ``errors`` tells
   wrong from right: concepts (the mean over concepts) and labels.
2. *Photographs* (with ``--shared``): CIFAR-10 with 31 concepts a class in a table, and for 5000 test images the labels
   that about 50 people each gave (CIFAR-10H). ``people`` is the rank correlation with the entropy of those labels, of
   the uncertainty of the label and of the mean uncertainty of the concepts.

The uncertainty of a concept is the geometric mean of its variances, or the entropy of its probability; that of the
label is the head's, from the variances of the concepts, or the entropy of its probabilities. Settings are the recipe's,
but for the options below.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.data import RenderedBirds
from cbm_lightning.data.base import ConceptDataModule, TensorDataset
from cbm_lightning.types import Batch

sys.path.append(str(Path(__file__).resolve().parent))
from runs import spread, trained

PLAIN = {
    "bottleneck": {"class_path": "LinearBottleneck", "init_args": {"link": "sigmoid", "randint": 0.0}},
    "head": {"class_path": "LinearHead", "init_args": {}},
    "loss_weights": {"concept": 1.0},
}
MODELS: dict[str, dict[str, Any]] = {"probabilistic": {}, "linear": PLAIN}
# photographs of 32 pixels would have a single cell after the last stage
BACKBONES: dict[str, dict[str, Any]] = {
    "birds": {},
    "photographs": {"img_size": 32, "stage": 2, "pool": "token_mean"},
}
BACKBONE_SEED = 1000


def backbone(setting: str, options: argparse.Namespace, data: dict[str, Any]) -> Path:
    """The weights of the backbone of a setting, from a linear model that learns concepts alone."""
    weights = options.models / f"{setting}.pt"
    if not weights.exists():
        concepts = {"name": "concepts", "train": ["backbone", "bottleneck"], "loss_weights": {"label": 0}}
        init_args = {**PLAIN, "backbone": {"init_args": BACKBONES[setting]}, "phases": [concepts]}
        overrides = {"trainer": {"max_epochs": options.epochs[0]}, "model": {"init_args": init_args}, "data": data}
        model = trained("probcbm", f"{setting}-backbone", BACKBONE_SEED, options.models, overrides)
        torch.save(model.backbone.model.state_dict(), weights)
    return weights


def train(
    name: str, setting: str, seed: int, options: argparse.Namespace, weights: Path, data: dict[str, Any]
) -> CBMModule:
    """The model of a seed on features of the frozen backbone."""
    phases = [
        {"name": "concepts", "train": ["bottleneck"], "epochs": options.epochs[1], "loss_weights": {"label": 0}},
        {"name": "labels", "train": ["head"], "epochs": options.epochs[2], "loss_weights": {"concept": 0}},
    ]
    if name == "probabilistic":
        phases[1]["loss_weights"] = {"concept": 0, "kl": 0}
    frozen = {**BACKBONES[setting], "checkpoint_path": str(weights.resolve()), "frozen": True}
    cached = {"data": data, "tokens": True, "cache_dir": str(options.models / "cache")}
    overrides = {
        "trainer": {"max_epochs": sum(options.epochs[1:])},
        "model": {"init_args": {**MODELS[name], "backbone": {"init_args": frozen}, "phases": phases}},
        "data": {"class_path": "CachedFeatures", "init_args": cached},
    }
    return trained("probcbm", f"{setting}-{name}", seed, options.models, overrides)


def entropy(probs: Tensor) -> Tensor:
    """Of distributions ``[..., C]``, ``[...]``."""
    return torch.special.entr(probs).sum(-1)


@torch.no_grad()
def answers(model: CBMModule, images: Tensor) -> dict[str, Tensor]:
    """Probabilities and uncertainties of images, as the model answers."""
    found: list[dict[str, Tensor]] = []
    for some in images.split(250):
        logits, output = model(some)
        probs = model.probabilities(logits)
        row = {"concepts": output.probs, "label": probs, "label entropy": entropy(probs)}
        row["entropy"] = entropy(torch.stack([output.probs, 1 - output.probs], -1))
        if output.uncertainty is not None:
            row |= {"variance": output.uncertainty, "label variance": model.head.uncertainty(output)}
        found.append(row)
    return {key: torch.cat([row[key] for row in found]) for key in found[0]}


def measures(name: str, found: dict[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """What the uncertainties are called, and those of concepts and of the label."""
    kinds = ["variance", "entropy"] if "variance" in found else ["entropy"]
    return [(f"{name}, {kind}", found[kind], found[f"label {kind}"]) for kind in kinds]


def ranking(score: Tensor, positive: Tensor, counted: Tensor | None = None) -> float:
    """AUROC, NaN where there are fewer than ten of either kind."""
    kept = torch.ones_like(positive) if counted is None else counted
    truth = positive[kept]
    if min(int(truth.sum()), int((~truth).sum())) < 10:
        return float("nan")
    return float(roc_auc_score(truth.numpy(), score[kept].numpy()))


def over_concepts(measure: Callable[..., float], *columns: Tensor) -> float:
    """The mean over concepts of a measure of columns of ``[N, K]`` tensors."""
    return float(np.nanmean([measure(*(column[:, k] for column in columns)) for k in range(columns[0].shape[1])]))


def correlation(score: Tensor, target: Tensor, counted: Tensor | None = None) -> float:
    """Spearman's rank correlation."""
    kept = torch.ones_like(score, dtype=torch.bool) if counted is None else counted
    return float(spearmanr(score[kept].numpy(), target[kept].numpy()).statistic)


# ---------------------------------------------------------------- birds


def bird_data(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Birds with blends, hidden parts and leaves."""
    shares = dict.fromkeys(("ambiguity", "hide_part", "occlusion"), options.share)
    sizes = {"num_classes": 12, "num_train": options.num_train, "num_val": 100, "num_test": 100}
    return {**shares, **sizes, "within_class_variation": options.variation, "seed": seed}


def birds(seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """A row a kind of uncertainty."""
    data = {"class_path": "RenderedBirds", "init_args": bird_data(options, seed)}
    weights = backbone("birds", options, {"init_args": bird_data(options, BACKBONE_SEED)})
    rows = []
    for name in MODELS:
        model = train(name, "birds", seed, options, weights, data)
        test = {**bird_data(options, seed), "num_test": options.images, "details": True}
        drawn = RenderedBirds(**test).follow(model)
        drawn.setup("test")
        batch = drawn.splits["test"].__getitems__(list(range(options.images)))
        found = answers(model, batch["image"])
        rows += [score_birds(drawn, batch, found, *each) for each in measures(name, found)]
    return show("birds", seed, rows)


def score_birds(
    data: RenderedBirds, batch: Batch, found: dict[str, Tensor], name: str, concepts: Tensor, label: Tensor
) -> dict[str, Any]:
    """How well uncertainties of concepts ``[N, K]`` and of the label ``[N]`` rank what is wrong with the images."""
    names = [group.name for group in data.groups]
    group = torch.tensor([names.index(data_group(data, concept)) for concept in data.concept_set.names])
    odds = batch["soft_concepts"]
    doubt = torch.minimum(odds, 1 - odds)
    blended, hidden = doubt > 0, batch["hidden_group"][:, None] == group
    covered = ~batch["visible"] & ~hidden
    plain = ~(blended | hidden | covered)
    wrong = (found["concepts"] >= 0.5) != (batch["concepts"] >= 0.5)
    wrong_label = found["label"].argmax(1) != batch["label"]
    return {
        "uncertainty": name,
        "blended": over_concepts(ranking, concepts, blended, plain | (blended & ~hidden & ~covered)),
        "hidden": over_concepts(ranking, concepts, hidden, plain | (hidden & ~blended)),
        "behind the leaf": over_concepts(ranking, concepts, covered, plain | (covered & ~blended)),
        "rank": over_concepts(correlation, concepts, doubt, plain | (blended & ~hidden & ~covered)),
        "concept errors": over_concepts(ranking, concepts, wrong),
        "label errors": ranking(label, wrong_label),
        "concept accuracy": float(1 - wrong.float().mean()),
        "label accuracy": float(1 - wrong_label.float().mean()),
    }


def data_group(data: RenderedBirds, concept: str) -> str:
    """The attribute that a concept belongs to."""
    return next(group for group, members in data.concept_set.groups.items() if concept in members)


# ---------------------------------------------------------------- photographs


class Photographs(ConceptDataModule):
    """CIFAR-10 with concepts by class, and 5000 test images.

    Args:
        folder: Where ``train40k.npz``, ``test_first5k.npz`` and ``meta.json`` are.
        images: The first of the 40,000 images to train on, and the one after the last.
        num_train: How many of them the seed draws.
    """

    def __init__(self, folder: str, images: list[int], num_train: int, *, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.folder, self.images, self.num_train = Path(folder), images, num_train
        self.meta = json.loads((self.folder / "meta.json").read_text())

    @property
    def concept_set(self) -> ConceptSet:
        """31 concepts in seven groups."""
        groups: dict[str, list[str]] = {}
        for concept, group in zip(self.meta["concepts"], self.meta["group"], strict=True):
            groups.setdefault(group, []).append(concept)
        return ConceptSet(self.meta["concepts"], groups)

    @property
    def class_names(self) -> list[str]:
        """``airplane`` and so on."""
        return list(self.meta["classes"])

    def annotations(self, split: str) -> tuple[Tensor, Tensor]:
        """Labels, and what the table says of them."""
        file, rows = self._rows(split)
        label = torch.from_numpy(file["label"][rows].astype(np.int64))
        return torch.tensor(self.meta["class_concept"]).float()[label], label

    def make_split(self, name: str) -> TensorDataset:
        """Decode the images."""
        file, rows = self._rows(name)
        jpeg, offset = file["jpeg"], file["offset"]
        pixels = [np.asarray(Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in rows]
        concepts, label = self.annotations(name)
        image = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        return TensorDataset({"image": image, "concepts": concepts, "label": label}, self._normalised)

    def human_probs(self) -> Tensor:
        """``[5000, 10]`` how people labelled the test images."""
        return torch.from_numpy(self._rows("test")[0]["human_probs"])

    def _rows(self, split: str) -> tuple[Any, np.ndarray]:
        file = np.load(self.folder / ("test_first5k.npz" if split == "test" else "train40k.npz"), allow_pickle=False)
        order = np.random.default_rng(self.seed).permutation(np.arange(*self.images))
        rows = {"train": order[: self.num_train], "val": order[-100:], "test": np.arange(len(file["label"]))}
        return {name: file[name] for name in file.files}, rows[split]

    def _normalised(self, batch: Batch) -> Batch:
        backbone = self.backbone()
        assert backbone is not None
        mean, std = (torch.tensor(row).view(-1, 1, 1) for row in backbone.image_stats())
        return {**batch, "image": (batch["image"].float() / 255 - mean) / std}


def photographs(seed: int, options: argparse.Namespace) -> pd.DataFrame:
    """A row a kind of uncertainty."""
    folder = str(options.shared.resolve() / "data" / "cifar10")
    own = {"folder": folder, "images": [0, 20000], "num_train": 20000}
    weights = backbone("photographs", options, {"class_path": "uncertainty.Photographs", "init_args": own})
    given = {"folder": folder, "images": [20000, 40000], "num_train": options.num_photographs, "seed": seed}
    rows = []
    for name in MODELS:
        wrapped = {"class_path": "uncertainty.Photographs", "init_args": given}
        model = train(name, "photographs", seed, options, weights, wrapped)
        data = Photographs(**given).follow(model)
        data.setup("test")
        batch = data.splits["test"].__getitems__(list(range(len(data.splits["test"]))))
        found, people = answers(model, batch["image"]), entropy(data.human_probs())
        wrong = found["label"].argmax(1) != batch["label"]
        for kind, concepts, label in measures(name, found):
            row = {
                "uncertainty": kind,
                "people: label": correlation(label, people),
                "people: concepts": correlation(concepts.mean(1), people),
                "label errors": ranking(label, wrong),
                "label accuracy": float(1 - wrong.float().mean()),
            }
            rows.append(row)
    return show("photographs", seed, rows)


def show(setting: str, seed: int, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The table of a seed, printed."""
    table = pd.DataFrame(rows).assign(seed=seed)
    print(
        f"{setting}, seed {seed}\n{table.drop(columns='seed').set_index('uncertainty').T.round(3).to_string()}",
        flush=True,
    )
    return table


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, help="folder that holds data/cifar10; without it, birds alone")
    parser.add_argument("--epochs", type=int, nargs=3, default=[4, 6, 4], help="of backbone, concepts and head")
    parser.add_argument("--share", type=float, default=0.3, help="of images with a blend, a hidden part, a leaf")
    parser.add_argument("--variation", type=float, default=0.3, help="how often a bird differs from its species")
    parser.add_argument("--num_train", type=int, default=4000, help="birds to train on")
    parser.add_argument("--num_photographs", type=int, default=5000, help="photographs to train on")
    parser.add_argument("--images", type=int, default=4000, help="birds to test on")
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and use those that are there")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    settings = [birds] if options.shared is None else [birds, photographs]
    with tempfile.TemporaryDirectory() as scratch:
        options.models = options.models or Path(scratch)
        tables = [pd.concat([setting(seed, options) for seed in options.seeds]) for setting in settings]
    for table in tables:
        print(f"\n{spread(table, ['uncertainty']).T.to_string()}")


if __name__ == "__main__":
    run()
