"""Concepts that nobody annotated: a tiny CLIP, Concept Matrix Search and Sparse-CBM on drawn birds and photographs.

    python benchmarks/text_concepts.py --shared ../shared

1. *Birds.* The recipe `tiny_clip` trains a CLIP a seed on captioned birds (a run that was cut off goes on where it
   stopped). Its features are computed once, for test images of the species of its training (``seen``) and for other
   species (``new``). ``sentence`` tells a class by the text that describes it; ``cosine``, ``cubed``, ``max`` and
   ``correlation`` are the measures of `ConceptMatrixHead`, which knows that text only through the concepts.
2. *Sparse-CBM*, the recipe `sparse_cbm`, with each of its losses or none, on labels of 1,000 images of new species,
   beside a linear head on the similarities themselves. ``standing out`` is how many concepts share the softmax of the
   activations of an image, ``deciding`` how many share the contributions to the predicted class, ``(sum |c|)^2 / sum
   c^2``, and ``layer`` how many share the weights of a row of the concept layer, by the same formula. ``AUROC`` is how
   well activations rank images by the annotated concepts that give them their names (drawn birds only).
3. *Skin.* Both on real embeddings of photographs (PH2 and the published part of Derm7pt) and of texts by MONET, a CLIP
   ViT-L/14 of dermatology: nevus or melanoma by ten described concepts. Splits are the published ones, so only the
   draws and the order of training differ between seeds.

Accuracies are means over the classes, since four in five photographs of PH2 show nevi. Numbers are means over seeds,
with standard deviations. Learning rate and weights of the losses were chosen on validation images of new species of a
CLIP that is none of those reported: three learning rates without a loss, then nine weights (gumbel 1, 3, 10; l1 0.1, 1;
contrastive 0.1, 1; similarity 1; gumbel_reference 0.3), of which the largest that costs at most two points of accuracy
is taken. Photographs are trained with the same ones, for as many epochs as `clip_similarity` takes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import normalize

from cbm_lightning import CBMModule
from cbm_lightning.backbones import OpenClipBackbone, OpenClipTextEncoder
from cbm_lightning.bottlenecks import SimilarityBottleneck
from cbm_lightning.cli import main
from cbm_lightning.data import PrecomputedFeatures, RenderedBirds
from cbm_lightning.heads import ConceptMatrixHead
from cbm_lightning.metrics import ConceptAUROC

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from runs import trained
from skin_embeddings import write_skin_embeddings

MEASURES = ("cosine", "cubed", "max", "correlation")
WEIGHTS = {"gumbel": 10.0, "gumbel_reference": 0.3, "contrastive": 1.0, "l1": 1.0, "similarity": 1.0}
LAYERS: dict[str, dict[str, Any]] = {
    "similarities alone": {"class_path": "SimilarityBottleneck", "init_args": {}},
    "layer, no loss": {"class_path": "ConceptLayerBottleneck", "init_args": {"regularizer": []}},
    **{name: {"class_path": "ConceptLayerBottleneck", "init_args": {"regularizer": name}} for name in WEIGHTS},
}


class Encoder(LightningModule):
    """Both towers of a CLIP that the recipe `tiny_clip` wrote."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        files = {
            "checkpoint_path": str(home / "model.safetensors"),
            "model_config": str(home / "model_config.json"),
        }
        self.backbone = OpenClipBackbone("tiny_clip", frozen=True, **files)
        self.text = OpenClipTextEncoder("tiny_clip", templates=["{}"], **files)


def tiny_clip(seed: int, folder: Path, epochs: int | None = None) -> Path:
    """The folder of a tiny CLIP, trained if need be."""
    home = folder / f"clip-{seed}"
    if not (home / "model.safetensors").exists():
        arguments = ["fit", "--config", "tiny_clip", f"--seed_everything={seed}", f"--data.seed={seed}"]
        arguments += [f"--trainer.max_epochs={epochs}"] if epochs else []
        arguments += [f"--model.export_to={home}", f"--trainer.logger.save_dir={home}", "--trainer.accelerator=cpu"]
        stopped = sorted(home.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime)
        main([*arguments, "--trainer.enable_progress_bar=false", *(f"--ckpt_path={path}" for path in stopped[-1:])])
    return home


@torch.no_grad()
def bird_features(home: Path, species: int, seed: int) -> Path:
    """A file of what the CLIP sees in images of some species, and reads in their texts."""
    path = home / f"species-{species}.npz"
    if path.exists():
        return path
    encoder = Encoder(home)
    data = RenderedBirds(1000, 500, 1000, rule_seed=species, batch_size=250, seed=seed).follow(encoder)
    data.setup()
    rows: dict[str, list[Tensor]] = {"embedding": [], "label": [], "concepts": [], "split": []}
    for number, split in enumerate(("train", "val", "test")):
        for batch in data.ordered_dataloader(split):
            rows["embedding"].append(encoder.backbone(batch["image"]).pooled)
            rows["split"].append(torch.full_like(batch["label"], number))
            for name in ("label", "concepts"):
                rows[name].append(batch[name])
    texts = {"text_embeddings": data.concept_set.prompts(), "class_embeddings": data.class_descriptions}
    arrays = {name: torch.cat(parts).numpy() for name, parts in rows.items()}
    arrays |= {name: encoder.text.encode(sentences).numpy() for name, sentences in texts.items()}
    np.savez(path, **arrays, concept_names=np.array(data.concept_set.names), class_names=np.array(data.class_names))
    return path


def skin_features(shared: Path, dataset: str, folder: Path) -> Path:
    """Photographs, ten described concepts and the two diagnoses in the space of MONET."""
    path = write_skin_embeddings(shared, folder / f"{dataset}.npz", dataset, "described")  # type: ignore[arg-type]
    with np.load(path) as file:
        arrays = dict(file)
    texts = np.load(shared / "data" / "skin_clip" / "skin_text_embeddings.npz")
    names = [f"monet/class_label_embeddings_{name.capitalize()}" for name in arrays["class_names"]]
    np.savez(path, **arrays, class_embeddings=np.concatenate([texts[name] for name in names]))
    return path


def on_embeddings(path: Path, bottleneck: dict[str, Any], head: Any = None) -> dict[str, Any]:
    """What differs from a recipe where the images are embeddings and texts are vectors already."""
    bottleneck["init_args"]["text_encoder"] = None
    init_args = {"backbone": "identity", "bottleneck": bottleneck, **({"head": head} if head else {})}
    data = {"class_path": "PrecomputedFeatures", "init_args": {"path": str(path), "batch_size": 128}}
    return {"model": {"init_args": init_args}, "data": data}


def test_split(path: Path) -> dict[str, Tensor]:
    """The test images of a file."""
    data = PrecomputedFeatures(str(path))
    data.setup("test")
    return {name: rows.float() if name == "embedding" else rows for name, rows in data.splits["test"].tensors.items()}  # type: ignore[attr-defined]


@torch.no_grad()
def untrained(path: Path) -> dict[str, float]:
    """Test accuracy of class texts, directly and through concepts."""
    data, rows = PrecomputedFeatures(str(path)), test_split(path)
    assert data.class_embeddings is not None
    cosines = normalize(rows["embedding"], dim=-1) @ normalize(data.class_embeddings, dim=-1).T
    found = {"sentence": accuracy(cosines.argmax(1), rows["label"])}
    for measure in MEASURES:
        bottleneck = SimilarityBottleneck(standardize=False, scale=1.0)
        model = CBMModule("identity", bottleneck, ConceptMatrixHead(similarity=measure), data).eval()
        predicted = model({"embedding": rows["embedding"]}).logits.argmax(1)
        found[measure] = accuracy(predicted, rows["label"])
    return found


def accuracy(predicted: Tensor, label: Tensor) -> float:
    """Mean over the classes of the share of their images that is told."""
    right = (predicted == label).float()
    return float(torch.stack([right[label == y].mean() for y in label.unique()]).mean())


def share(weights: Tensor) -> Tensor:
    """How many numbers of a row make up the sum of their sizes."""
    size = weights.abs()
    return size.sum(-1).square() / size.square().sum(-1).clamp(min=1e-12)


@torch.no_grad()
def described(model: CBMModule, rows: dict[str, Tensor]) -> dict[str, float]:
    """Test accuracy and sparsity of a trained model."""
    logits, output = model({"embedding": rows["embedding"]})
    predicted = logits.argmax(1)
    account = model.head.contributions(output)
    assert account is not None
    log = output.logits.log_softmax(-1)
    layer = getattr(model.bottleneck, "layer", None)
    found = {
        "accuracy": accuracy(predicted, rows["label"]),
        "standing out": float((-(log.exp() * log).sum(-1)).exp().mean()),
        "deciding": float(share(account.concepts[torch.arange(len(predicted)), predicted]).mean()),
        "layer": 1.0 if layer is None else float(share(layer.weight).mean()),
    }
    if not rows["concepts"].isnan().all():
        ranking = ConceptAUROC(model.concept_set)
        ranking.update(output.probs, rows["concepts"])
        found["AUROC"] = float(ranking.compute())
    return found


def layers(path: Path, name: str, seed: int, folder: Path, epochs: int | None) -> list[dict[str, Any]]:
    """A row for each loss of the concept layer."""
    lines = []
    for loss, bottleneck in LAYERS.items():
        overrides = on_embeddings(path, {**bottleneck, "init_args": dict(bottleneck["init_args"])})
        # the layer's own head has no biases, and neither has the one beside it
        overrides["model"]["init_args"]["head"] = {"class_path": "LinearHead", "init_args": {"bias": False}}
        overrides["model"]["init_args"]["loss_weights"] = {loss: WEIGHTS[loss]} if loss in WEIGHTS else None
        overrides["trainer"] = {} if epochs is None else {"max_epochs": epochs}
        run = f"{name}-{loss}".replace(" ", "-").replace(",", "")
        model = trained("sparse_cbm", run, seed, folder, overrides)
        lines.append({"data": name, "loss": loss, "seed": seed, **described(model, test_split(path))})
    return lines


def report(title: str, lines: list[dict[str, Any]], by: list[str]) -> None:
    """Means over the seeds, and their standard deviations."""
    if lines:
        print(f"\n{title}\n")
        grouped = pd.DataFrame(lines).drop(columns="seed").groupby(by, sort=False)
        mean, deviation = grouped.mean(), grouped.std()
        cells = {
            name: [f"{m:.3f} ({s:.3f})" for m, s in zip(mean[name], deviation[name], strict=True)] for name in mean
        }
        print(pd.DataFrame(cells, index=mean.index).to_string())


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/skin_clip")
    parser.add_argument("--parts", nargs="+", default=["birds", "skin"], choices=["birds", "skin"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clip_epochs", type=int, help="of the recipe tiny_clip, its own by default")
    parser.add_argument("--models", type=Path, help="keep the trained models here, and use those that are there")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    texts: list[dict[str, Any]] = []
    losses: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        for seed in range(options.seeds):
            if "birds" in options.parts:
                home = tiny_clip(seed, folder, options.clip_epochs)
                for kind, species in {"seen": 0, "new": 1 + seed}.items():
                    path = bird_features(home, species, seed)
                    texts.append({"data": f"{kind} birds", "seed": seed, **untrained(path)})
                losses += layers(path, "new birds", seed, folder, None)
            for dataset in ("ph2", "derm7pt") if "skin" in options.parts else ():
                path = skin_features(options.shared, dataset, folder)
                texts.append({"data": dataset, "seed": seed, **untrained(path)})
                losses += layers(path, dataset, seed, folder, 60)
    report("Test accuracy by texts alone", texts, ["data"])
    report("A concept layer on labels", losses, ["data", "loss"])


if __name__ == "__main__":
    run()
