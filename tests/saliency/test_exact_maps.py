"""Exact maps: their mean and what has no place make up the concept score, or they are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from saliency.models import (
    TINY_SWIN,
    MaskedCells,
    TinyViT,
    clip_model,
    conv_net,
    images,
    images_for,
    model_of,
    scores_of,
    smooth_net,
    timm_model,
)
from tiny_clip import RESNET, VIT
from torch import Tensor, nn
from torch.testing import assert_close

from cbm_lightning import CBMModule, ConceptSet, EmbeddingBottleneck, LinearBottleneck
from cbm_lightning.bottlenecks import SimilarityBottleneck
from cbm_lightning.bottlenecks.scalar import ScalarBottleneck
from cbm_lightning.saliency import NoExactMaps, concept_maps
from cbm_lightning.types import ConceptOutput, FeatureDims, Features

MODELS: dict[str, tuple[Callable[[], CBMModule], tuple[int, int]]] = {
    "user map": (lambda: model_of(conv_net()), (8, 8)),
    "user vit": (lambda: model_of(TinyViT("mean")), (4, 4)),
    "cnn": (lambda: timm_model("test_resnet"), (2, 2)),
    "cnn, output stride": (lambda: timm_model("test_resnet", output_stride=8), (8, 8)),
    "cnn, stage": (lambda: timm_model("test_resnet", stage=1, pool="token_mean"), (16, 16)),
    "cnn, frozen": (lambda: timm_model("test_resnet", frozen=True), (2, 2)),
    "vit": (lambda: timm_model("test_vit", pool="token_mean"), (4, 4)),
    "vit, stage": (lambda: timm_model("test_vit", stage=1, pool="token_mean"), (4, 4)),
    "convnext": (lambda: timm_model("test_convnext", pool="token_mean"), (2, 2)),
    "swin": (lambda: timm_model("swin_tiny_patch4_window7_224", model_args=TINY_SWIN), (2, 2)),
    "clip vit": (lambda: clip_model(VIT, pool="token_mean"), (4, 4)),
    "clip vit, projected": (lambda: clip_model(VIT, pool="token_mean", tokens="projected"), (4, 4)),
    "clip resnet": (lambda: clip_model(RESNET, pool="token_mean"), (2, 2)),
    "free dimensions": (lambda: model_of(conv_net(), LinearBottleneck("relu", extra_dims=2)), (8, 8)),
    "gates": (lambda: model_of(conv_net(), LinearBottleneck("sigmoid", gates=True)), (8, 8)),
}


def exact(model: CBMModule, image: Tensor) -> Tensor:
    return concept_maps(model, image, "exact", resolution="method")


@pytest.mark.parametrize("kind", MODELS)
def test_the_mean_of_the_map_and_the_bias_are_the_score(kind: str) -> None:
    make, grid = MODELS[kind]
    model = make()
    image = images_for(model, 3)
    maps = exact(model, image)
    assert maps.shape == (3, 3, *grid)
    assert maps.flatten(2).std(2).min() > 1e-6
    assert_close(maps.mean((2, 3)) + model.bottleneck.scores.bias, scores_of(model, image), rtol=1e-5, atol=1e-5)


def test_what_a_cell_adds_is_its_tokens_part() -> None:
    """Another cell in the image changes its own number in the map and no other one."""
    model = model_of(nn.Conv2d(3, 5, 8, stride=8))
    image = images(1)
    changed = image.clone()
    changed[:, :, 16:24, 8:16] += 1
    change = (exact(model, changed) - exact(model, image)).abs().amax(1)[0]
    assert change[2, 1] > 1e-3
    change[2, 1] = 0
    assert change.max() == 0


def test_grids_of_images_that_are_not_square() -> None:
    model = timm_model("test_resnet")
    image = torch.randn(2, 3, 96, 160)
    maps = exact(model, image)
    assert maps.shape == (2, 3, 3, 5)
    assert_close(maps.mean((2, 3)) + model.bottleneck.scores.bias, scores_of(model, image), rtol=1e-5, atol=1e-5)


def test_it_costs_one_pass() -> None:
    model = model_of(conv_net())
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    exact(model, images(5))
    concept_maps(model, images(5))
    assert calls == [5, 5]


# ---------------------------------------------------------------- padding


def test_padding_has_no_saliency() -> None:
    model = model_of(MaskedCells())
    image = images(3)
    image[0, :, 8:, :] = 0
    image[1, :, :8, 16:] = 0
    maps = exact(model, image)
    assert maps[0, :, 1:].abs().max() == 0
    assert maps[1, :, 0, 2:].abs().max() == 0
    assert maps[0, :, 0].abs().min() > 0
    assert_close(maps.mean((2, 3)) + model.bottleneck.scores.bias, scores_of(model, image), rtol=1e-5, atol=1e-5)


def test_an_image_of_padding_alone() -> None:
    model = model_of(MaskedCells())
    image = images(2)
    image[1] = 0
    maps = exact(model, image)
    assert maps[1].abs().max() == 0
    assert_close(scores_of(model, image)[1], model.bottleneck.scores.bias.detach())


def test_averaged_tokens_have_the_pooled_mean() -> None:
    tokens, mask = torch.randn(2, 6, 4), torch.tensor([[True] * 6, [True, False, True, False, False, False]])
    pooled = torch.stack([tokens[0].mean(0), tokens[1, [0, 2]].mean(0)])
    averaged = Features(pooled, tokens, mask, (2, 3)).averaged_tokens()
    assert_close(averaged.mean(1), pooled)
    assert averaged[1, [1, 3, 4, 5]].abs().max() == 0
    cells = Features(pooled, tokens, mask, (2, 3)).as_map(averaged)
    assert cells.shape == (2, 4, 2, 3)
    assert torch.equal(cells[0, :, 1, 0], tokens[0, 3])


# ---------------------------------------------------------------- similarity with texts


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", ["map", "clip"])
def test_similarities_add_up_over_tokens(kind: str, standardize: bool) -> None:
    """The mean of the map is the score; standardisation shifts all scores of a concept by a constant."""
    width = 12 if kind == "map" else 16
    concepts = ConceptSet(["red", "round", "wet"], embeddings=torch.randn(3, width))
    bottleneck = SimilarityBottleneck(standardize=standardize)
    if kind == "map":
        model = model_of(conv_net(), bottleneck, concepts)
    else:
        made = clip_model(VIT, pool="token_mean", tokens="projected")
        model = model_of(made.backbone, bottleneck, concepts)
    if standardize:
        bottleneck.train()
        for seed in (1, 2):
            bottleneck(model.backbone(images(8, seed=seed)))
        bottleneck.eval()
    image = images(4)
    means, scores = exact(model, image).mean((2, 3)), scores_of(model, image)
    shift = means - scores
    if not standardize:
        assert_close(means, scores, rtol=1e-5, atol=1e-4)
        return
    normalizer = bottleneck.normalizer
    assert (normalizer.factor() - 1).abs().min() > 0.1
    assert_close(shift, (normalizer.mean * normalizer.factor()).expand_as(shift), rtol=1e-4, atol=1e-4)
    assert shift.abs().min() > 1e-3


# ---------------------------------------------------------------- bottlenecks of one's own


class Brightest(ScalarBottleneck):
    """Scores that are the largest of a map of their own."""

    def build(self, dims: FeatureDims, concepts: ConceptSet, num_classes: int) -> None:
        self.build_values(concepts)
        self.cells = nn.Linear(dims.tokens or 0, len(concepts))

    def forward(self, features: Features, concepts: Tensor | None = None) -> ConceptOutput:
        maps = features.as_map(self.cells(features.tokens))
        return self.make_output(features, maps.amax((2, 3))).replace(maps=maps)


def test_maps_that_a_bottleneck_computes_with_are_its_exact_maps() -> None:
    model = model_of(conv_net(), Brightest("logits"))
    image = images(3)
    maps = exact(model, image)
    assert_close(maps.amax((2, 3)), scores_of(model, image))
    assert torch.equal(concept_maps(model, image, resolution="method"), maps)
    # whatever the backbone pools, since it reads the tokens
    model = timm_model("test_vit", Brightest("logits"))
    assert exact(model, images_for(model)).shape == (2, 3, 4, 4)


# ---------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[Callable[[], CBMModule], str]] = {
    "class token": (lambda: timm_model("test_vit"), "pools in another way.*token_mean.*grad_cam"),
    "class token by hand": (lambda: model_of(TinyViT("class")), "pools in another way"),
    "norm after pooling": (lambda: timm_model("test_convnext"), "pools in another way"),
    "attention pool": (lambda: clip_model(RESNET), "pools in another way"),
    "projected class token": (lambda: clip_model(VIT, tokens="projected"), "pools in another way"),
    "tokens of another stage": (lambda: timm_model("test_resnet", stage=1), "pools in another way"),
    "another bottleneck": (lambda: model_of(conv_net(), EmbeddingBottleneck(3)), "EmbeddingBottleneck.*grad_cam"),
    "no tokens": (lambda: model_of(smooth_net()), "returns none.*grad_cam"),
    "no grid": (lambda: model_of(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2))), "returns none.*grad_cam"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_without_exact_maps_say_what_would_help(kind: str) -> None:
    make, message = REFUSED[kind]
    model = make()
    with pytest.raises(NoExactMaps, match=message):
        exact(model, images_for(model))


def test_tokens_on_another_grid_than_that_of_an_image() -> None:
    tokens = torch.randn(2, 8, 4)
    video = Features(tokens.mean(1), tokens, grid=(2, 2, 2))
    with pytest.raises(ValueError, match="patch tokens on a grid"):
        video.averaged_tokens()
    with pytest.raises(ValueError, match=r"expected tokens on a grid \(h, w\), got the grid \(2, 2, 2\)"):
        video.as_map(tokens)


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind not in ("no tokens", "no grid")])
def test_automatic_maps_are_exact_or_those_of_grad_cam(kind: str) -> None:
    model = REFUSED[kind][0]()
    image = images_for(model)
    options: dict[str, Any] = {"resolution": "method"}
    assert torch.equal(concept_maps(model, image, **options), concept_maps(model, image, "grad_cam", **options))


def test_automatic_maps_are_exact_where_there_are_such() -> None:
    model = model_of(conv_net())
    assert torch.equal(concept_maps(model, images(), resolution="method"), exact(model, images()))
