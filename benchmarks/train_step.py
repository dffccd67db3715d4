"""What a training step costs: CBMModule in a Lightning Trainer, a hand-written PyTorch loop, and PyC.

The same network everywhere (timm's ResNet-18, a linear layer to the concepts, one from their probabilities to the
classes), the same loss and optimizer, on the same drawn images. The contenders take turns, in an order that rotates,
and each ratio is taken within a turn, so that a slow moment of the machine does not favour one of them. A step is the
time from the end of one batch to the end of the next: loading, hooks, metrics and logging count.

    OMP_NUM_THREADS=2 python benchmarks/train_step.py
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones import TimmBackbone

CONCEPTS, CLASSES, PIXELS = 32, 10, 32
LR = 1e-3
# the first steps of a turn allocate memory and fill caches
WARM_UP = 2

Clock = tuple[float, float]
"""Wall time and processor time of this process, in seconds."""
Turn = Callable[[], list[Clock]]
"""Trains for one turn and returns the clock at the end of each batch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=12, help=f"steps a turn, beside {WARM_UP} to warm up")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--backbone", default="resnet18", help="timm model; a small one shows what the frameworks add")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)

    data = draw((arguments.steps + WARM_UP) * arguments.batch_size)
    loader = DataLoader(TensorDataset(*data), arguments.batch_size, shuffle=True)
    contenders: dict[str, Turn] = {
        "cbm_lightning": make_ours(arguments.backbone, loader),
        "plain PyTorch": make_plain(arguments.backbone, loader),
    }
    if importlib.util.find_spec("torch_concepts"):
        contenders["PyC"] = make_pyc(arguments.backbone, data, arguments.batch_size)
    else:
        print("PyC is left out, it is not installed: pip install 'cbm-lightning[bench]'")
    print(
        f"{arguments.backbone}, batch {arguments.batch_size}, {PIXELS}x{PIXELS} pixels, {CONCEPTS} concepts, "
        f"{CLASSES} classes; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{arguments.repeats} turns of {arguments.steps} steps each"
    )
    report(measure(contenders, arguments.repeats))


def draw(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise images, concepts and labels: what they mean costs no time."""
    generator = torch.Generator().manual_seed(0)
    concepts = (torch.rand(samples, CONCEPTS, generator=generator) < 0.4).float()
    images = torch.randn(samples, 3, PIXELS, PIXELS, generator=generator)
    return images, concepts, torch.randint(CLASSES, (samples,), generator=generator)


def clock() -> Clock:
    return time.perf_counter(), time.process_time()


def make_ours(backbone: str, loader: DataLoader[Any]) -> Turn:
    """CBMModule as a user makes it, metrics on."""
    model = CBMModule(
        TimmBackbone(backbone, img_size=PIXELS),
        LinearBottleneck("sigmoid"),
        concepts=CONCEPTS,
        num_classes=CLASSES,
        lr=LR,
    )
    return lambda: fit(model, loader, lightning.pytorch)


def fit(model: Any, batches: DataLoader[Any], framework: ModuleType) -> list[Clock]:
    """One epoch in a Trainer that does nothing beside training; of either of Lightning's twin packages."""
    ends: list[Clock] = []
    trainer = framework.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[framework.callbacks.LambdaCallback(on_train_batch_end=lambda *_: ends.append(clock()))],
    )
    trainer.fit(model, batches)
    return ends


def make_plain(backbone: str, loader: DataLoader[Any]) -> Turn:
    """The loop that one would write by hand: no framework, no metrics."""
    import timm

    encoder = timm.create_model(backbone, num_classes=0)
    bottleneck, head = nn.Linear(encoder.num_features, CONCEPTS), nn.Linear(CONCEPTS, CLASSES)
    model = nn.ModuleList([encoder, bottleneck, head]).train()

    def turn() -> list[Clock]:
        optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.0)
        ends = []
        for image, concepts, label in loader:
            optimizer.zero_grad()
            logits = bottleneck(encoder(image))
            loss = cross_entropy(head(logits.sigmoid()), label) + binary_cross_entropy_with_logits(logits, concepts)
            loss.backward()
            optimizer.step()
            ends.append(clock())
        return ends

    return turn


def make_pyc(backbone: str, data: tuple[Tensor, ...], batch_size: int) -> Turn:
    """PyC's ConceptBottleneckModel in its Lightning mode, with its own metrics, loss and data set."""
    import pytorch_lightning
    import timm
    from torch_concepts import Annotations
    from torch_concepts.data.base.dataset import ConceptDataset
    from torch_concepts.nn import ConceptBottleneckModel, ConceptLoss, ConceptMetrics
    from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

    image, concepts, label = data
    encoder = timm.create_model(backbone, num_classes=0)
    annotations = Annotations(
        labels=[*(f"c{k}" for k in range(CONCEPTS)), "y"],
        cardinalities=[1] * CONCEPTS + [CLASSES],
        types=["binary"] * CONCEPTS + ["categorical"],
    )
    dataset = ConceptDataset(image, torch.cat([concepts, label[:, None].float()], 1), annotations=annotations)
    model = ConceptBottleneckModel(
        input_size=(3, PIXELS, PIXELS),
        annotations=annotations,
        task_names=["y"],
        backbone=encoder,
        latent_size=encoder.num_features,
        lightning=True,
        loss=ConceptLoss(binary=nn.BCEWithLogitsLoss(), categorical=nn.CrossEntropyLoss()),
        metrics=ConceptMetrics(
            annotations,
            binary={"accuracy": BinaryAccuracy()},
            categorical={"accuracy": (MulticlassAccuracy, {"average": "micro"})},
            summary=True,
            per_concept=False,
        ),
        optim_class=torch.optim.AdamW,
        optim_kwargs={"lr": LR, "weight_decay": 0.0},
    )
    batches = DataLoader(dataset, batch_size, shuffle=True, collate_fn=dataset.collate)
    return lambda: fit(model, batches, pytorch_lightning)


def measure(contenders: dict[str, Turn], repeats: int) -> dict[str, list[Clock]]:
    """The median step of each turn, in wall and processor time."""
    for turn in contenders.values():
        turn()
    names = list(contenders)
    medians: dict[str, list[Clock]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            ends = torch.tensor(contenders[name](), dtype=torch.float64)[WARM_UP - 1 :]
            wall, processor = ends.diff(dim=0).median(0).values.tolist()
            medians[name].append((wall, processor))
    return medians


def report(medians: dict[str, list[Clock]]) -> None:
    """Medians and quartiles over the turns, and ratios within turns."""
    print(f"\n{'':16}{'wall ms a step':>28}{'processor ms a step':>30}")
    for name, turns in medians.items():
        print(f"{name:16}" + "".join(f"{spread([1e3 * turn[i] for turn in turns], 1):>29}" for i in (0, 1)))
    print(f"\n{'cbm_lightning /':16}{'wall':>28}{'processor':>30}")
    ours = medians["cbm_lightning"]
    for name, turns in medians.items():
        if turns is not ours:
            ratios = ([a[i] / b[i] for a, b in zip(ours, turns, strict=True)] for i in (0, 1))
            print(f"{name:16}" + "".join(f"{spread(ratio, 3):>29}" for ratio in ratios))


def spread(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
