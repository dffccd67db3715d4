"""What intervention curves cost: beside PyC, beside re-predicting at each budget, and as the data grow.

    OMP_NUM_THREADS=2 python benchmarks/interventions.py --figure benchmarks/intervention_growth.png

1. The curves of RAND and UCP at 33 budgets on 1,024 drawn images, 32 concepts, ResNet-18: ours (encoding included),
   PyC's intervention contexts, a loop that predicts from the image at each budget as cem does, and one plain encoding
   pass. All share one encoder. The contenders take turns and ratios are taken within a turn.
2. The plans of ECTP and of adaptive CooP at the size of the CUB test split (5,794 images, 112 concepts in 28 groups,
   200 classes), features computed before; time and peak memory of a process of its own.
3. The time of ECTP as the number of images, concepts and classes grows.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import math
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cbm_lightning import CBMModule, ConceptSet, Intervention
from cbm_lightning.backbones import Identity, ModuleBackbone
from cbm_lightning.callbacks import InterventionEvaluation
from cbm_lightning.interventions import InterventionEngine, InterventionStudy, Person, Policy, Samples, Units

IMAGES, CONCEPTS, CLASSES, PIXELS, BATCH = 1024, 32, 10, 32, 256
CUB = {"samples": 5794, "concepts": 112, "classes": 200, "groups": 28}
Turn = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each contender")
    parser.add_argument("--parts", nargs="+", default=["curves", "cub", "growth"], choices=["curves", "cub", "growth"])
    parser.add_argument("--figure", type=Path, help="where to draw the growth")
    parser.add_argument("--alone", choices=["ectp", "coop"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    if options.alone:
        print(json.dumps(cub_alone(options.alone, options.repeats)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.repeats} turns")
    if "curves" in options.parts:
        curves(options.repeats)
    if "cub" in options.parts:
        cub(options.repeats)
    if "growth" in options.parts:
        growth(options.repeats, options.figure)


# ---------------------------------------------------------------- 1. curves


def curves(repeats: int) -> None:
    """Time every contender, in turns."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator)
    concepts = (torch.rand(IMAGES, CONCEPTS, generator=generator) < 0.4).float()
    labels = torch.randint(CLASSES, (IMAGES,), generator=generator)
    loader = DataLoader(TensorDataset(images, concepts, labels), BATCH)
    encoder = resnet18()
    model = CBMModule(ModuleBackbone(encoder, (3, PIXELS, PIXELS)), concepts=CONCEPTS, num_classes=CLASSES).eval()
    contenders: dict[str, Turn] = {
        "cbm_lightning": lambda: ours(model, loader, 1),
        "cbm_lightning, RAND with 5 seeds": lambda: ours(model, loader, 5),
        "the same by Trainer.test": lambda: ours_by_trainer(model, loader),
        "one encoding pass": lambda: encode(model, loader),
        "re-predicting at each budget": lambda: repredict(model, loader),
    }
    if importlib.util.find_spec("torch_concepts"):
        contenders["PyC"] = make_pyc(encoder, images, concepts, labels)
    else:
        print("PyC is left out, it is not installed: pip install 'cbm-lightning[bench]'")
    print(
        f"\nRAND and UCP, {CONCEPTS + 1} budgets, {IMAGES} images, {CONCEPTS} concepts, ResNet-18, batches of {BATCH}"
    )
    seconds = take_turns(contenders, repeats)
    for name, values in seconds.items():
        ratio = [value / own for value, own in zip(values, seconds["cbm_lightning"], strict=True)]
        print(f"{name:34}{spread(values, 3):>30} s{spread(ratio, 2):>30} x cbm_lightning")
    share = [a / b for a, b in zip(seconds["cbm_lightning"], seconds["one encoding pass"], strict=True)]
    print(f"cbm_lightning / one encoding pass: {spread(share, 3)}")


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    network = resnet18(weights=None)
    network.fc = nn.Identity()
    return network.eval()


@torch.inference_mode()
def encode(model: CBMModule, loader: DataLoader[Any]) -> None:
    """Predict every image once."""
    for image, _, _ in loader:
        model(image)


@torch.inference_mode()
def ours(model: CBMModule, loader: DataLoader[Any], seeds: int) -> Any:
    """Encode once, then both policies at all budgets."""
    engine = InterventionEngine(model, Units.make(model.concept_set))
    policies = [Policy.make("rand"), Policy.make("ucp")]
    study = InterventionStudy(engine, Person(model.concept_set), policies, num_classes=CLASSES, num_seeds=seeds)
    seen = 0
    for batch in loader:
        content = model.read_batch(batch)
        index = torch.arange(seen, seen + len(content["label"]))
        study.add(study.encode(model(content), content, index))
        seen += len(index)
    return study.finish()


def ours_by_trainer(model: CBMModule, loader: DataLoader[Any]) -> None:
    """The callback in a test, with all metrics of the test, table and figure."""
    trainer = lightning.pytorch.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=[InterventionEvaluation(["rand", "ucp"], num_seeds=1)],
        default_root_dir="runs",
    )
    trainer.test(model, loader, verbose=False)


@torch.inference_mode()
def repredict(model: CBMModule, loader: DataLoader[Any]) -> None:
    """What cem does: the whole model again at every budget."""
    generator = torch.Generator().manual_seed(0)
    for policy in ("rand", "ucp"):
        for budget in range(CONCEPTS + 1):
            for image, concepts, _ in loader:
                prediction = model(image)
                probs = prediction.concepts.probs
                score = torch.rand(probs.shape, generator=generator) if policy == "rand" else -(probs - 0.5).abs()
                mask = score.argsort(1, descending=True).argsort(1) < budget
                model.intervene(prediction, Intervention(mask, concepts))


def make_pyc(encoder: nn.Module, images: Tensor, concepts: Tensor, labels: Tensor) -> Turn:
    """PyC's policies through its intervention context, as its own experiments use it."""
    from torch_concepts import Annotations
    from torch_concepts.nn import (
        ConceptBottleneckModel,
        GroundTruthIntervention,
        RandomPolicy,
        UncertaintyInterventionPolicy,
        intervention,
    )

    annotations = Annotations(
        labels=[*(f"c{k}" for k in range(CONCEPTS)), "y"],
        cardinalities=[1] * CONCEPTS + [CLASSES],
        types=["binary"] * CONCEPTS + ["categorical"],
    )
    model = ConceptBottleneckModel(
        input_size=(3, PIXELS, PIXELS),
        annotations=annotations,
        task_names=["y"],
        backbone=encoder,
        latent_size=512,
    ).eval()
    names = [f"c{k}" for k in range(CONCEPTS)]
    truth = torch.logit(concepts.clamp(1e-6, 1 - 1e-6))

    @torch.inference_mode()
    def turn() -> None:
        for policy in (RandomPolicy, UncertaintyInterventionPolicy):
            for budget in range(CONCEPTS + 1):
                for rows in torch.arange(IMAGES).split(BATCH):
                    image, correct = images[rows], GroundTruthIntervention(truth[rows])
                    if budget == 0:
                        model(query=["y"], input=image)
                        continue
                    share = (budget - 1) / (CONCEPTS - 1)
                    with intervention(model, correct, policy(), names, quantile=share):
                        model(query=["y"], input=image)

    return turn


# ---------------------------------------------------------------- 2. the size of CUB


def drawn_samples(samples: int, concepts: int, classes: int, groups: int) -> tuple[CBMModule, list[Samples]]:
    """A model on drawn features, and its predictions in blocks as a study makes them."""
    torch.manual_seed(0)
    names = [f"c{k}" for k in range(concepts)]
    members = {f"g{g}": names[g * concepts // groups : (g + 1) * concepts // groups] for g in range(groups)}
    model = CBMModule(Identity(64), concepts=ConceptSet(names, members), num_classes=classes).eval()
    engine = InterventionEngine(model, Units.make(model.concept_set))
    study = InterventionStudy(engine, Person(model.concept_set), [Policy.make("ucp")], num_classes=classes)
    blocks = []
    with torch.inference_mode():
        for rows in torch.arange(samples).split(study.block_size):
            batch = {
                "embedding": torch.randn(len(rows), 64),
                "concepts": (torch.rand(len(rows), concepts) < 0.4).float(),
                "label": torch.randint(classes, (len(rows),)),
            }
            blocks.append(study.encode(model(batch), batch, rows))
    return model, blocks


def planner(policy: str, size: dict[str, int]) -> Turn:
    """Decides the whole order of every sample: concepts for ECTP, groups for adaptive CooP."""
    model, blocks = drawn_samples(**size)
    unit = "group" if policy == "coop" else "concept"
    engine = InterventionEngine(model, Units.make(model.concept_set, unit))
    made = Policy.make(policy)

    @torch.inference_mode()
    def turn() -> None:
        engine.plan(blocks, made)

    return turn


def cub_alone(policy: str, repeats: int) -> dict[str, Any]:
    """Seconds of each turn, and the peak memory of this process before and after, in MB."""
    turn = planner(policy, CUB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = take_turns({policy: turn}, repeats)[policy]
    return {"seconds": seconds, "before": before, "after": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def cub(repeats: int) -> None:
    """Each policy in a process of its own."""
    print(f"\nplans at the size of the CUB test split, {CUB}")
    for policy in ("ectp", "coop"):
        command = [sys.executable, __file__, "--alone", policy, "--repeats", str(repeats)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        memory = f"peak memory {found['after']:.0f} MB, of which {found['before']:.0f} MB before planning"
        print(f"{policy:34}{spread(found['seconds'], 2):>30} s, {memory}")


# ---------------------------------------------------------------- 3. growth


def growth(repeats: int, figure: Path | None) -> None:
    """Double one size at a time."""
    middle = {"samples": 2048, "concepts": 64, "classes": 128}
    print(f"\nECTP as one size grows, the others at {middle}")
    measured: dict[str, dict[int, float]] = {}
    for name, value in middle.items():
        sizes = [value // 2, value, 2 * value, 4 * value]
        turns = {str(size): planner("ectp", {**middle, name: size, "groups": 1}) for size in sizes}
        seconds = take_turns(turns, repeats)
        measured[name] = {size: statistics.median(seconds[str(size)]) for size in sizes}
        print(f"{name:34}" + "  ".join(f"{size}: {spread(seconds[str(size)], 3)} s" for size in sizes))
        logs = ([math.log(x) for x in side] for side in (measured[name].keys(), measured[name].values()))
        power = statistics.linear_regression(*logs)
        print(f"{'':34}grows with the power {power.slope:.2f} (1 is linear)")
    if figure:
        draw_growth(measured, figure)


def draw_growth(measured: dict[str, dict[int, float]], path: Path) -> None:
    """A panel a size, with the line through the largest measurement and the origin."""
    from matplotlib.figure import Figure

    sheet = Figure(figsize=(9, 2.8), dpi=130, facecolor="white", layout="constrained")
    panels = sheet.subplots(1, len(measured), sharey=True)
    for axes, (name, seconds) in zip(panels, measured.items(), strict=True):
        largest = max(seconds)
        axes.plot([0, largest], [0, seconds[largest]], ":", color="#808080", label="linear")
        axes.plot(list(seconds), list(seconds.values()), "o", color="#0072B2", label="measured")
        axes.set_xlabel(f"number of {name}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylim(0, 1.1 * max(max(seconds.values()) for seconds in measured.values()))
    panels[0].set_ylabel("seconds to plan with ECTP")
    panels[0].legend(frameon=False)
    sheet.savefig(path)


# ---------------------------------------------------------------- measuring


def take_turns(contenders: dict[str, Turn], repeats: int) -> dict[str, list[float]]:
    """Seconds of each turn, after one that is not counted; the order rotates."""
    for turn in contenders.values():
        turn()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def spread(values: list[float], digits: int) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
