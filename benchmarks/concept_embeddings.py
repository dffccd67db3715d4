"""Do concept embeddings close the gap of an incomplete concept set, and does it help to train for corrections?

    python benchmarks/concept_embeddings.py

Both on small drawn birds, through the recipes ``cem`` and ``intcem``, three seeds each (weights, draws and images).

1. *Incomplete concepts* (the claim of CEM): of ten attributes only body colour and belly pattern are annotated, so that
   their true values tell the label with an accuracy of .655 at best. A linear bottleneck, trained jointly and
   sequentially, a concept embedding model, and a black box (64 free dimensions and no concept loss) are trained on the
   same images with the same backbone and optimizer. ``corrected`` and ``inverted`` are the label accuracies after all
   seven concepts were set to what is true, and to the opposite: what a person can still do.
2. *Corrections* (the claim of IntCEM): a concept embedding model with RandInt and an intervention-aware one on few
   birds that vary within their species. Both are asked at random, by ``ucp`` and by ``coop``, an attribute a step; the
   second by its own policy too, drawn (``prior``) and by what it prefers. ``area`` is the mean label accuracy over all
   budgets.

Both models of a part have the backbone, optimizer, images and number of steps of the recipe.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from lightning.pytorch import Trainer
from runs import QUIET, trained

from cbm_lightning import CBMModule
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.data import RenderedBirds
from cbm_lightning.interventions.policies import LearnedPrior
from cbm_lightning.interventions.study import StudyResult
from cbm_lightning.interventions.summaries import area
from cbm_lightning.types import Intervention

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
BUDGETS = (0, 1, 2, 3, 5, 10)
Overrides = dict[str, Any]
# no loss can be compared across phases
KEEP_LAST = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"monitor": None, "save_last": True},
}


def linear(**options: Any) -> Overrides:
    """A linear bottleneck in place of the recipe's; its head reads few numbers in [0, 1] and needs larger steps."""
    return {"bottleneck": {"class_path": "LinearBottleneck", "init_args": options}, "lr_multipliers": {"head": 10}}


INCOMPLETE: dict[str, Overrides] = {
    "linear, joint": linear(),
    "linear, sequential": {**linear(), "phases": "sequential"},
    "embeddings": {},
    "black box": {**linear(extra_dims=64), "lr_multipliers": {}, "loss_weights": {"concept": 0}},
}
ANY = ["rand", "ucp", "coop"]
CORRECTED = {"embeddings": ANY, "intervention-aware": [*ANY, "prior", "prior, likeliest"]}


def data_of(recipe: str) -> Overrides:
    """Options of the birds of a recipe."""
    options: Overrides = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["data"]["init_args"]
    return options


# ---------------------------------------------------------------- 1. incomplete concepts


def incomplete(seed: int, folder: Path) -> pd.DataFrame:
    """A row a model: accuracies, uncorrected and with every concept set."""
    rows = []
    for name, changes in INCOMPLETE.items():
        overrides = {"trainer": {"callbacks": [KEEP_LAST]}, "model": {"init_args": changes}}
        found = accuracies(trained("cem", name, seed, folder, overrides), data_of("cem"), seed)
        rows.append({"model": name, "seed": seed, **found})
        print(f"seed {seed}, {name}: {found}", flush=True)
    return pd.DataFrame(rows)


@torch.no_grad()
def accuracies(model: CBMModule, data: Overrides, seed: int) -> dict[str, float]:
    """Of concepts, and of the label as predicted, with all concepts set to the truth, and to its opposite."""
    birds = RenderedBirds(**{**data, "seed": seed}).follow(model)
    birds.setup("test")
    images = birds.splits["test"]
    batch = images.__getitems__(list(range(len(images))))
    prediction, truth = model(batch), batch["concepts"]
    everything = torch.ones_like(truth).bool()
    told = {
        "label": prediction,
        "corrected": model.intervene(prediction, Intervention(everything, truth)),
        "inverted": model.intervene(prediction, Intervention(everything, 1 - truth)),
    }
    right = ((prediction.concepts.probs >= 0.5) == (truth >= 0.5)).float().mean()
    labels = {name: (p.logits.argmax(1) == batch["label"]).float().mean() for name, p in told.items()}
    return {"concepts": float(right), **{name: float(share) for name, share in labels.items()}}


# ---------------------------------------------------------------- 2. corrections


def corrections(seed: int, trials: int, folder: Path) -> pd.DataFrame:
    """A row a model and policy: label accuracies at some budgets and the area under the curve."""
    birds, epochs = data_of("intcem"), yaml.safe_load((RECIPES / "intcem.yaml").read_text())["trainer"]["max_epochs"]
    same = {
        "trainer": {"max_epochs": epochs, "callbacks": [KEEP_LAST]},
        "data": {"init_args": {**birds, "kept_groups": None}},
    }
    runs = {"embeddings": ("cem", same), "intervention-aware": ("intcem", {})}
    rows = []
    for name, (recipe, overrides) in runs.items():
        model = trained(recipe, f"corrections {name}", seed, folder, overrides)
        result = study(model, birds, CORRECTED[name], seed, trials)
        for policy in CORRECTED[name]:
            scores = result.scores(policy).mean(0)
            curve = {str(budget): round(float(scores[budget]), 4) for budget in BUDGETS}
            row = {"model": name, "policy": policy, "seed": seed, **curve}
            rows.append({**row, "area": float(area(result.budgets, scores))})
            print(f"seed {seed}, {name}, {policy}: area {rows[-1]['area']:.3f}, {curve}", flush=True)
    return pd.DataFrame(rows)


def study(model: CBMModule, data: Overrides, policies: list[str], seed: int, trials: int) -> StudyResult:
    """Correct one attribute a step."""
    own = {"prior, likeliest": LearnedPrior(sample=False, label="prior, likeliest")}
    named = [own.get(policy, policy) for policy in policies]
    evaluation = InterventionEvaluation(named, "group", num_seeds=trials, seed=seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(**{**QUIET, "callbacks": [evaluation]}, logger=False, default_root_dir=scratch)
        trainer.test(model, datamodule=RenderedBirds(**{**data, "seed": seed}), verbose=False)
    assert evaluation.result is not None
    return evaluation.result


# ---------------------------------------------------------------- report


def show(table: pd.DataFrame, by: list[str]) -> None:
    """A Markdown table: mean and standard deviation over the seeds, a row a value of ``by``."""
    measured = [column for column in table.columns if column not in (*by, "seed")]
    print(f"\n| {' | '.join([*by, *measured])} |\n| {' | '.join(['---'] * len([*by, *measured]))} |")
    for names, rows in table.groupby(by, sort=False):
        cells = [f"{rows[column].mean():.3f} ± {rows[column].std(ddof=0):.3f}" for column in measured]
        print(f"| {' | '.join([*names, *cells])} |")


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["incomplete", "corrections"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=5, help="random orders a model")
    parser.add_argument("--models", type=Path, help="keep trained models in this folder, and use those that are there")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # the command line is called from Python below
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.models or Path(scratch)
        if "incomplete" in options.parts:
            found = pd.concat([incomplete(seed, folder) for seed in options.seeds])
            ceiling = RenderedBirds(**data_of("cem")).bayes_accuracy()
            print(f"\nbest label accuracy from the true concepts: {ceiling:.3f}")
            show(found, ["model"])
        if "corrections" in options.parts:
            found = pd.concat([corrections(seed, options.trials, folder) for seed in options.seeds])
            show(found, ["model", "policy"])


if __name__ == "__main__":
    run()
