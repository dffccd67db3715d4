"""Every method by its short name: shapes, repeatability, and images that do not mind their neighbours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from saliency.models import TinyViT, clip_model, conv_net, has_hooks, images, images_for, model_of, timm_model
from tiny_clip import RESNET, VIT
from torch import Tensor, nn
from torch.testing import assert_close

from cbm_lightning import CBMModule, ConceptSet
from cbm_lightning.bottlenecks import SimilarityBottleneck
from cbm_lightning.saliency import (
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    SmoothGrad,
    concept_maps,
)
from cbm_lightning.saliency.subject import Subject

NAMES = sorted(name for name, kind in SaliencyMethod.registry.items() if kind.__module__.startswith("cbm_lightning."))
# with options that keep the tests quick
QUICK: dict[str, Callable[[], SaliencyMethod]] = {
    "integrated_gradients": lambda: IntegratedGradients(4),
    "smooth_grad": lambda: SmoothGrad(samples=2),
    "occlusion": lambda: Occlusion(16),
}
ANY_BACKBONE = ["grad_cam", "auto", "gradient", "input_x_gradient", "integrated_gradients", "smooth_grad", "occlusion"]


def quick(name: str) -> SaliencyMethod:
    return QUICK[name]() if name in QUICK else SaliencyMethod.make(name)


def test_there_are_these_methods() -> None:
    assert set(NAMES) == {*ANY_BACKBONE, "exact", "activation_mapping", "attention_rollout"}
    assert [name for name in NAMES if not SaliencyMethod.registry[name].concept_specific] == ["attention_rollout"]


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_repeatability(name: str) -> None:
    model = model_of(TinyViT("mean"))
    maps = concept_maps(model, images(3), quick(name))
    assert maps.shape == (3, 3, 32, 32)
    assert maps.dtype == torch.float32
    assert maps.isfinite().all()
    assert maps.flatten(2).std(2).min() > 0
    assert not maps.requires_grad
    assert torch.equal(concept_maps(model, images(3), quick(name)), maps)
    coarse = concept_maps(model, images(3), quick(name), resolution="method")
    sides = (32, 32) if name in ANY_BACKBONE[2:] else (4, 4)
    assert coarse.shape == (3, 3, *sides)
    assert not has_hooks(model)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backbone", [conv_net, TinyViT], ids=["cnn", "vit"])
def test_an_image_has_the_map_that_it_has_alone(backbone: Callable[[], nn.Module], name: str) -> None:
    """All but SmoothGrad, which draws the noise of a batch at once."""
    if name == "smooth_grad" or (name == "attention_rollout" and backbone is conv_net):
        return
    model = model_of(backbone())
    together = concept_maps(model, images(4), quick(name))
    for b in range(4):
        assert_close(concept_maps(model, images(4)[b : b + 1], quick(name))[0], together[b], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_one_concept_and_one_image(name: str) -> None:
    model = model_of(TinyViT("mean"), concepts=("red",))
    assert concept_maps(model, images(1), quick(name)).shape == (1, 1, 32, 32)
    assert concept_maps(model, images(1), quick(name)).abs().max() > 0


@pytest.mark.parametrize("name", ANY_BACKBONE)
@pytest.mark.parametrize(
    "make",
    [
        lambda: timm_model("test_resnet", img_size=32),
        lambda: timm_model("test_vit", img_size=32),
        lambda: clip_model(VIT),
        lambda: clip_model(RESNET),
        lambda: model_of(conv_net()),
        lambda: model_of(TinyViT("class", shows_tokens=False)),
    ],
    ids=["timm cnn", "timm vit", "clip vit", "clip resnet", "user map", "user vector"],
)
def test_methods_that_work_with_any_backbone(make: Callable[[], CBMModule], name: str) -> None:
    model = make()
    image = images_for(model)
    maps = concept_maps(model, image, quick(name))
    assert maps.shape == (2, 3, *image.shape[2:])
    assert maps.isfinite().all()
    assert maps.abs().amax((2, 3)).min() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "attention_rollout"])
def test_half_precision(name: str) -> None:
    """A model in bfloat16 has float maps, near those of its double in single precision."""
    single, half = model_of(conv_net()), model_of(conv_net())
    half.load_state_dict(single.state_dict())
    half.to(torch.bfloat16)
    # little noise, for it is drawn in another precision
    method = SmoothGrad(samples=2, std=1e-3) if name == "smooth_grad" else quick(name)
    image = images().bfloat16()
    maps, expected = concept_maps(half, image, method), concept_maps(single, image.float(), method)
    assert maps.dtype == torch.float32
    assert torch.corrcoef(torch.stack([maps.flatten(), expected.flatten()]))[0, 1] > 0.99


# ---------------------------------------------------------------- concept activation mapping


def test_activation_mapping_is_the_similarity_of_each_token_with_the_text() -> None:
    texts = torch.randn(3, 16)
    concepts = ConceptSet(["red", "round", "wet"], embeddings=texts)
    model = clip_model(VIT, tokens="projected")
    model = model_of(model.backbone, SimilarityBottleneck(standardize=False, scale=10.0), concepts)
    maps = concept_maps(model, images(), "activation_mapping", resolution="method")
    tokens = model.backbone(images()).tokens
    for b, k, row, column in [(0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)]:
        similarity = torch.cosine_similarity(tokens[b, 4 * row + column], texts[k], dim=0)
        assert_close(maps[b, k, row, column], 10 * similarity, rtol=1e-4, atol=1e-5)


def test_activation_mapping_of_a_linear_bottleneck_is_the_exact_map_and_the_bias() -> None:
    model = model_of(conv_net())
    maps = concept_maps(model, images(), "activation_mapping", resolution="method")
    exact = concept_maps(model, images(), "exact", resolution="method")
    assert_close(maps, exact + model.bottleneck.scores.bias.detach()[:, None, None], rtol=1e-4, atol=1e-5)


def test_activation_mapping_says_what_it_needs() -> None:
    without = model_of(TinyViT(shows_tokens=False))
    with pytest.raises(ValueError, match="activation_mapping needs patch tokens on a grid.*grad_cam"):
        concept_maps(without, images(), "activation_mapping")
    wider = clip_model(VIT)
    with pytest.raises(ValueError, match="tokens as wide as the pooled vector, got 32 and 16.*projected.*grad_cam"):
        concept_maps(wider, images(), "activation_mapping")


# ---------------------------------------------------------------- methods of one's own


def test_a_method_of_ones_own_has_a_name_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SaliencyMethod, "registry", dict(SaliencyMethod.registry))

    class Centre(SaliencyMethod):
        """The middle of each image, as large as the score."""

        name = "centre"

        def attribute(self, subject: Subject, image: Tensor, rows: Tensor, concepts: Tensor) -> Tensor:
            maps = image.new_zeros(len(rows), 2, 2)
            maps[:, 0, 0] = subject.logits(image)[rows, concepts]
            return maps

    model = model_of(conv_net())
    maps = concept_maps(model, images(), "centre", concepts=["wet", "red"], resolution="method")
    with torch.no_grad():
        assert_close(maps[:, :, 0, 0], model(images()).concepts.logits[:, [2, 0]])
    assert concept_maps(model, images(), Centre()).shape == (2, 3, 32, 32)


def test_unknown_methods() -> None:
    model = model_of(conv_net())
    with pytest.raises(ValueError, match="method: nothing is called 'gradcam'; did you mean 'grad_cam'"):
        concept_maps(model, images(), "gradcam")
    with pytest.raises(TypeError, match=r"method: expected short names .* or instances of SaliencyMethod, got 3"):
        concept_maps(model, images(), 3)
