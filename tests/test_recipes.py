"""Every shipped recipe runs, through the command line, on small data."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cub_tree import write_miniature_cub_tree
from PIL import Image

from cbm_lightning.callbacks import ConceptSaliency
from cbm_lightning.cli import main
from cbm_lightning.data import RenderedBirds
from cbm_lightning.saliency import cooccurrence

SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1"]
SHORT += ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
TINY = [
    "--model.backbone.name=test_resnet.r160_in1k",
    "--model.backbone.pretrained=false",
    "--model.backbone.img_size=64",
]
SHIPPED = {
    path.name.removesuffix(".yaml"): yaml.safe_load(path.read_text())
    for path in files("cbm_lightning.recipes").iterdir()
    if path.name.endswith(".yaml")
}
# a system has a model; a fragment adds something to any of them
RECIPES = sorted(name for name, content in SHIPPED.items() if "class_path" in content.get("model", {}))
FRAGMENTS = sorted(SHIPPED.keys() - set(RECIPES))
# these read the towers that `tiny_clip` writes
WITH_TINY_CLIP = ["concept_matrix_search", "sparse_cbm"]
# what has nothing to train is only ever tested
TRAINED = [name for name in RECIPES if name != "concept_matrix_search"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cbm"])


def small_data(recipe: str, folder: Path) -> list[str]:
    """Write what a recipe reads, and return the flags that differ from the recipe."""
    if recipe.startswith("cub_"):
        write_miniature_cub_tree(folder / "cub")
        return [f"--data.root={folder / 'cub'}", "--data.batch_size=4", "--data.min_classes=1", *TINY]
    if recipe in ("clip_similarity", "sparse_similarity"):
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
    small = ["--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"]
    if recipe in WITH_TINY_CLIP:
        main(["fit", "--config", "tiny_clip", *small, "--trainer.max_epochs=1", *SHORT])
    return small


def test_fragments_are_told_from_systems() -> None:
    assert FRAGMENTS == ["cub", "intervene", "leakage", "saliency"]
    assert "quickstart" in RECIPES


@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
@pytest.mark.parametrize("recipe", TRAINED)
def test_recipe_trains_and_tests(recipe: str, tmp_path: Path) -> None:
    phases = SHIPPED[recipe]["model"]["init_args"].get("phases", "joint")
    epochs = max(2, sum(phase.get("epochs", 1) for phase in phases) if isinstance(phases, list) else 0)
    flags = [*small_data(recipe, tmp_path), f"--trainer.max_epochs={epochs}", *SHORT]
    cli = main(["fit", "--config", recipe, *flags])
    metrics = cli.trainer.callback_metrics
    assert cli.trainer.current_epoch == epochs
    assert 0.0 <= metrics["test/label_acc"] <= 1.0
    assert torch.isfinite(metrics["test/loss"])
    folder = Path(cli.trainer.log_dir)
    assert (folder / "config.yaml").is_file()
    assert (folder / "metrics.csv").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file() or list((folder / "checkpoints").glob("*.ckpt"))


# bottlenecks on drawn birds, of whose concepts no callback names one; `cub` puts photographs in the birds' place
BIRDS = [
    name
    for name in RECIPES
    if SHIPPED[name]["data"]["class_path"] == "RenderedBirds"
    and SHIPPED[name]["model"]["class_path"] == "CBMModule"
    and name not in ("locality", *WITH_TINY_CLIP)
]


@pytest.mark.filterwarnings("ignore:.*annotated .or visible. in none of")
@pytest.mark.parametrize("recipe", BIRDS)
def test_one_override_moves_a_recipe_to_cub(recipe: str, tmp_path: Path) -> None:
    flags = [*small_data("cub_joint", tmp_path), *SHORT]
    cli = main(["fit", "--config", recipe, "--config", "cub", *flags, "--trainer.fast_dev_run=true"])
    assert type(cli.datamodule).__name__ == "CUB200"
    assert len(cli.model.concept_set) == len(cli.datamodule.concept_set) or cli.model.bottleneck.discovers


@pytest.mark.filterwarnings("ignore:the vocabulary of .* words lacks")
@pytest.mark.parametrize("recipe", WITH_TINY_CLIP)
def test_texts_move_to_cub_with_their_towers(recipe: str, tmp_path: Path) -> None:
    small_data(recipe, tmp_path)
    flags = [flag for flag in small_data("cub_joint", tmp_path) if flag.startswith("--data.")]
    kind = "fit" if recipe in TRAINED else "test"
    cli = main([kind, "--config", recipe, "--data=CUB200", *flags, "--trainer.fast_dev_run=true", *SHORT[3:]])
    assert type(cli.datamodule).__name__ == "CUB200"


def test_concept_matrices_classify_without_training(tmp_path: Path) -> None:
    data = small_data("concept_matrix_search", tmp_path)
    cli = main(["test", "--config", "concept_matrix_search", *data, *SHORT[3:]])
    assert 0.0 <= cli.trainer.callback_metrics["test/label_acc"] <= 1.0
    assert list(cli.model.head.parameters()) == []
    with pytest.raises(ValueError, match="nothing to train.*test or predict instead"):
        main(["fit", "--config", "concept_matrix_search", *data, "--trainer.max_epochs=1", *SHORT])


@pytest.mark.parametrize("recipe", WITH_TINY_CLIP)
def test_missing_towers_are_named(recipe: str) -> None:
    with pytest.raises(FileNotFoundError, match="cbm fit --config tiny_clip"):
        main(["test", "--config", recipe, *SHORT[3:]])


@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_interventions_are_added_to_the_test_of_a_recipe(tmp_path: Path) -> None:
    data = small_data("quickstart", tmp_path)
    cli = main(["fit", "--config", "quickstart", *data, "--trainer.max_epochs=1", *SHORT])
    best = cli.trainer.checkpoint_callback.best_model_path
    assert not [name for name in cli.trainer.callback_metrics if "intervention" in name]
    test = ["test", "--config", "quickstart", "--config", "intervene", *data, *SHORT[3:]]
    found = main([*test, f"--ckpt_path={best}"]).trainer
    policies = SHIPPED["intervene"]["trainer"]["callbacks+"][0]["init_args"]["policies"]
    assert {f"test/intervention/{policy}/auc" for policy in policies} <= found.callback_metrics.keys()
    assert 0 <= found.callback_metrics["test/intervention/ucp/auc"] <= 1
    media = Path(found.log_dir) / "media" / "test" / "intervention"
    assert [path.suffix for path in sorted(media.iterdir())] == [".csv", ".png"]
    # the recipe's own callbacks are still there
    assert found.checkpoint_callback.monitor == "val/loss"
    units = {len(group) for group in found.lightning_module.concept_set.group_indices().values()}
    assert max(units) > 1


@pytest.mark.filterwarnings("ignore::cbm_lightning.interventions.leakage_check.LeakageWarning")
def test_weights_that_nobody_trained_are_warned_of(tmp_path: Path) -> None:
    test = ["test", "--config", "quickstart", "--config", "intervene", *small_data("quickstart", tmp_path), *SHORT[3:]]
    with pytest.warns(UserWarning, match="cbm test without --ckpt_path judges the weights that the model starts with"):
        main([*test, '--trainer.callbacks.policies=["ucp"]'])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_concept_maps_are_added_to_the_test_of_a_recipe(tmp_path: Path) -> None:
    data = [*small_data("quickstart", tmp_path), "--data.masks=true"]
    cli = main(["fit", "--config", "quickstart", *data, "--trainer.max_epochs=1", *SHORT])
    best = cli.trainer.checkpoint_callback.best_model_path
    assert not [name for name in cli.trainer.callback_metrics if "saliency" in name]
    test = ["test", "--config", "quickstart", "--config", "saliency", *data, *SHORT[3:], f"--ckpt_path={best}"]
    found = main(test).trainer
    metrics = found.callback_metrics
    assert 0 <= metrics["test/saliency/energy_in_mask"] <= 1
    # the 2x2 grid of the quickstart spreads whatever it knows of a part over a quarter of the image
    assert 0.005 < metrics["test/saliency/energy_in_mask_chance"] < 0.05
    media = Path(found.log_dir) / "media" / "test" / "saliency"
    assert {path.suffix for path in media.iterdir()} == {".csv", ".png"}
    assert found.checkpoint_callback.monitor == "val/loss"


def test_locality_comes_with_its_counterpart(tmp_path: Path) -> None:
    tied = RenderedBirds(**SHIPPED["locality"]["data"]["init_args"])
    concepts, labels = tied.annotations("train")
    names = tied.concept_set.names
    groups = [[names[k] for k in group] for group in cooccurrence(concepts, tied.concept_set, labels).groups]
    pairs = [["beak: hooked", "tail: forked"], ["beak: long", "tail: long"], ["beak: thick", "tail: fan"]]
    assert sorted(groups) == pairs

    data = [*small_data("locality", tmp_path), "--data.group_correlation=0"]
    trainer = main(["fit", "--config", "locality", *data, "--trainer.max_epochs=2", *SHORT]).trainer
    saliency = next(c for c in trainer.callbacks if isinstance(c, ConceptSaliency))
    assert saliency.co_occurrence.groups == []
    assert trainer.lightning_module.backbone.dims.grid == (16, 16)
    assert 0 <= trainer.callback_metrics["test/saliency/pointing_game"] <= 1
    assert [path.suffix for path in (Path(trainer.log_dir) / "media" / "test" / "saliency").glob("figure*")] == [".png"]
