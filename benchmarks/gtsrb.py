"""A small convolutional CBM from scratch on real traffic signs, split by physical sign, through `ConceptFolder`.

    python benchmarks/gtsrb.py --shared ../shared

Shows a user's own network and table: 43 classes, 49 concepts in 9 groups, 7,104 photographs of 888 signs at 32 pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones import ModuleBackbone
from cbm_lightning.data import ConceptFolder

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from gtsrb_folder import write_gtsrb_folder


def network() -> nn.Sequential:
    """Six convolutions, 0.29 million weights."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise((3, 32, 32, 64, 64, 128, 128))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
    return nn.Sequential(*layers, nn.Dropout2d(0.1), nn.Flatten())


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/gtsrb32")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_gtsrb_folder(Path(folder), options.shared / "data" / "gtsrb32")
        pl.seed_everything(options.seed)
        data = ConceptFolder(
            folder, "signs.csv", concepts="concepts.json", split_column="split", image_size=32, augment=True
        )
        model = CBMModule(
            ModuleBackbone(network(), input_size=(3, 32, 32)),
            LinearBottleneck("logits"),
            data=data,
            loss_weights={"concept": 5.0},
            lr=5e-3,
            lr_scheduler="OneCycleLR",
        )
        trainer = pl.Trainer(
            max_epochs=options.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        start = time.perf_counter()
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - start
        scores = trainer.test(model, datamodule=data, verbose=False)[0]
    print("\n| seed | label accuracy | concept accuracy | seconds of training |\n| --- | --- | --- | --- |")
    print(f"| {options.seed} | {scores['test/label_acc']:.3f} | {scores['test/concept_acc']:.3f} | {seconds:.0f} |")


if __name__ == "__main__":
    run()
