"""What concept maps cost: exact ones beside a forward pass, Grad-CAM beside a loop over concepts with captum.

    OMP_NUM_THREADS=2 python benchmarks/saliency.py

mobilenetv2_100 with random weights, a linear bottleneck, 64 noise images of 160x160 pixels in one batch. Contenders
take turns and ratios are taken within a turn, in wall time and in processor time, which other processes disturb less.

1. Exact maps of all concepts, in their own resolution, beside a plain forward pass of the whole model.
2. Grad-CAM of all concepts in one call beside captum's ``LayerGradCam`` of the same layer, a call a concept. Captum is
   timed on a part of the concepts and its time scaled up; on those the maps are compared as well.
3. How both grow with the number of concepts.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.backbones import TimmBackbone
from cbm_lightning.saliency import concept_maps

BACKBONE, PIXELS = "mobilenetv2_100", 160
# the last map before pooling, which captum has to be told
LAYER = "bn2"
Turn = Callable[[], Any]
Clock = tuple[float, float]
"""Wall time and processor time of this process, in seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender")
    parser.add_argument("--captum_repeats", type=int, default=3, help="turns beside captum, which takes long")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--concepts", type=int, default=112)
    parser.add_argument("--captum_concepts", type=int, default=16, help="how many of them captum is timed on")
    parser.add_argument("--growth", type=int, nargs="*", default=[32, 112, 512], help="numbers of concepts to compare")
    options = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    image = torch.randn(options.images, 3, PIXELS, PIXELS)
    print(
        f"{BACKBONE}, {options.images} images of {PIXELS}x{PIXELS} pixels, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, {options.repeats} turns; medians, quartiles in brackets"
    )
    exact(make_model(options.concepts), image, options)
    grad_cam(make_model(options.concepts), image, options)
    growth(image, options)


def make_model(concepts: int) -> CBMModule:
    return CBMModule(TimmBackbone(BACKBONE, img_size=PIXELS), concepts=concepts, num_classes=10).eval()


@torch.inference_mode()
def forward(model: CBMModule, image: Tensor) -> None:
    """A plain prediction."""
    model(image)


# ---------------------------------------------------------------- 1. exact maps


def exact(model: CBMModule, image: Tensor, options: argparse.Namespace) -> None:
    """Maps that the model holds anyway."""
    contenders: dict[str, Turn] = {
        "a plain forward pass": lambda: forward(model, image),
        "exact maps": lambda: concept_maps(model, image, "exact", resolution="method"),
        "exact maps, brought to the size of the image": lambda: concept_maps(model, image, "exact"),
    }
    print(f"\nexact maps of {options.concepts} concepts")
    report(take_turns(contenders, options.repeats), "a plain forward pass")


# ---------------------------------------------------------------- 2. Grad-CAM


def grad_cam(model: CBMModule, image: Tensor, options: argparse.Namespace) -> None:
    """All concepts at once, and one after the other."""
    some = torch.linspace(0, options.concepts - 1, options.captum_concepts).long().tolist()
    scale = options.concepts / len(some)
    contenders: dict[str, Turn] = {
        "Grad-CAM": lambda: concept_maps(model, image, "grad_cam", resolution="method"),
        "captum": lambda: by_captum(model, image, some),
        "a plain forward pass": lambda: forward(model, image),
    }
    print(f"\nGrad-CAM of {options.concepts} concepts, captum timed on {len(some)} of them and scaled by {scale:g}")
    clocks = take_turns(contenders, options.captum_repeats)
    clocks["captum"] = [(scale * wall, scale * processor) for wall, processor in clocks["captum"]]
    report(clocks, "Grad-CAM")
    ours, theirs = concept_maps(model, image, "grad_cam", some, resolution="method"), by_captum(model, image, some)
    gap, largest = (ours - theirs).abs().max(), theirs.abs().max()
    print(
        f"largest difference of the maps of those {len(some)}: {gap:.1e}, or {gap / largest:.1e} of the largest value"
    )


def by_captum(model: CBMModule, image: Tensor, concepts: list[int]) -> Tensor:
    """``[B, k, h, w]``, a call a concept."""
    from captum.attr import LayerGradCam

    def logits(pixels: Tensor) -> Tensor:
        return model.bottleneck(model.encode({"image": pixels})).logits

    explainer = LayerGradCam(logits, getattr(model.backbone.model, LAYER))
    return torch.cat([explainer.attribute(image, target=k).detach() for k in concepts], 1)


# ---------------------------------------------------------------- 3. growth


def growth(image: Tensor, options: argparse.Namespace) -> None:
    """More concepts, the same images."""
    for concepts in options.growth:
        model = make_model(concepts)
        contenders: dict[str, Turn] = {
            "a plain forward pass": lambda model=model: forward(model, image),
            "exact maps": lambda model=model: concept_maps(model, image, "exact", resolution="method"),
            "Grad-CAM": lambda model=model: concept_maps(model, image, "grad_cam", resolution="method"),
        }
        print(f"\n{concepts} concepts")
        report(take_turns(contenders, options.repeats), "a plain forward pass")


# ---------------------------------------------------------------- measuring


def take_turns(contenders: dict[str, Turn], repeats: int) -> dict[str, list[Clock]]:
    """Times of each turn, after one that is not counted; the order rotates."""
    for turn in contenders.values():
        turn()
    names = list(contenders)
    clocks: dict[str, list[Clock]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            wall, processor = time.perf_counter(), time.process_time()
            contenders[name]()
            clocks[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return clocks


def report(clocks: dict[str, list[Clock]], reference: str) -> None:
    """Seconds of each contender, and its ratio to one of them."""
    print(f"{'':46}{'wall s':>24}{'divided by ' + reference:>34}{'processor s':>26}{'divided by ' + reference:>34}")
    for name, values in clocks.items():
        line = f"{name:46}"
        for i, widths in enumerate(((24, 34), (26, 34))):
            ratio = [value[i] / own[i] for value, own in zip(values, clocks[reference], strict=True)]
            line += f"{spread([value[i] for value in values], 2):>{widths[0]}}{spread(ratio, 3):>{widths[1]}}"
        print(line)


def spread(values: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


if __name__ == "__main__":
    main()
