"""What an epoch costs on cached features, and what it costs when the frozen backbone encodes every batch again.

A linear bottleneck on a frozen timm ResNet-18, trained on RenderedBirds in a Lightning Trainer. With and without
`CachedFeatures` take turns, each trains one epoch a turn, and the ratio is taken within a turn. Encoding, which happens
once, is timed apart.

    OMP_NUM_THREADS=2 python benchmarks/cached_features.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from cbm_lightning import CBMModule, LinearBottleneck
from cbm_lightning.backbones import TimmBackbone
from cbm_lightning.data import CachedFeatures, RenderedBirds

BACKBONE = "resnet18"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="epochs with and without the cache")
    parser.add_argument("--images", type=int, default=8000)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        images = birds(arguments.images)
        cached = CachedFeatures(birds(arguments.images), cache_dir=folder)
        model = CBMModule(TimmBackbone(BACKBONE, img_size=64, frozen=True), LinearBottleneck(), data=images)
        print(
            f"frozen {BACKBONE}, {arguments.images} images of 64x64 pixels, batch {images.batch_size}; "
            f"torch {torch.__version__} with {torch.get_num_threads()} threads; {arguments.repeats} epochs each\n"
        )
        _, until_training = epoch(model, cached)
        print(f"drawing the birds and encoding them once: {until_training:.1f} s")
        slow, fast = zip(
            *((epoch(model, images)[0], epoch(model, cached)[0]) for _ in range(arguments.repeats)), strict=True
        )
    print(f"an epoch with the backbone:     {spread(slow)} s")
    print(f"an epoch on cached features:    {spread(fast)} s")
    print(f"times faster:                   {spread([a / b for a, b in zip(slow, fast, strict=True)])}")


def birds(images: int) -> RenderedBirds:
    return RenderedBirds(num_train=images, num_val=1, num_test=1)


def epoch(model: CBMModule, data: LightningDataModule) -> tuple[float, float]:
    """Seconds that one training epoch takes, and seconds until it begins."""
    clock: dict[str, float] = {}
    watch = LambdaCallback(
        on_train_epoch_start=lambda *_: clock.update(start=time.perf_counter()),
        on_train_epoch_end=lambda *_: clock.update(end=time.perf_counter()),
    )
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    begin = time.perf_counter()
    trainer.fit(model, data)
    return clock["end"] - clock["start"], clock["start"] - begin


def spread(values: Any) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
