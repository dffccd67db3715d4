"""Where a backbone is last a map: found for every family, whatever its modules are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from saliency.models import (
    MAPPED,
    TinyViT,
    Vector,
    conv_net,
    has_hooks,
    images,
    images_for,
    model_of,
    place_of,
    scores_of,
    smooth_net,
    timm_model,
)
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, relu
from torch.testing import assert_close

from cbm_lightning.saliency import GradCAM, concept_maps
from cbm_lightning.saliency.last_map import find_map, graph_from
from cbm_lightning.saliency.subject import Subject
from cbm_lightning.types import Features


@pytest.mark.parametrize("kind", MAPPED)
def test_the_place_and_how_its_output_is_laid_out(kind: str) -> None:
    make, expected, layout = MAPPED[kind]
    model = make()
    name, place = place_of(model)
    assert (name, place.grid, place.channels_last, place.prefix, place.call) == (expected, *layout, 0)
    assert not has_hooks(model)


@pytest.mark.parametrize("kind", MAPPED)
def test_cells_are_in_raster_order(kind: str) -> None:
    """The output at the place, cell by cell, is changed most where the image is changed."""
    model = MAPPED[kind][0]()
    _, place = place_of(model)
    plain = images_for(model, 1)
    (h, w), side = place.grid, plain.shape[-1]
    changed = plain.clone()
    changed[:, :, : side // h, -side // w :] += 3 * torch.randn(3, side // h, side // w)
    caught: list[Tensor] = []
    hook = place.module.register_forward_hook(lambda module, args, output: caught.append(place.cells(output)))
    for image in (plain, changed):
        scores_of(model, image)
    hook.remove()
    change = (caught[1] - caught[0]).norm(dim=-1).reshape(h, w)
    assert change[:2, -2:].max() == change.max() > 0


# ---------------------------------------------------------------- modules of a user's own

VECTORS: dict[str, tuple[nn.Module, str, Any]] = {
    "averaged": (
        nn.Sequential(*conv_net(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "module.5", ((8, 8), False, None)
    ),
    "flattened": (nn.Sequential(*conv_net(), nn.Flatten(), nn.Linear(768, 5)), "module.5", ((8, 8), False, None)),
    "pooled to 2x2": (
        nn.Sequential(*conv_net(), nn.AvgPool2d(4), nn.Flatten()), "module.6", ((2, 2), False, None)
    ),
    "functional": (Vector(lambda m, x: relu(m.conv(m.stem(x))).amax((2, 3))), "module.conv", ((8, 8), False, None)),
    "tokens": (
        Vector(lambda m, x: gelu(m.norm(m.stem(x).flatten(2).transpose(1, 2))).mean(1)),
        "module.norm",
        ((8, 8), False, 0),
    ),
    "channels last": (
        Vector(lambda m, x: m.norm(m.conv(m.stem(x)).permute(0, 2, 3, 1)).mean((1, 2))),
        "module.norm",
        ((8, 8), True, None),
    ),
    "not read": (
        # what the convolution makes is thrown away
        Vector(lambda m, x: m.stem(x).mean((2, 3)) + 0 * m.conv(m.stem(x)).mean((2, 3))),
        "module.stem",
        ((8, 8), False, None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", VECTORS)
def test_modules_that_return_a_vector(kind: str) -> None:
    module, expected, layout = VECTORS[kind]
    model = model_of(module)
    name, place = place_of(model)
    assert (name, place.grid, place.channels_last, place.prefix) == (expected, *layout)
    assert concept_maps(model, images(), "grad_cam", resolution="method").shape == (2, 3, *place.grid)


def test_a_map_that_is_pooled_to_one_cell() -> None:
    """The usual way to cut the classifier off a network of torchvision returns ``[B, D, 1, 1]``."""
    model = model_of(nn.Sequential(*conv_net(), nn.AdaptiveAvgPool2d(1)))
    assert model.backbone.dims.grid == (1, 1)
    name, place = place_of(model)
    assert (name, place.grid) == ("module.5", (8, 8))


@pytest.mark.parametrize(("size", "channels"), [(32, 8), (64, 16)])
def test_as_many_channels_as_rows_and_columns(size: int, channels: int) -> None:
    model = model_of(nn.Conv2d(3, channels, 4, stride=4), size=size)
    image = images(2, size)
    assert not find_map(Subject(model), image[:1]).channels_last
    maps = concept_maps(model, image, "grad_cam", resolution="method")
    exact = concept_maps(model, image, "exact", resolution="method")
    assert_close(maps, exact / (size // 4) ** 2, rtol=1e-4, atol=1e-6)


def test_as_many_channels_as_rows_and_columns_with_channels_last() -> None:
    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Features:
            cells = self.norm(self.stem(x).permute(0, 2, 3, 1)).flatten(1, 2)
            return Features(cells.mean(1), cells, grid=(8, 8))

    model = model_of(ChannelsLast())
    maps = concept_maps(model, images(), "grad_cam", resolution="method")
    exact = concept_maps(model, images(), "exact", resolution="method")
    assert_close(maps, exact / 64, rtol=1e-4, atol=1e-6)


def test_a_module_that_is_called_twice() -> None:
    module = Vector(lambda m, x: torch.tanh(m.conv(torch.tanh(m.conv(torch.tanh(m.stem(x)))))).mean((2, 3)))
    model = model_of(module)
    name, place = place_of(model)
    assert (name, place.call) == ("module.conv", 1)
    maps = concept_maps(model, images(), "grad_cam", resolution="method")
    cells = module.conv(torch.tanh(module.conv(torch.tanh(module.stem(images())))))
    slopes = model.bottleneck.scores.weight[None, :, :, None, None] * (1 - cells.tanh().square())[:, None] / 64
    assert_close(maps, torch.einsum("bchw,bkc->bkhw", cells, slopes.mean((3, 4))).detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_activation_in_place_after_the_map(in_place: bool) -> None:
    module = Vector(lambda m, x: (torch.relu_ if in_place else torch.relu)(m.stem(x)).mean((2, 3)))
    model = model_of(module)
    assert place_of(model)[0] == "module.stem"
    maps = concept_maps(model, images(), "grad_cam", resolution="method")
    cells = module.stem(images())
    slopes = model.bottleneck.scores.weight[None] * (cells > 0).float().mean((2, 3))[:, None] / 64
    assert_close(maps, torch.einsum("bchw,bkc->bkhw", cells, slopes).detach(), rtol=1e-4, atol=1e-6)


def test_the_place_does_not_depend_on_what_the_first_image_shows() -> None:
    """On a black image every unit may be silent, and pass no slope on."""
    module = Vector(lambda m, x: relu(m.stem(x)).mean((2, 3)))
    nn.init.constant_(module.stem.bias, -0.1)
    model = model_of(module)
    image = images(3)
    image[0] = 0
    maps = concept_maps(model, image, "grad_cam", resolution="method")
    assert maps[0].abs().max() == 0
    assert_close(maps[1:], concept_maps(model, image[1:], "grad_cam", resolution="method"))


# ---------------------------------------------------------------- a layer by name


@pytest.mark.parametrize(
    ("kind", "layer", "grid"),
    [
        ("timm cnn", "model.layer4.0.conv1", (2, 2)),
        ("timm cnn", "model.layer3", (4, 4)),
        ("timm cnn", "model.layer1", (16, 16)),
        ("timm vit", "model.blocks.2", (4, 4)),
        ("timm vit", "model.patch_embed.proj", (4, 4)),
        ("clip resnet", "tower.visual.layer2", (8, 8)),
        ("user vector", "module.stem", (8, 8)),
        ("user vit, vector", "module.norms.0", (4, 4)),
    ],
)
def test_a_layer_by_name(kind: str, layer: str, grid: tuple[int, int]) -> None:
    model = MAPPED[kind][0]()
    name, place = place_of(model, layer)
    assert (name, place.grid) == (layer, grid)
    maps = concept_maps(model, images_for(model), GradCAM(layer=layer), resolution="method")
    assert maps.shape == (2, 3, *grid)
    assert maps.abs().max() > 0


def test_layers_that_cannot_be_used() -> None:
    model = timm_model("test_vit")
    for layer, message in {
        "model.block": r"layer: the backbone has no module 'model.block'; it has \['model', 'model.patch_embed",
        # of the normed tokens only the class token is read
        "model.norm": "layer 'model.norm' has no feature map on which the concept scores depend",
    }.items():
        with pytest.raises(ValueError, match=message):
            concept_maps(model, images_for(model), GradCAM(layer=layer))
    assert not has_hooks(model)


# ---------------------------------------------------------------- no map, and what is left behind


def test_backbones_without_any_map() -> None:
    model = model_of(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 9), nn.ReLU(), nn.Linear(9, 5)))
    for method in ("grad_cam", "auto"):
        with pytest.raises(ValueError, match="no feature map on which the concept scores depend.*gradient or occl"):
            concept_maps(model, images(), method)
    assert not has_hooks(model)


class Breaks(nn.Module):
    """Fails from a chosen call on."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.net, self.at, self.calls = conv_net(), at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        cells = self.net(x)
        if self.calls >= self.at:
            raise ArithmeticError("broken")
        return layer_norm(cells.mean((2, 3)), (12,))


@pytest.mark.parametrize("at", [2, 3], ids=["while searching", "while explaining"])
def test_nothing_is_left_behind_after_an_exception(at: int) -> None:
    model = model_of(Breaks(at))
    model.train()
    for grad in (True, False):
        model.backbone.module.calls = 1
        with torch.set_grad_enabled(grad), pytest.raises(ArithmeticError):
            concept_maps(model, images(), "grad_cam")
        with torch.set_grad_enabled(grad):
            assert torch.is_grad_enabled() is grad
    assert torch.is_grad_enabled()
    assert not has_hooks(model)
    assert all(module.training for module in model.modules())


def test_only_what_follows_the_map_has_a_graph() -> None:
    module = Vector(lambda m, x: torch.tanh(m.conv(m.stem(x))).mean((2, 3)))
    model = model_of(module)
    _, place = place_of(model)
    outputs: dict[str, Tensor] = {}
    for name in ("stem", "conv"):
        getattr(module, name).register_forward_hook(lambda m, args, output, name=name: outputs.update({name: output}))
    subject = Subject(model)
    with graph_from(place) as found:
        features = subject.features(images())
    assert not outputs["stem"].requires_grad
    assert len(found) == 1
    assert found[0].is_leaf
    assert features.pooled.requires_grad
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_tokens_that_are_shown_or_not_have_the_same_maps(pool: str) -> None:
    shown = model_of(TinyViT(pool))
    hidden = model_of(TinyViT(pool, shows_tokens=False))
    hidden.load_state_dict(shown.state_dict())
    maps = [concept_maps(model, images(), "grad_cam", resolution="method") for model in (shown, hidden)]
    assert_close(maps[0], maps[1])


def test_a_backbone_that_takes_another_way_than_before_says_so() -> None:
    class Alternates(nn.Module):
        """Takes another way in each pass."""

        def __init__(self) -> None:
            super().__init__()
            self.ways, self.calls = nn.ModuleList(smooth_net() for _ in range(2)), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.ways[self.calls % 2](x)

    with pytest.raises(RuntimeError, match="ran another way than before"):
        concept_maps(model_of(Alternates()), images(), "grad_cam")
