"""Do concept maps find objects in real street scenes? CamVid, and models that were told of presence alone.

    OMP_NUM_THREADS=2 python benchmarks/camvid.py --shared ../shared --figure benchmarks/camvid_saliency.png

A frozen mobilenetv2_100 (ImageNet weights) encodes each image once, and a bottleneck learns which of 11 objects it
shows; no mask is used in training. The masks of validation frames then say whether the maps lie on the objects. Those
of the file are seven seconds of a drive whose other minutes are trained on; ``--held_out 0006R0`` validates on a drive
of which nothing is.

There is no label to predict: the head is not trained, and the drive stands in for a label.

Whole frames hardly ever lack an object, and a map cannot be held against what the data never separates: the
co-occurrence check says which objects that concerns. So models train on tiles, squares of random size and place, of
which many lack each object; one that trains on whole frames is measured beside them. Maps are always those of whole
validation frames. What covers less than half a percent of an image counts as not annotated.

1. Models: the maps of all pairs of a validation frame and an object that it shows. The tokens are those of stage 3 (96
   channels, a cell every 16 pixels) or of the last stage, dilated to the same grid. Beside the chance level of each
   metric stand two references that know nothing of the frame: the exact map of another one, and the mean of the
   object's masks in training.
2. Methods, on the pairs of a few frames, other ones for each seed. For a linear bottleneck on averaged tokens Grad-CAM
   is the exact map, up to a factor.
3. Objects: exact maps of all pairs.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from camvid_parts import (
    STRIDE,
    Example,
    OfAnotherImage,
    OnGrid,
    Remembered,
    Scenes,
    TrainingMask,
    draw_maps,
    read_scenes,
)
from lightning.pytorch import Trainer, seed_everything
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from cbm_lightning import CBMModule, EmbeddingBottleneck, LinearBottleneck, Phase
from cbm_lightning.backbones import Backbone, TimmBackbone
from cbm_lightning.bottlenecks import Bottleneck
from cbm_lightning.data.base import TensorDataset
from cbm_lightning.saliency import (
    ExactMaps,
    GradCAM,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    SaliencyResult,
    SaliencyStudy,
    SmoothGrad,
    concept_maps,
    cooccurrence,
)

WEIGHTS = "data/weights_mobilenetv2/mobilenetv2_100_in1k_tf2ptq_fp16.safetensors"
STAGES: dict[str, dict[str, Any]] = {
    "stage 3": {"stage": 3, "pool": "token_mean"},
    "last stage": {"output_stride": STRIDE},
}
BOTTLENECKS: dict[str, Callable[[], Bottleneck]] = {"linear": LinearBottleneck, "embedding": EmbeddingBottleneck}
# what a model is trained on, its tokens, its bottleneck; learning rate and epochs are those of the lowest loss on a
# part of the training images (--choose)
TRAINING = {
    ("tiles", "stage 3", "linear"): (1e-3, 40),
    ("frames", "stage 3", "linear"): (1e-2, 20),
    ("tiles", "last stage", "linear"): (1e-3, 10),
    ("tiles", "stage 3", "embedding"): (1e-3, 5),
}
MAIN = ("tiles", "stage 3", "linear")
RATES, EPOCHS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (5, 10, 20, 40)
METRICS = {
    "pointing_game": "pointing game",
    "energy_in_mask": "energy in mask",
    "pixel_auroc": "pixel AUROC",
    "iou_at_half_max": "IoU at half max",
}
NOTE = """Each object once, with the probability that the model gives.
Line: the mask of the object, which no training used.
Bright: evidence for the object.

The model was told which objects a training tile shows, nothing else."""
Recipe = tuple[str, str, str]


# ---------------------------------------------------------------- training


class Encoded(NamedTuple):
    """Scenes and their pooled features ``[N, D]``."""

    scenes: Scenes
    features: Tensor

    def of(self, rows: Tensor) -> Encoded:
        """Some of the images."""
        return Encoded(self.scenes.of(rows), self.features[rows])


def make_backbone(shared: Path, stage: str) -> TimmBackbone:
    """Frozen: BatchNorm of these weights is folded."""
    return TimmBackbone(
        "mobilenetv2_100",
        checkpoint_path=str(shared / WEIGHTS),
        frozen=True,
        img_size=128,
        mean=[0.5] * 3,
        std=[0.5] * 3,
        model_args={"pad_type": "same"},
        **STAGES[stage],
    )


def normalised(backbone: Backbone, image: Tensor) -> Tensor:
    stats = backbone.image_stats()
    assert stats is not None
    mean, std = (torch.tensor(value)[:, None, None] for value in stats)
    return (image.float() / 255 - mean) / std


@torch.inference_mode()
def encode(backbone: Backbone, scenes: Scenes) -> Encoded:
    pooled = [backbone(normalised(backbone, some)).pooled for some in scenes.image.split(32)]
    return Encoded(scenes, torch.cat(pooled).clone())


def train(
    backbone: Backbone, data: Encoded, names: list[str], bottleneck: str, seed: int, setting: tuple[float, int]
) -> CBMModule:
    """Concepts only, on presence only."""
    lr, epochs = setting
    seed_everything(seed, verbose=False)
    model = CBMModule(
        backbone,
        BOTTLENECKS[bottleneck](),
        concepts=names,
        num_classes=int(data.scenes.drive.max()) + 1,
        phases=[Phase("concepts", train=["bottleneck"], loss_weights={"label": 0.0})],
        lr=lr,
    )
    rows = {"embedding": data.features, "concepts": data.scenes.concepts, "label": data.scenes.drive}
    order = torch.Generator().manual_seed(seed)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(rows), 64, shuffle=True, generator=order, collate_fn=TensorDataset.collate)
    trainer.fit(model, loader)
    return model.eval()


@torch.inference_mode()
def scores(model: CBMModule, features: Tensor) -> Tensor:
    """``[N, K]`` concept logits."""
    return model({"embedding": features}).concepts.logits


def choose(backbone: Backbone, data: Encoded, names: list[str], recipe: Recipe) -> None:
    """Compare settings by the loss on the last fifth of each training drive."""
    held_out = torch.zeros_like(data.scenes.val)
    for drive in data.scenes.drive.unique():
        rows = (data.scenes.drive == drive).nonzero()[:, 0]
        held_out[rows[int(0.8 * len(rows)) :]] = True
    fit, held = data.of(~held_out), data.of(held_out)
    truth = held.scenes.concepts
    known = ~truth.isnan()
    losses = {}
    for setting in itertools.product(RATES, EPOCHS):
        logits = scores(train(backbone, fit, names, recipe[2], 0, setting), held.features)
        losses[setting] = float(binary_cross_entropy_with_logits(logits[known], truth[known]))
    told = ", ".join(f"lr {lr:g} {epochs} epochs {loss:.4f}" for (lr, epochs), loss in losses.items())
    print(f"{recipe}: the lowest loss is that of {min(losses, key=losses.__getitem__)}; {told}")


# ---------------------------------------------------------------- methods


def make_methods(options: argparse.Namespace) -> dict[str, SaliencyMethod]:
    """By what the table calls them."""
    slopes = Remembered(IntegratedGradients(n_steps=options.steps))
    return {
        "`exact`": ExactMaps(),
        "`grad_cam`": GradCAM(),
        "`integrated_gradients`": slopes,
        "the same, averaged over cells": OnGrid(slopes),
        "`input_x_gradient`": InputXGradient(),
        "`gradient`": Gradient(),
        "`smooth_grad`": SmoothGrad(samples=options.samples),
        "`occlusion`": Occlusion(window=40, stride=20),
    }


# ---------------------------------------------------------------- measuring


def measure(model: CBMModule, frames: Scenes, method: SaliencyMethod) -> SaliencyResult:
    """The metrics of all pairs, frames in random order."""
    study = SaliencyStudy(model, method)
    order = torch.randperm(len(frames.val), generator=torch.Generator().manual_seed(0))
    for rows in order.split(16):
        some = frames.of(rows)
        masks = some.masks() & (some.concepts == 1)[:, :, None, None]
        study.update({"image": normalised(model.backbone, some.image), "concept_masks": masks})
    return study.compute()


def presence_auroc(model: CBMModule, tiles: Encoded) -> Tensor:
    """``[K]``, how well presence is predicted."""
    found = []
    for score, truth in zip(scores(model, tiles.features).T, tiles.scenes.concepts.T, strict=True):
        known = ~truth.isnan()
        found.append(float(roc_auc_score(truth[known], score[known])))
    return torch.tensor(found)


class Found(NamedTuple):
    """Results, a seed after the other.

    Attributes:
        models: Of all pairs, by recipe and map.
        presence: ``[K]`` AUROCs of presence in tiles, by recipe.
        methods: Of the pairs in drawn frames, by method.
        first: The model of the main recipe and the first seed.
    """

    models: dict[tuple[Recipe, str], list[SaliencyResult]]
    presence: dict[Recipe, list[Tensor]]
    methods: dict[str, list[SaliencyResult]]
    first: list[CBMModule]


def study(
    data: dict[tuple[str, str], Encoded], backbones: dict[str, Backbone], names: list[str], options: Any
) -> Found:
    """Train and measure everything."""
    found = Found({}, {}, {}, [])
    frames = data["frames", "stage 3"].scenes
    unseen = frames.of(frames.val)
    references = {
        "`exact`, of another frame": OfAnotherImage(ExactMaps()),
        "mean mask in training": TrainingMask(frames.of(~frames.val).mean_masks()),
    }
    drawn = torch.randperm(len(unseen.val), generator=torch.Generator().manual_seed(0))
    for seed in range(options.seeds):
        few = unseen.of(drawn[seed * options.frames : (seed + 1) * options.frames])
        for recipe, setting in TRAINING.items():
            images, stage, bottleneck = recipe
            seen, tiles = data[images, stage], data["tiles", stage]
            model = train(backbones[stage], seen.of(~seen.scenes.val), names, bottleneck, seed, setting)
            found.presence.setdefault(recipe, []).append(presence_auroc(model, tiles.of(tiles.scenes.val)))
            maps: dict[str, SaliencyMethod] = (
                {"`exact`": ExactMaps()} if bottleneck == "linear" else {"`grad_cam`": GradCAM()}
            )
            for name, method in (maps | (references if recipe == MAIN else {})).items():
                found.models.setdefault((recipe, name), []).append(measure(model, unseen, method))
            if recipe == MAIN:
                found.first.append(model)
                for name, method in make_methods(options).items():
                    found.methods.setdefault(name, []).append(measure(model, few, method))
    return found


# ---------------------------------------------------------------- telling


def report(found: Found, tiles: Scenes, names: list[str]) -> None:
    """The three tables."""
    everything, heads = torch.arange(len(names)), " | ".join(METRICS.values())
    lines = " --- |" * len(METRICS)
    print(f"\nModels: all pairs, chance in brackets\n\n| trained on | tokens | bottleneck | map | presence | {heads} |")
    print(f"| --- | --- | --- | --- | --- |{lines}")
    for (recipe, name), results in found.models.items():
        presence = several([float(auroc.mean()) for auroc in found.presence[recipe]])
        print(f"| {' | '.join(recipe)} | {name} | {presence} | {cells(results, everything)} |")
    print(f"\nMethods: drawn frames\n\n| method | {heads} |\n| --- |{lines}")
    for name, results in found.methods.items():
        print(f"| {name} | {cells(results, everything)} |")
    print(f"\nObjects: exact maps of all pairs\n\n| object | tiles without it | presence | pairs | {heads} |")
    print(f"| --- | --- | --- | --- |{lines}")
    absent = (tiles.concepts[~tiles.val] == 0).float().mean(0)
    results = found.models[MAIN, "`exact`"]
    for k, name in enumerate(names):
        presence = several([float(auroc[k]) for auroc in found.presence[MAIN]])
        pairs = int(results[0].counts["pixel_auroc"][k])
        print(f"| {name} | {100 * absent[k]:.0f} % | {presence} | {pairs} | {cells(results, everything[[k]])} |")


def cells(results: list[SaliencyResult], objects: Tensor) -> str:
    """Each metric as a mean over objects, and its chance level."""
    found = []
    for metric in METRICS:
        values = [float(result.per_concept[metric][objects].nanmean()) for result in results]
        chance = [float(result.chance_per_concept[metric][objects].nanmean()) for result in results]
        found.append(f"{several(values)} ({statistics.fmean(chance):.2f})")
    return " | ".join(found)


def several(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):.2f} ± {statistics.pstdev(values):.2f}"


def draw(model: CBMModule, frames: Scenes, names: list[str], steps: int) -> Any:
    """Every object once, in frames that lie evenly among those which show it."""
    unseen = frames.of(frames.val)
    examples = []
    for k, name in enumerate(names):
        shown = (unseen.concepts[:, k] == 1).nonzero()[:, 0]
        row = shown[int((k + 0.5) / len(names) * len(shown))]
        image = normalised(model.backbone, unseen.image[row][None])
        probability = float(model(image).concepts.probs[0, k])
        maps = [concept_maps(model, image, method, [k])[0, 0] for method in (ExactMaps(), IntegratedGradients(steps))]
        title = f"{name}, {100 * probability:.0f} %"
        examples.append(Example(unseen.image[row], unseen.objects[row] == k, title, maps))
    return draw_maps(examples, ["exact map = Grad-CAM", "integrated gradients"], NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/camvid")
    parser.add_argument("--held_out", default="file", choices=["file", "0006R0", "0001TP"], help="drive to validate on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--frames", type=int, default=4, help="validation frames a seed on which methods are compared")
    parser.add_argument("--steps", type=int, default=16, help="of integrated gradients")
    parser.add_argument("--samples", type=int, default=10, help="of SmoothGrad")
    parser.add_argument("--least", type=float, default=0.005, help="share of an image from which an object is present")
    parser.add_argument("--choose", action="store_true", help="compare learning rates and epochs on training images")
    parser.add_argument("--figure", type=Path, help="where to draw the maps")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    start = time.perf_counter()
    frames, tiles, names = read_scenes(options.shared / "data" / "camvid", options.least, options.held_out)
    backbones: dict[str, Backbone] = {stage: make_backbone(options.shared, stage) for stage in STAGES}
    scenes = {"frames": frames, "tiles": tiles}
    data = {recipe[:2]: encode(backbones[recipe[1]], scenes[recipe[0]]) for recipe in TRAINING if recipe[2] == "linear"}
    print(f"{len(tiles.val)} tiles and {len(frames.val)} frames, {time.perf_counter() - start:.0f} s to encode")
    for images, some in scenes.items():
        for sentence in cooccurrence(some.concepts[~some.val], names).sentences():
            print(f"training {images}: {sentence}")
    if options.choose:
        for recipe in TRAINING:
            seen = data[recipe[:2]]
            choose(backbones[recipe[1]], seen.of(~seen.scenes.val), names, recipe)
        return
    found = study(data, backbones, names, options)
    report(found, tiles, names)
    if options.figure:
        draw(found.first[0], frames, names, options.steps).savefig(options.figure)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
