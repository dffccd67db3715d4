"""Concept maps wherever they are asked for, and the class maps that they make up."""

from __future__ import annotations

import copy
import random
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from saliency.models import NAMES, TinyViT, conv_net, has_hooks, images, model_of, scores_of
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.testing import assert_close

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.saliency import (
    ExactMaps,
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    SmoothGrad,
    class_maps,
    concept_maps,
)
from cbm_lightning.saliency.maps import attribute, differentiable
from cbm_lightning.saliency.subject import Subject

METHODS: dict[str, SaliencyMethod] = {
    **{name: SaliencyMethod.make(name) for name in ("exact", "activation_mapping", "grad_cam", "auto", "gradient")},
    "attention_rollout": SaliencyMethod.make("attention_rollout"),
    "integrated_gradients": IntegratedGradients(3),
    "smooth_grad": SmoothGrad(samples=2),
    "occlusion": Occlusion(16),
}
SURROUNDINGS: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


@pytest.fixture
def model() -> CBMModule:
    return model_of(conv_net())


# ---------------------------------------------------------------- wherever it is called


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_inside_evaluation(around: str, name: str) -> None:
    """Images and positions that were made in inference mode enter graphs as well."""
    model = model_of(TinyViT())
    expected = concept_maps(model, images(), METHODS[name])
    block: AbstractContextManager[None] = SURROUNDINGS[around]()
    with block:
        image = images()
        assert image.is_inference() is (around == "inference_mode")
        maps = concept_maps(model, image, METHODS[name], NAMES)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() is (around == "inference_mode")
    assert torch.equal(maps, expected)
    assert not maps.requires_grad


@pytest.mark.parametrize("name", [name for name in METHODS if name != "attention_rollout"])
def test_in_training_mode_nothing_is_changed(model: CBMModule, name: str) -> None:
    """Neither modes, statistics, gradients nor random states, and dropout sleeps."""
    expected = concept_maps(model, images(), METHODS[name])
    model.train()
    model.backbone.module[1].eval()
    model.bottleneck.eval()
    for parameter in model.backbone.module[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 (the global state is what is looked at)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002

    assert torch.equal(concept_maps(model, images(), METHODS[name]), expected)

    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]  # noqa: NPY002
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad
        if key.startswith("backbone.module.0."):
            assert (parameter.grad == 1).all()
        else:
            assert parameter.grad is None
    assert not has_hooks(model)


def test_images_that_want_gradients_get_none(model: CBMModule) -> None:
    image = images().requires_grad_()
    for method in METHODS.values():
        if method.name != "attention_rollout":
            assert not concept_maps(model, image, method).requires_grad
    assert image.grad is None
    assert torch.equal(image.detach(), images())


def test_a_backbone_that_works_in_place_on_its_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 8, stride=8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mul_(2.0))

    model = model_of(InPlace())
    image = images()
    expected = concept_maps(model, image, "exact")
    assert torch.equal(image, images())
    with torch.inference_mode():
        assert torch.equal(concept_maps(model, images(), "exact"), expected)


def test_the_surroundings_come_back_after_an_exception(model: CBMModule) -> None:
    def fail() -> None:
        with differentiable(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            assert not any(module.training for module in model.modules())
            raise ArithmeticError

    model.train()
    with torch.inference_mode():
        with pytest.raises(ArithmeticError):
            fail()
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert all(module.training for module in model.modules())


def test_models_that_are_no_modules(model: CBMModule) -> None:
    """Whatever has the four members, `bottleneck.concept_maps` not among them."""

    class Localised:
        concept_set, backbone = ConceptSet(NAMES), model.backbone

        def encode(self, batch: dict[str, Tensor]) -> Any:
            return self.backbone(batch["image"])

        def bottleneck(self, features: Any) -> Any:
            return model.bottleneck(features)

    assert torch.equal(concept_maps(Localised(), images()), concept_maps(model, images(), "grad_cam"))
    with pytest.raises(TypeError, match=r"Linear has no \['concept_set', 'backbone', 'bottleneck', 'encode'\].*CBMM"):
        concept_maps(nn.Linear(2, 2), images())


# ---------------------------------------------------------------- concepts and resolutions


def test_concepts_by_name_and_position(model: CBMModule) -> None:
    maps = concept_maps(model, images())
    for chosen, positions in {("wet", 0): [2, 0], (1,): [1], ("red", "red"): [0, 0], tuple(NAMES): [0, 1, 2]}.items():
        assert torch.equal(concept_maps(model, images(), concepts=chosen), maps[:, positions])


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (["roud"], r"no concept is called 'roud'; did you mean \['round'"),
        (["red", "rounded"], r"no concept is called 'rounded'; did you mean \['round'"),
        ([0, 3], r"concepts: expected names, or positions below 3, got \[3\]"),
        ([-1], r"concepts: expected names, or positions below 3, got \[-1\]"),
    ],
)
def test_concepts_that_do_not_exist(model: CBMModule, concepts: list[str | int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concept_maps(model, images(), concepts=concepts)


def test_resolutions(model: CBMModule) -> None:
    coarse = concept_maps(model, images(), resolution="method")
    assert coarse.shape == (2, 3, 8, 8)
    fine = concept_maps(model, images())
    assert_close(fine, interpolate(coarse, (32, 32), mode="bilinear", align_corners=False))
    wide = concept_maps(model, torch.randn(1, 3, 32, 48))
    assert wide.shape == (1, 3, 32, 48)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(3, 32, 32), r"got \[3, 32, 32\] of torch.float32"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"got \[2, 3, 32, 32\] of torch.uint8"),
        (torch.zeros(2, 12), r"got \[2, 12\] of torch.float32"),
        ({"image": torch.zeros(2, 3, 32, 32)}, "got dict"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_batch_of_images(model: CBMModule, image: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match=r"image: expected one float image \[B, C, H, W\] or more, as the model reads them, " + message
    ):
        concept_maps(model, image)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "attention_rollout"])
def test_chosen_pairs(model: CBMModule, name: str) -> None:
    """In any order, some twice and some not at all."""
    if name == "smooth_grad":
        return  # draws anew for each pair
    maps = concept_maps(model, images(3), METHODS[name], resolution="method")
    rows, concepts = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([1, 2, 0, 1, 0])
    pairs = attribute(Subject(model), images(3), METHODS[name], rows, concepts)
    assert pairs.shape == (5, *maps.shape[2:])
    assert_close(pairs, maps[rows, concepts], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- class maps


def exact(model: CBMModule) -> tuple[Tensor, Tensor, Tensor]:
    """Exact maps, the weight of the head, and the biases of concepts and classes in the class logits ``[L]``."""
    weight = model.head.concept_weight()[..., 0].detach()
    biases = weight @ model.bottleneck.scores.bias.detach() + model.head.linear.bias.detach()
    return concept_maps(model, images(), ExactMaps(), resolution="method"), weight, biases


def test_the_mean_of_a_class_map_and_the_biases_are_the_class_logit(model: CBMModule) -> None:
    maps, weight, biases = exact(model)
    with torch.no_grad():
        logits = model(images()).logits
    for chosen in ([0, 0], [1, 0], [1, 1]):
        classes = torch.tensor(chosen)
        made = class_maps(maps, weight, classes)
        assert made.shape == (2, 8, 8)
        assert_close(made.mean((1, 2)) + biases[classes], logits[torch.arange(2), classes], rtol=1e-5, atol=1e-5)


def test_class_maps_of_the_concepts_that_weigh_most(model: CBMModule) -> None:
    maps, _, _ = exact(model)
    weight, classes = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.1, 0.3]]), torch.tensor([0, 1])
    made = class_maps(maps, weight, classes, top_k=1)
    assert_close(made, torch.stack([-2 * maps[0, 1], 0.3 * maps[1, 2]]))
    values = torch.tensor([[9.0, 0.1, 1.0], [5.0, 1.0, -1.0]])
    made = class_maps(maps, weight, classes, values, top_k=1)
    assert_close(made, torch.stack([0.5 * maps[0, 0], 0.3 * maps[1, 2]]))
    made = class_maps(maps, weight, classes, values, top_k=2)
    assert_close(made, torch.stack([0.5 * maps[0, 0] + maps[0, 2], 0.1 * maps[1, 1] + 0.3 * maps[1, 2]]))
    for given in (None, values):
        assert_close(class_maps(maps, weight, classes, given, top_k=3), class_maps(maps, weight, classes))


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_numbers_of_concepts_out_of_range(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k: expected 1 to 3 concepts, got {top_k}"):
        class_maps(torch.rand(2, 3, 4, 4), torch.rand(2, 3), torch.tensor([0, 1]), top_k=top_k)


@pytest.mark.parametrize(
    ("maps", "weight", "classes"), [((2, 3, 4), (2, 3), 2), ((2, 3, 4, 4), (2, 4), 2), ((2, 3, 4, 4), (2, 3), 3)]
)
def test_class_maps_of_other_shapes(maps: tuple[int, ...], weight: tuple[int, ...], classes: int) -> None:
    with pytest.raises(ValueError, match=r"maps, weight, classes: expected \[B, K, h, w\], \[L, K\] and \[B\], got"):
        class_maps(torch.rand(maps), torch.rand(weight), torch.zeros(classes, dtype=torch.int64))


def test_scores_are_what_is_explained_not_probabilities() -> None:
    """A saturated sigmoid passes no gradient; its score does."""
    model = model_of(conv_net())
    with torch.no_grad():
        model.bottleneck.scores.bias.fill_(60.0)
    assert (scores_of(model, images()).sigmoid() == 1).all()
    for name in ("gradient", "grad_cam", "occlusion"):
        assert concept_maps(model, images(), METHODS[name]).abs().amax((2, 3)).min() > 1e-5
