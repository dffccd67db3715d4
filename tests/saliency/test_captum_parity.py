"""Numbers of captum on the network of the fixture, through the whole path of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_models import load
from saliency.models import model_of
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.testing import assert_close

from cbm_lightning import CBMModule
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.saliency import (
    GradCAM,
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    concept_maps,
    upsample,
)
from cbm_lightning.saliency.methods.pixels import PixelAttribution

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


class Network(nn.Module):
    """The network of the fixture before its linear layer, with the average over cells in it or left to the backbone."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.c1 = nn.Conv2d(3, 6, 3, padding=1)
        self.c2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        cells = relu(self.c2(relu(self.c1(x))))
        return cells.mean((2, 3)) if self.pooled else cells


@pytest.fixture
def official(shared: Path) -> dict[str, Tensor]:
    return load(shared, "captum_concept_saliency")


def network(official: dict[str, Tensor], pooled: bool = False) -> CBMModule:
    weights = {k.removeprefix("param__"): v for k, v in official.items() if k.startswith("param__")}
    model = model_of(Network(pooled), concepts=4, size=12)
    model.bottleneck.scores.load_state_dict({k[3:]: v for k, v in weights.items() if k.startswith("fc.")})
    model.backbone.module.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")})
    return model


def of_targets(official: dict[str, Tensor], maps: Tensor) -> Tensor:
    """``[B, h, w]`` of ``[B, K, h, w]``, the concept that the fixture explains of each image."""
    return maps[torch.arange(len(maps)), official["targets"]]


def channels_of(kind: type[PixelAttribution]) -> list[type[PixelAttribution]]:
    """The method three times, each with one channel for its map."""

    def of(channel: int) -> type[PixelAttribution]:
        class OneChannel(kind):  # type: ignore[misc, valid-type]
            def reduce(self, attribution: Tensor) -> Tensor:
                return attribution[:, channel]

        return OneChannel

    return [of(channel) for channel in range(3)]


@pytest.mark.parametrize("pooled", [False, True])
def test_concept_scores(official: dict[str, Tensor], pooled: bool) -> None:
    with torch.no_grad():
        logits = network(official, pooled)(official["images"]).concepts.logits
    assert_close(logits, official["concept_logits"], **TOLERANCE)


def test_gradient(official: dict[str, Tensor]) -> None:
    model, slopes = network(official), official["saliency_abs"]
    for channels, expected in (("max_abs", slopes.amax(1)), ("abs_sum", slopes.sum(1))):
        maps = concept_maps(model, official["images"], Gradient(channels))
        assert_close(of_targets(official, maps), expected, **TOLERANCE)
    for channel, method in enumerate(channels_of(Gradient)):
        maps = concept_maps(model, official["images"], method())
        assert_close(of_targets(official, maps).abs(), slopes[:, channel], **TOLERANCE)
        signed = official["saliency_signed_all_concepts_image0"][:, channel]
        assert_close(maps[0], signed, **TOLERANCE)
        assert (signed < 0).any()


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        (InputXGradient, {}, "input_x_gradient"),
        (IntegratedGradients, {"n_steps": 50}, "ig_zero_baseline_50steps_gausslegendre"),
        (IntegratedGradients, {"n_steps": 32, "quadrature": "riemann_trapezoid"}, "ig_riemann_trapezoid_32steps"),
    ],
)
def test_attributions_with_signs(
    official: dict[str, Tensor], kind: type[PixelAttribution], options: dict[str, object], name: str
) -> None:
    model, expected = network(official), official[name]
    maps = concept_maps(model, official["images"], kind(**options))
    assert_close(of_targets(official, maps), expected.sum(1), **TOLERANCE)
    for channel, method in enumerate(channels_of(kind)):
        maps = concept_maps(model, official["images"], method(**options))
        assert_close(of_targets(official, maps), expected[:, channel], **TOLERANCE)


def test_completeness_of_integrated_gradients(official: dict[str, Tensor]) -> None:
    model = network(official)
    maps = concept_maps(model, official["images"], "integrated_gradients")
    with torch.no_grad():
        rise = official["concept_logits"] - model(torch.zeros(1, 3, 12, 12)).concepts.logits
    error = of_targets(official, maps.sum((2, 3)) - rise)
    assert_close(error, official["ig_delta"], **TOLERANCE)


@pytest.mark.parametrize(
    ("pooled", "layer"), [(True, None), (True, "module.c2"), (False, "module.c2")], ids=["found", "named", "of a map"]
)
@pytest.mark.parametrize("clip", [False, True])
def test_grad_cam(official: dict[str, Tensor], pooled: bool, layer: str | None, clip: bool) -> None:
    """The second convolution before its ReLU, which is no module and therefore not to be found after it."""
    model = network(official, pooled)
    maps = concept_maps(model, official["images"], GradCAM(clip, layer), resolution="method")
    expected = official["gradcam_c2_relu" if clip else "gradcam_c2_raw"][:, 0]
    assert_close(of_targets(official, maps), expected, **TOLERANCE)


def test_upsampling(official: dict[str, Tensor]) -> None:
    model, images = network(official, pooled=True), official["images"]
    bilinear, bicubic = (official[f"gradcam_c2_{mode}_upsampled"][:, 0] for mode in ("bilinear", "bicubic"))
    assert_close(of_targets(official, concept_maps(model, images, "grad_cam")), bilinear, **TOLERANCE)
    maps = of_targets(official, concept_maps(model, images, "grad_cam", resolution="method"))
    assert_close(upsample(maps, (12, 12)), bilinear, **TOLERANCE)
    assert_close(upsample(maps, (12, 12), "bicubic"), bicubic, **TOLERANCE)


def test_occlusion(official: dict[str, Tensor]) -> None:
    maps = concept_maps(network(official), official["images"], Occlusion(window=3, stride=3))
    for channel in range(3):
        assert_close(of_targets(official, maps), official["occlusion_3x3_stride3"][:, channel], **TOLERANCE)


@pytest.mark.parametrize("name", ["gradient", "grad_cam", "integrated_gradients", "occlusion"])
def test_some_concepts_have_the_maps_that_they_have_among_all(official: dict[str, Tensor], name: str) -> None:
    model = network(official)
    maps = concept_maps(model, official["images"], SaliencyMethod.make(name))
    chosen = concept_maps(model, official["images"], SaliencyMethod.make(name), concepts=[2, 0])
    assert_close(chosen, maps[:, [2, 0]], **TOLERANCE)


def test_activation_mapping_is_that_of_the_formula(shared: Path) -> None:
    """Inner products of cells and concept vectors (CoAM, Aysel et al. 2025), which the formula divides by the width."""
    data = load(shared, "derived_formula_only")
    cells = data["features"].permute(0, 3, 1, 2)
    model = model_of(ModuleBackbone(nn.Identity(), (6, 4, 4)), concepts=9)
    with torch.no_grad():
        model.bottleneck.scores.weight.copy_(data["cav"])
        model.bottleneck.scores.bias.zero_()
    maps = concept_maps(model, cells, "activation_mapping") / 6
    assert_close(maps, data["coam"], **TOLERANCE)
    assert_close(upsample(maps, (16, 16)), data["coam_upsampled_bilinear"], **TOLERANCE)
