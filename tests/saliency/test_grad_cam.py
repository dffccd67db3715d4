"""Grad-CAM of all concepts in one pass: the values of one concept at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from saliency.models import (
    MAPPED,
    TinyViT,
    clip_model,
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
from tiny_clip import RESNET, VIT
from torch import Tensor
from torch.testing import assert_close

from cbm_lightning import CBMModule, EmbeddingBottleneck
from cbm_lightning.backbones.module import ModuleBackbone
from cbm_lightning.saliency import GradCAM, concept_maps

FROZEN: dict[str, Callable[[bool], CBMModule]] = {
    "user": lambda frozen: model_of(ModuleBackbone(smooth_net(), (3, 32, 32), frozen=frozen)),
    "timm cnn": lambda frozen: timm_model("test_resnet", frozen=frozen),
    "timm vit": lambda frozen: timm_model("test_vit", frozen=frozen),
    "clip vit": lambda frozen: clip_model(VIT, frozen=frozen),
    "clip resnet": lambda frozen: clip_model(RESNET, frozen=frozen),
}


def grad_cam(model: CBMModule, image: Tensor) -> Tensor:
    return concept_maps(model, image, "grad_cam", resolution="method")


@pytest.mark.parametrize("kind", ["user map", "user vector", "timm cnn", "timm cnn, stage", "clip resnet"])
@pytest.mark.parametrize("clip", [False, True])
def test_convolutional_networks_as_by_captum(kind: str, clip: bool) -> None:
    from captum.attr import LayerGradCam

    model = MAPPED[kind][0]()
    image = images_for(model, 3)
    _, place = place_of(model)
    explainer = LayerGradCam(lambda x: model(x).concepts.logits, place.module)
    maps = concept_maps(model, image, GradCAM(clip), resolution="method")
    for k in range(3):
        expected = explainer.attribute(image, target=k, relu_attributions=clip)
        assert_close(maps[:, k], expected[:, 0], rtol=0, atol=1e-4)
    assert maps.std() > 1e-4


@pytest.mark.parametrize("kind", [kind for kind in MAPPED if "vit" in kind or "swin" in kind])
def test_transformers_as_by_hand(kind: str) -> None:
    """The mean slope over patches times the patches, without what comes before them."""
    make, name, (grid, channels_last, prefix) = MAPPED[kind]
    model = make()
    image = images_for(model, 3)
    caught: list[Tensor] = []
    hook = model.backbone.get_submodule(name).register_forward_hook(lambda module, args, out: caught.append(out))
    logits = model(image).concepts.logits
    hook.remove()
    (tokens,) = caught
    maps = grad_cam(model, image)
    assert maps.shape == (3, 3, *grid)
    for k in range(3):
        (slope,) = torch.autograd.grad(logits[:, k].sum(), tokens, retain_graph=True)
        if channels_last:
            expected = torch.einsum("bhwd,bd->bhw", tokens, slope.mean((1, 2)))
        else:
            patches = torch.einsum("bnd,bd->bn", tokens[:, prefix:], slope[:, prefix:].mean(1))
            expected = patches.unflatten(1, grid)
        assert_close(maps[:, k], expected.detach(), rtol=0, atol=1e-4)
    assert maps.std() > 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: model_of(conv_net()),
        lambda: timm_model("test_resnet", output_stride=8),
        lambda: timm_model("test_vit", pool="token_mean"),
        lambda: clip_model(VIT, pool="token_mean"),
    ],
    ids=["user", "cnn", "vit", "clip"],
)
def test_after_an_average_it_is_the_exact_map_divided_by_the_cells(make: Callable[[], CBMModule]) -> None:
    model = make()
    image = images_for(model)
    exact = concept_maps(model, image, "exact", resolution="method")
    assert_close(grad_cam(model, image), exact / exact[0, 0].numel(), rtol=1e-4, atol=1e-6)


def test_concepts_that_are_not_linear_in_the_features() -> None:
    from captum.attr import LayerGradCam

    model = model_of(conv_net(), EmbeddingBottleneck(3))
    explainer = LayerGradCam(lambda x: model(x).concepts.logits, model.backbone.module)
    for k in range(3):
        expected = explainer.attribute(images(), target=k)[:, 0]
        assert_close(grad_cam(model, images())[:, k], expected, rtol=0, atol=1e-4)


def test_clipping() -> None:
    model = model_of(smooth_net())
    maps = grad_cam(model, images())
    assert (maps < 0).any()
    clipped = concept_maps(model, images(), GradCAM(relu=True), resolution="method")
    assert torch.equal(clipped, maps.clamp(min=0))


def test_one_pass_serves_all_concepts() -> None:
    model = model_of(conv_net())
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    concept_maps(model, images(7), "grad_cam")
    # one image shows where the map is
    assert calls == [1, 7]


# ---------------------------------------------------------------- frozen and compiled backbones


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_backbones_have_the_same_maps(kind: str) -> None:
    trained, frozen = (FROZEN[kind](frozen) for frozen in (False, True))
    frozen.load_state_dict(trained.state_dict())
    image = images_for(trained)
    assert_close(grad_cam(frozen, image), grad_cam(trained, image))
    assert not any(parameter.requires_grad for parameter in frozen.backbone.parameters())
    assert all(parameter.grad is None for parameter in frozen.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_frozen_backbones_have_a_graph_for_inputs_alone(grad: bool) -> None:
    """So that pixels can be explained, while training keeps nothing of the pass."""
    model = timm_model("test_resnet", frozen=True)
    image = images_for(model)
    assert not model.backbone(image).pooled.requires_grad
    with torch.set_grad_enabled(grad):
        assert model.backbone(image.requires_grad_()).pooled.requires_grad is grad
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["user vector", "user vit", "clip vit"])
def test_compiled_backbones_have_the_same_maps(kind: str) -> None:
    model = MAPPED[kind][0]()
    image = images_for(model)
    expected = grad_cam(model, image)
    model.backbone.compile(backend="eager")
    before = scores_of(model, image)
    assert_close(grad_cam(model, image), expected)
    assert_close(scores_of(model, image), before)
    assert not has_hooks(model)


def test_a_backbone_that_was_replaced_by_its_compiled_self() -> None:
    model = model_of(TinyViT("class"))
    expected = grad_cam(model, images())
    model.backbone = torch.compile(model.backbone, backend="eager")
    scores_of(model, images())
    assert_close(grad_cam(model, images()), expected)


def test_checkpointed_activations() -> None:
    model = timm_model("test_vit")
    image = images_for(model)
    expected = grad_cam(model, image)
    model.backbone.model.set_grad_checkpointing()
    assert_close(grad_cam(model, image), expected)
