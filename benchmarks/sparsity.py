"""Which way to few concepts a class costs least accuracy? Drawn birds, and photographs of ten species.

    python benchmarks/sparsity.py --shared ../shared --figure benchmarks/nec_curves.png

All heads are linear, on concept probabilities, and are judged by label accuracy at numbers of effective concepts (NEC):

path       an exact elastic-net path on the concepts of a model trained jointly (`SparsityEvaluation`);
pruned     that model's own head, the largest weights on standardised concepts;
random     a path on as many random directions of the backbone's features;
schedule   a model trained anew with a penalty steered to the NEC (`SparsitySchedule`, ``mode="adaptive"``);
gradual    a model trained anew with gradual magnitude pruning to the NEC (``mode="cubic"``);
dense      the jointly trained model's own head, with all concepts.

``refitted`` heads have their kept weights fitted anew. Every number is a mean over seeds, with its standard deviation.
The birds are made hard by within-class noise, few images and a low resolution. The photographs are those of
``cub10.py``, each encoded once by a frozen backbone, but the head of the recipe reads probabilities instead of logits:
what is small is dropped while the model trains, so weights must be on one scale. Schedules keep their defaults but for
the target and a last fifth of the training in which what is left trains freely. The model of the path is the checkpoint
that the recipe keeps, by the loss in validation; the models with a schedule are the last, whose weights are sparse.
All heads learn ten times faster than in the recipes (``--head_lr``): at the recipes' rate a head trained from scratch
has hardly begun to learn when it is to become sparse, and ends with a training loss many times larger.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from lightning.pytorch import Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbm_lightning.callbacks import SparsityEvaluation
from cbm_lightning.callbacks.sparsity_figure import COLOURS, LABELS, REFIT
from cbm_lightning.cli import main

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import cub10
from cub_tree import write_cub_tree

MODES = {"schedule": "adaptive", "gradual": "cubic"}
HEADS = [f"{kind}{suffix}" for kind in ("path", "pruned", "random") for suffix in ("", REFIT)]
ROWS = [*HEADS[:4], *MODES, *HEADS[4:], "dense"]
CURVE_LEVELS = [2, 3, 5, 8, 10, 15, 20, 25]
FINETUNE = 0.2
MARKERS = {"schedule": ("s", "#009E73"), "gradual": ("D", "#CC79A7")}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def birds(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """The quickstart recipe on few birds that vary within their species."""
    data = {
        "within_class_variation": options.variation,
        "size": options.bird_pixels,
        "num_train": options.num_train,
        "num_test": 2000,
    }
    model = {
        "backbone": {"init_args": {"img_size": options.bird_pixels}},
        "lr_multipliers": {"head": options.head_lr},
    }
    trainer = {"max_epochs": options.bird_epochs, **QUIET}
    return "quickstart", {"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}


def photographs(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """The recipe `cub_joint` on frozen features, with a head that reads probabilities."""
    tree = folder / "cub"
    if not tree.is_dir():
        write_cub_tree(tree, options.shared / "data" / "cub10")
    config = cub10.overrides(options.shared.resolve(), tree, finetune=False, epochs=options.epochs)
    config["model"]["init_args"] |= {
        "bottleneck": {"init_args": {"link": options.link}},
        # a mapping replaces the recipe's, whose backbone, if it trained, would learn at this rate
        "lr_multipliers": {"backbone": 0.1, "head": options.head_lr},
    }
    return "cub_joint", config


SETTINGS = {"RenderedBirds": birds, "cub10": photographs}


def scheduled(config: dict[str, Any], mode: str, level: float) -> dict[str, Any]:
    """The same with a schedule, and the last checkpoint instead of the best, for early ones are not sparse yet."""
    keep_last = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": None}}
    options = {"mode": mode, "target_nec": level, "finetune": FINETUNE}
    schedule = {"class_path": "cbm_lightning.callbacks.SparsitySchedule", "init_args": options}
    return {**config, "trainer": {**config["trainer"], "callbacks": [keep_last, schedule]}}


def evaluate(
    recipe: str, overrides: dict[str, Any], seed: int, folder: Path, evaluation: SparsityEvaluation
) -> dict[str, float]:
    """Train by the command line, then test the checkpoint that it kept; returns the metrics."""
    config = folder / "overrides.yaml"
    config.write_text(yaml.safe_dump(overrides))
    arguments = ["fit", "--config", recipe, "--config", str(config), "--seed_everything", str(seed)]
    cli = main([*arguments, "--trainer.logger.save_dir", str(folder / "runs")])
    trainer = Trainer(callbacks=[evaluation], logger=False, default_root_dir=str(folder), **QUIET)
    trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=cli.trainer.checkpoint_callback.best_model_path)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def study(setting: str, options: argparse.Namespace, seed: int, folder: Path) -> pd.DataFrame:
    """All heads of a seed: a row a head and level with its accuracy and the NEC that it really has."""
    recipe, overrides = SETTINGS[setting](options, folder)
    evaluation = SparsityEvaluation(sorted({*options.levels, *CURVE_LEVELS}), seed=seed)
    metrics = evaluate(recipe, overrides, seed, folder, evaluation)
    assert evaluation.result is not None
    rows = evaluation.result.table().to_dict("records")
    for level in options.levels:
        dense = {"nec": metrics["test/sparsity/nec"], "accuracy": metrics["test/label_acc"]}
        rows.append({"head": "dense", "level": level, **dense})
        for head, mode in MODES.items():
            # only the model's own head is of interest here, so the other heads are left out where they can be
            own = SparsityEvaluation([level], refit_ridge=None, random_concepts=False)
            found = evaluate(recipe, scheduled(overrides, mode, level), seed, folder, own)
            reached = {"nec": found["test/sparsity/nec"], "accuracy": found["test/label_acc"]}
            rows.append({"head": head, "level": level, **reached})
    return pd.DataFrame(rows).assign(setting=setting, seed=seed)


def report(found: pd.DataFrame, options: argparse.Namespace) -> None:
    """A column a dataset and level; then what NEC the models with a schedule reached."""
    columns = [(setting, level) for setting in options.settings for level in options.levels]
    over_seeds = found.groupby(["head", "setting", "level"])[["accuracy", "nec"]]
    mean, std = over_seeds.mean(), over_seeds.std(ddof=0)

    def row(name: str, head: str, value: str, digits: int) -> str:
        keys = [(head, setting, level) for setting, level in columns]
        cells = [f"{mean.loc[key, value]:.{digits}f} ± {std.loc[key, value]:.{digits}f}" for key in keys]
        return f"| {name} | {' | '.join(cells)} |"

    print(f"\n| head ({options.seeds} seeds) | " + " | ".join(f"{s}, NEC {level:g}" for s, level in columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for head in ROWS:
        refitted = " refitted" if head.endswith(REFIT) else ""
        print(row(f"`{head.removesuffix(REFIT)}`{refitted}", head, "accuracy", 3))
    for head in MODES:
        print(row(f"NEC of `{head}`", head, "nec", 2))


def draw(found: pd.DataFrame, options: argparse.Namespace) -> Figure:
    """A panel a dataset, mean over the seeds."""
    figure = Figure(figsize=(4.6 * len(options.settings), 4.2), dpi=150, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(options.settings), squeeze=False)[0]
    for axes, setting in zip(panels, options.settings, strict=True):
        means = found[found.setting == setting].groupby(["head", "level"])[["nec", "accuracy"]].mean()
        draw_panel(axes, means)
        axes.set_title(setting, size=10)
    panels[0].set_ylabel("label accuracy")
    panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def draw_panel(axes: Axes, means: pd.DataFrame) -> None:
    """Curves of the heads that are fitted after training, and a marker for each model that became sparse in it."""
    for head in HEADS:
        kind, refit = head.removesuffix(REFIT), head.endswith(REFIT)
        curve = means.loc[head]
        style = {"ls": "--", "marker": "^"} if refit else {"ls": "-", "marker": "o"}
        label = LABELS[kind] + (", refitted" if refit else "")
        axes.plot(curve.nec, curve.accuracy, color=COLOURS[kind], ms=4, lw=1.6, label=label, **style)
    for head, (marker, colour) in MARKERS.items():
        points = means.loc[head]
        label = f"{head}, in training"
        axes.plot(points.nec, points.accuracy, marker, color=colour, mec="black", ms=7, label=label, zorder=3)
    axes.axhline(means.loc["dense"].accuracy.iloc[0], color="black", ls=":", lw=1, label="dense head")
    axes.set_xlabel("effective concepts a class (NEC)")
    axes.set_xlim(left=0)
    axes.grid(axis="y", lw=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/cub10")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--levels", nargs="+", type=float, default=[5.0, 10.0], help="effective concepts a class")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="of the photographs' recipe")
    parser.add_argument("--link", default="sigmoid", choices=["sigmoid", "logits"], help="of the photographs' concepts")
    parser.add_argument("--head_lr", type=float, default=10.0, help="times the recipe's learning rate, for every head")
    parser.add_argument("--bird_epochs", type=int, default=12)
    parser.add_argument("--num_train", type=int, default=800, help="drawn birds to train on")
    parser.add_argument("--variation", type=float, default=0.15, help="within-class variation of the birds")
    parser.add_argument("--bird_pixels", type=int, default=32)
    parser.add_argument("--figure", type=Path, help="where to draw accuracy over NEC")
    parser.add_argument("--table", type=Path, help="where to write every head of every seed, as CSV")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    with tempfile.TemporaryDirectory() as scratch:
        studies = [study(s, options, seed, Path(scratch)) for s in options.settings for seed in range(options.seeds)]
    found = pd.concat(studies, ignore_index=True)
    if options.table:
        found.to_csv(options.table, index=False)
    report(found, options)
    if options.figure:
        draw(found, options).savefig(options.figure)


if __name__ == "__main__":
    run()
