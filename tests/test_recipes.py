"""Every shipped recipe runs, through the command line, on small data."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from cub_tree import write_miniature_cub_tree
from PIL import Image

from cbm_lightning.cli import main

SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
SHORT += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
TINY = [
    "--model.backbone.name=test_resnet.r160_in1k",
    "--model.backbone.pretrained=false",
    "--model.backbone.img_size=64",
]
RECIPES = sorted(
    path.name.removesuffix(".yaml") for path in files("cbm_lightning.recipes").iterdir() if path.name.endswith(".yaml")
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])


def small_data(recipe: str, folder: Path) -> list[str]:
    """Write what a recipe reads, and return the flags that differ from the recipe."""
    if recipe.startswith("cub_"):
        write_miniature_cub_tree(folder / "cub")
        return [f"--data.root={folder / 'cub'}", "--data.batch_size=4", "--data.min_classes=1", *TINY]
    if recipe == "clip_similarity":
        rows = torch.randn(40, 16).numpy()
        np.savez(folder / "clip.npz", embedding=rows, label=np.arange(40) % 2, text_embeddings=rows[:5])
        return [f"--data.path={folder / 'clip.npz'}", "--data.batch_size=8"]
    if recipe == "my_images":
        lines = ["image,label,colour: red,round"]
        for i in range(30):
            pixels = np.full((40, 40, 3), 8 * i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
            lines.append(f"{i}.png,{'apple' if i % 3 else 'stone'},{i % 2},{int(i % 3 > 0)}")
        (folder / "table.csv").write_text("\n".join(lines))
        return [f"--data.root={folder}", "--data.batch_size=8", *TINY]
    return ["--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_trains_and_tests(recipe: str, tmp_path: Path) -> None:
    cli = main(["fit", "--config", recipe, *small_data(recipe, tmp_path), "--trainer.max_epochs=2", *SHORT])
    metrics = cli.trainer.callback_metrics
    assert cli.trainer.current_epoch == 2
    assert 0.0 <= metrics["test/label_acc"] <= 1.0
    assert torch.isfinite(metrics["test/loss"])
    folder = Path(cli.trainer.log_dir)
    assert (folder / "config.yaml").is_file()
    assert (folder / "metrics.csv").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file() or list((folder / "checkpoints").glob("*.ckpt"))
