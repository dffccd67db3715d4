"""Which policy needs the fewest corrections? Drawn birds with within-class noise, and photographs of ten species.

    python benchmarks/policies.py --shared ../shared --figure benchmarks/intervention_curves.png

Each setting is trained with three seeds and tested with `InterventionEvaluation`, a group of concepts a step. Both are
made hard enough that the model errs: the birds by within-class noise, few images and a low resolution, the photographs
by a low resolution. ``area`` is the mean label accuracy over all budgets, ``halving`` the number of groups that halves
the excess error over the head on true concepts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor

from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.callbacks.intervention_figure import draw_curves
from cbm_lightning.callbacks.loggers import rasterize
from cbm_lightning.cli import main
from cbm_lightning.interventions.study import StudyResult
from cbm_lightning.interventions.summaries import area, halving_budget

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import cub10
from cub_tree import write_cub_tree

POLICIES = ["rand", "ucp", "cctp", "ectp", "eudtp", "coop", "global_improvement", "lcp", "greedy"]
ORACLES = ("lcp", "greedy")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def birds(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """The quickstart recipe, trained independently, on few birds that vary within their species."""
    data = {
        "within_class_variation": options.variation,
        "size": options.bird_pixels,
        "num_train": options.num_train,
        "num_test": 2000,
    }
    # the head learns from annotations, in a phase that no validation loss can be compared across
    keep_last = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"monitor": None}}
    trainer = {"max_epochs": options.bird_epochs, "callbacks": [keep_last], **QUIET}
    backbone = {"init_args": {"img_size": options.bird_pixels}}
    model = {"init_args": {"phases": "independent", "backbone": backbone}}
    return "quickstart", {"trainer": trainer, "model": model, "data": {"init_args": data}}


def photographs(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """The recipe `cub_independent` on frozen features of photographs of low resolution."""
    tree = folder / "cub"
    if not tree.is_dir():
        write_cub_tree(tree, options.shared / "data" / "cub10")
    config = cub10.overrides(options.shared.resolve(), tree, finetune=False, epochs=options.epochs)
    config["model"]["init_args"]["backbone"]["init_args"]["img_size"] = options.pixels
    return "cub_independent", config


SETTINGS = {"RenderedBirds": birds, "cub10": photographs}


def study(setting: str, options: argparse.Namespace, seed: int, folder: Path) -> StudyResult:
    """Train, then correct."""
    recipe, overrides = SETTINGS[setting](options, folder)
    config = folder / f"{setting}.yaml"
    config.write_text(yaml.safe_dump(overrides))
    arguments = ["fit", "--config", recipe, "--config", str(config), "--seed_everything", str(seed)]
    cli = main([*arguments, "--trainer.logger.save_dir", str(folder / "runs")])
    evaluation = InterventionEvaluation(POLICIES, unit="group", num_seeds=options.trials, seed=seed)
    trainer = Trainer(callbacks=[evaluation], logger=False, default_root_dir=str(folder), **QUIET)
    trainer.test(cli.model, datamodule=cli.datamodule, ckpt_path=cli.trainer.checkpoint_callback.best_model_path)
    assert evaluation.result is not None
    return evaluation.result


def report(setting: str, results: list[StudyResult]) -> None:
    """Means over the seeds of training, and their standard deviation."""
    plain = torch.stack([result.scores("ucp")[0, 0] for result in results])
    truth = torch.stack([result.scores("ucp")[0, -1] for result in results])
    print(f"\n{setting}: {results[0].budgets[-1]} groups, {results[0].samples} test images, {len(results)} seeds;")
    print(f"label accuracy {spread(plain)} uncorrected, {spread(truth)} with every group corrected\n")
    print("| policy | area | gain over `rand` | halving |")
    print("| --- | --- | --- | --- |")
    areas = {p: torch.stack([area(r.budgets, r.scores(p)).mean() for r in results]) for p in POLICIES}
    halves = {
        p: torch.stack([halving_budget(r.budgets, r.scores(p), r.num_units).mean() for r in results]) for p in POLICIES
    }
    for policy in POLICIES:
        ahead = "" if policy == "rand" else spread(areas[policy] - areas["rand"])
        name = f"`{policy}`" + (" (oracle)" if policy in ORACLES else "")
        print(f"| {name} | {spread(areas[policy])} | {ahead} | {spread(halves[policy], 1)} |")


def spread(values: Tensor, digits: int = 3) -> str:
    """Mean and standard deviation."""
    return f"{values.mean():.{digits}f} ± {values.std(correction=0):.{digits}f}"


def average(results: list[StudyResult]) -> StudyResult:
    """The mean curves over the seeds of training; trials of policies that draw stay apart."""
    curves = {
        policy: {name: torch.stack([r.curves[policy][name] for r in results]).mean(0) for name in first}
        for policy, first in results[0].curves.items()
    }
    return replace(results[0], curves=curves)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/cub10")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=5, help="random orders a model")
    parser.add_argument("--epochs", type=int, default=40, help="of the photographs' recipe")
    parser.add_argument("--pixels", type=int, default=96, help="of the photographs")
    parser.add_argument("--bird_epochs", type=int, default=12)
    parser.add_argument("--num_train", type=int, default=800, help="drawn birds to train on")
    parser.add_argument("--variation", type=float, default=0.15, help="within-class variation of the birds")
    parser.add_argument("--bird_pixels", type=int, default=32)
    parser.add_argument("--figure", type=Path, help="where to draw the curves")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    pictures = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting in options.settings:
            results = [study(setting, options, seed, Path(scratch)) for seed in range(options.seeds)]
            report(setting, results)
            pictures.append(rasterize(draw_curves(average(results), "group", setting)))
    if options.figure:
        from PIL import Image

        height = min(picture.shape[1] for picture in pictures)
        beside = torch.cat([picture[:, :height] for picture in pictures], 2)
        Image.fromarray(beside.permute(1, 2, 0).numpy()).save(options.figure)


if __name__ == "__main__":
    run()
