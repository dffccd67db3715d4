"""Does more than the concepts leak through the bottleneck? Drawn birds with too few concepts, and three trained heads.

    python benchmarks/leakage.py --shared ../shared

The label of a drawn bird follows from ten attributes, of which two have concepts here: body colour and beak. What the
concepts allow at best is known. The backbone is trained once, by the recipe ``quickstart`` in two epochs on all 25
concepts of 3,000 images, without the label. On its frozen features of new birds, a seed (of weights and birds) each,
with the optimiser and the schedule of the recipe:

* *joint*: linear concepts, whose probabilities the head reads, trained with the label; both losses weigh the same;
* *embedding*: concept embeddings, trained the same way, without RandInt;
* *sequential*: linear concepts trained alone, then a logistic regression on their probabilities;
* *independent*: the same concepts, and the logistic regression on annotations;
* *independent, hard*: the same, and the head reads 0 or 1.

*truth* is the control in which nothing can leak: annotations in place of predictions, and the head of the line above.

All of them are tested with `LeakageReport` as it comes. A line a model: its label accuracy, the accuracy of its head on
true concepts, the accuracy of a probe on true concepts, label information beyond the true concepts (nats, and the share
of what these leave open), CTL, OIS, NIS (and that of the true concepts), completeness. Numbers are means over seeds,
with standard deviations; ``found`` is the share of seeds in which the report finds that label information leaks.

The setting is the third: with the first, everything trained together for longer, there was no time for three seeds; the
second was left after its test figures were seen, for its backbone had been trained with the label.

With ``--shared`` (a folder with ``data/cbm_heads`` and ``data/cub10``): published heads from the 312 attributes of CUB
to its 200 classes, on the true attributes of the classes, a row a class: what share of the annotators sees each
attribute, whether most do, and the logit of the share.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.backbones import Identity
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.callbacks import LeakageReport
from cbm_lightning.data import CachedFeatures, RenderedBirds
from cbm_lightning.metrics.leakage import Evidence, cross_splits
from cbm_lightning.metrics.leakage.study import LeakageResult, Measure, Sightings, measure_leakage

sys.path.append(str(Path(__file__).resolve().parent))
from runs import spread, trained

LOGISTIC = {"class_path": "sklearn.linear_model.LogisticRegression", "init_args": {"C": 100, "max_iter": 2000}}
FINDING = "Label information leaks"
SHOWN = {
    "acc": "acc",
    "head_on_truth_acc": "head on truth",
    "ceiling_acc": "probe on truth",
    "conditional_mi": "nats",
    "conditional_mi_share": "share",
    "ctl": "CTL",
    "ois": "OIS",
    "nis": "NIS",
    "nis_truth": "NIS of truth",
    "completeness": "completeness",
    "found": "found",
}


EQUAL = {"concept": 1}
CONCEPTS = {"name": "concepts", "train": ["bottleneck"], "loss_weights": {"label": 0}}
LABELS = {"name": "labels", "train": ["head"], "solver": LOGISTIC, "loss_weights": {"concept": 0}}
ON_TRUTH = {**LABELS, "head_input": "true"}
MODELS: dict[str, tuple[Callable[[], Bottleneck], Any]] = {
    "joint": (lambda: LinearBottleneck("sigmoid"), "joint"),
    "embedding": (lambda: EmbeddingBottleneck(8, randint=0.0), "joint"),
    "sequential": (lambda: LinearBottleneck("sigmoid"), [CONCEPTS, LABELS]),
    "independent": (lambda: LinearBottleneck("sigmoid"), [CONCEPTS, ON_TRUTH]),
    "independent, hard": (lambda: LinearBottleneck("hard"), [CONCEPTS, ON_TRUTH]),
}
CONTROL = "truth"
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


def birds(options: argparse.Namespace, seed: int) -> RenderedBirds:
    """New birds; those of seed 0 train the backbone."""
    sizes = {"num_train": options.num_train, "num_val": 500, "num_test": options.num_test}
    return RenderedBirds(**sizes, kept_groups=options.groups, seed=seed + 1)


def features(options: argparse.Namespace, seed: int, folder: Path) -> CachedFeatures:
    """The birds of a seed as the backbone sees them."""
    data = {"num_train": options.num_train, "num_val": 500, "num_test": 500}
    phases = [{**CONCEPTS, "train": ["backbone", "bottleneck"]}]
    overrides = {
        "data": {"init_args": data},
        "model": {"init_args": {"phases": phases}},
        "trainer": {"max_epochs": 2},
    }
    backbone = trained("quickstart", "backbone", 0, folder, overrides).backbone
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    return CachedFeatures(birds(options, seed), backbone, cache_dir=str(folder / "features"), seed=seed)


def fit(name: str, seed: int, options: argparse.Namespace, data: CachedFeatures) -> CBMModule:
    """A model on features."""
    bottleneck, phases = MODELS[name]
    torch.manual_seed(seed)
    model = CBMModule(
        Identity(),
        bottleneck(),
        data=data,
        phases=phases,
        loss_weights=EQUAL,
        lr=0.006,
        optimizer="AdamW",
        lr_scheduler="OneCycleLR",
        seed=seed,
    )
    # the solver takes an epoch
    Trainer(max_epochs=options.epochs + (phases != "joint"), limit_val_batches=0, **QUIET).fit(model, data)
    return model.eval()


def test(model: CBMModule, seed: int, data: CachedFeatures, folder: Path) -> tuple[LeakageResult, float]:
    """What the report finds in the test split, and the label accuracy."""
    report = LeakageReport(seed=seed)
    trainer = Trainer(callbacks=[report], default_root_dir=folder, **QUIET)
    trainer.test(model, data, verbose=False)
    assert report.result is not None
    return report.result, float(trainer.callback_metrics["test/label_acc"])


def control(model: CBMModule, seed: int, data: RenderedBirds) -> tuple[LeakageResult, float]:
    """The report if the predictions were the truth, and the accuracy of the model's head on it."""
    concepts, label = data.annotations("test")
    weight, bias = model.head.linear_map()
    correct = ((concepts.float() @ weight.T + bias).argmax(-1) == label).double()
    evidence = Evidence(concepts.float().unsqueeze(-1), concepts.float(), label, "multiclass", data.num_classes)
    splits = cross_splits(len(label), 5, 2, seed)
    names, best = data.concept_set.names, data.bayes_accuracy()
    measures: list[Measure] = ["ctl", "conditional_mi", "head_on_truth", "ois", "nis"]
    result = measure_leakage(Sightings(evidence, correct, correct), splits, names, measures, seed, best)
    return result, float(correct.mean())


def measured(name: str, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A row of the table and the words of the report, or what an earlier call left in the folder."""
    kept = folder / f"{name} {seed}.json"
    if not kept.exists():
        data = features(options, seed, folder)
        if name == CONTROL:
            model = fit("independent, hard", seed, options, data)
            result, accuracy = control(model, seed, birds(options, seed))
        else:
            result, accuracy = test(fit(name, seed, options, data), seed, data, folder)
        kept.write_text(json.dumps({"row": row(name, seed, result, accuracy), "words": " ".join(result.sentences)}))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def row(name: str, seed: int, result: LeakageResult, accuracy: float) -> dict[str, Any]:
    """What the table shows of a model."""
    found = {**result.scalars(), "acc": accuracy, "found": float(result.sentences[0].startswith(FINDING))}
    return {"model": name, "seed": seed} | {title: found.get(key, np.nan) for key, title in SHOWN.items()}


def drawn_birds(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """Train, test, print the words of the first seed and the table."""
    rows = []
    for seed in range(options.seeds):
        for name in [*MODELS, CONTROL]:
            found = measured(name, seed, options, folder)
            rows.append(found["row"])
            if seed == 0:
                print(f"\n{name}: {found['words']}", flush=True)
    best = birds(options, 0).bayes_accuracy()
    print(f"\nbest accuracy that the concepts allow: {best:.3f}\n")
    return pd.DataFrame(rows)


def published_heads(shared: Path) -> pd.DataFrame:
    """Accuracy of trained heads on the true attributes of the 200 classes of CUB."""
    heads = load_file(shared / "data" / "cbm_heads" / "cub_attr312_to_class200.safetensors")
    stored = np.load(shared / "data" / "cub10" / "cub200_class_attributes.npz")
    share = torch.from_numpy(stored["class_attr_312_percent"].astype(np.float32)) / 100
    label = torch.arange(len(share))
    inputs = {"shares of annotators": share, "majority": (share >= 0.5).float(), "logits": share.logit(eps=0.01)}
    rows = [
        {"head": name, "attributes": kind, "accuracy": float(((x @ weight.T + bias).argmax(1) == label).float().mean())}
        for name in ("independent", "sequential", "joint")
        for weight, bias in [(heads[f"{name}.weight"], heads[f"{name}.bias"])]
        for kind, x in inputs.items()
    ]
    return pd.DataFrame(rows).pivot(index="head", columns="attributes", values="accuracy")


def show(table: pd.DataFrame) -> None:
    """As a table of Markdown."""
    lines = [[str(table.index.name), *map(str, table.columns)], ["---"] * (1 + len(table.columns))]
    lines += [[str(name), *map(str, row)] for name, row in zip(table.index, table.to_numpy(object), strict=True)]
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, help="folder with data/cbm_heads; without it, these heads are left out")
    parser.add_argument("--runs", type=Path, help="keep models and results here, and take up what is there")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--num_train", type=int, default=3000)
    parser.add_argument("--num_test", type=int, default=1000)
    parser.add_argument("--groups", nargs="+", default=["body colour", "beak"], help="attributes that have concepts")
    options = parser.parse_args()
    if options.shared is not None:
        show(published_heads(options.shared).round(3))
    if options.seeds:
        with tempfile.TemporaryDirectory() as made:
            show(spread(drawn_birds(options, options.runs or Path(made)), ["model"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
