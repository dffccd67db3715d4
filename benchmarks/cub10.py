"""The four CUB recipes on real photographs of ten species, beside a linear probe on the same frozen features.

    python benchmarks/cub10.py --shared ../shared

The backbone (mobilenetv2_100 with iNaturalist bird weights) is frozen and each photograph is encoded once, so that a
run costs seconds; everything else is the recipe as shipped. ``--finetune`` trains the backbone too, as the recipes do.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cbm_lightning.cli import main
from cbm_lightning.data import CachedFeatures

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from cub_tree import write_cub_tree

RECIPES = ("cub_joint", "cub_sequential", "cub_independent", "cub_cem")


def overrides(shared: Path, tree: Path, finetune: bool, epochs: int) -> dict[str, Any]:
    """What differs from the shipped recipes: local weights, ten classes, and (by default) a frozen, cached backbone."""
    backbone = {
        "name": "mobilenetv2_100",
        "pretrained": False,
        "checkpoint_path": str(shared / "data/weights_mobilenetv2/mobilenetv2_100_inat_bird_fp16.safetensors"),
        "model_args": {"pad_type": "same"},
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "frozen": not finetune,
    }
    photographs = {"root": str(tree), "classes": list(range(1, 11)), "batch_size": 16}
    cached = {
        "class_path": "CachedFeatures",
        "init_args": {
            "data": {"class_path": "CUB200", "init_args": photographs},
            "cache_dir": str(tree / "cache"),
            "batch_size": 16,
        },
    }
    return {
        "trainer": {
            "max_epochs": epochs,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "accelerator": "cpu",
        },
        "model": {"init_args": {"backbone": {"init_args": backbone}}},
        "data": {"init_args": photographs} if finetune else cached,
    }


def train(recipe: str, config: Path, seed: int, folder: Path) -> tuple[Any, dict[str, float]]:
    """Run a recipe by the command line; returns it and the test metrics."""
    arguments = ["fit", "--config", recipe, "--config", str(config), "--seed_everything", str(seed)]
    cli = main([*arguments, "--trainer.logger.save_dir", str(folder)])
    metrics = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    predictions = cli.trainer.predict(cli.model, cli.datamodule)
    probs = torch.cat([batch["concept_probs"] for batch in predictions])
    train_concepts, _ = cli.datamodule.annotations("train")
    concepts, _ = cli.datamodule.annotations("test")
    varies = train_concepts.amin(0) < train_concepts.amax(0)
    right = (probs >= 0.5) == (concepts >= 0.5)
    metrics["varying"] = right[:, varies].float().mean().item()
    metrics["num_varying"] = int(varies.sum())
    return cli, metrics


def linear_probe(data: CachedFeatures) -> float:
    """Test accuracy of a logistic regression on the frozen training features, its strength chosen on validation."""
    x = {split: data.splits[split].tensors["embedding"].float().numpy() for split in ("train", "val", "test")}
    y = {split: data.splits[split].tensors["label"].numpy() for split in x}
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000)).fit(x["train"], y["train"])
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    ]
    best = max(probes, key=lambda probe: probe.score(x["val"], y["val"]))
    return float(best.score(x["test"], y["test"]))


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/cub10")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--finetune", action="store_true", help="train the backbone too")
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        tree, config = Path(scratch) / "cub", Path(scratch) / "cub10.yaml"
        write_cub_tree(tree, options.shared / "data" / "cub10")
        config.write_text(yaml.safe_dump(overrides(options.shared.resolve(), tree, options.finetune, options.epochs)))
        for recipe in options.recipes:
            scores = []
            for seed in range(options.seeds):
                cli, metrics = train(recipe, config, seed, Path(scratch) / "runs")
                scores.append([metrics["test/label_acc"], metrics["varying"]])
            mean, spread = torch.tensor(scores).mean(0), torch.tensor(scores).std(0, correction=0)
            cells = " | ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean, spread, strict=True))
            lines.append(f"| `{recipe}` | {cells} |")
        if isinstance(cli.datamodule, CachedFeatures):
            lines.append(f"| linear probe on the same features | {linear_probe(cli.datamodule):.3f} | – |")
    print(
        f"\n| recipe ({options.seeds} seeds) | label accuracy | concept accuracy ({metrics['num_varying']} that vary) |"
    )
    print("| --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    run()
