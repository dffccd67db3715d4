"""Attributions to pixels: noise, baselines, quadratures and covering windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from saliency.models import conv_net, images, model_of, scores_of, smooth_net
from torch import Tensor, nn
from torch.testing import assert_close

from cbm_lightning import CBMModule
from cbm_lightning.saliency import (
    Gradient,
    InputXGradient,
    IntegratedGradients,
    Occlusion,
    SaliencyMethod,
    SmoothGrad,
    concept_maps,
)
from cbm_lightning.saliency.methods.pixels import PixelAttribution


@pytest.fixture
def model() -> CBMModule:
    return model_of(smooth_net())


class Window(nn.Module):
    """Reads the mean of one window of the image and nothing else."""

    def __init__(self, top: int, left: int, side: int) -> None:
        super().__init__()
        self.top, self.left, self.side = top, left, side

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, self.top : self.top + self.side, self.left : self.left + self.side].mean((1, 2, 3))[:, None]


def reader(top: int, left: int, side: int) -> CBMModule:
    """Scores that are 1, -2 and 0 times what is in the window."""
    made = model_of(Window(top, left, side))
    with torch.no_grad():
        made.bottleneck.scores.weight.copy_(torch.tensor([[1.0], [-2.0], [0.0]]))
    return made


# ---------------------------------------------------------------- slopes


def test_slopes_of_each_concept(model: CBMModule) -> None:
    image = images(3).requires_grad_()
    logits = model(image).concepts.logits
    for k in range(3):
        (slope,) = torch.autograd.grad(logits[:, k].sum(), image, retain_graph=True)
        assert_close(concept_maps(model, image, "gradient")[:, k], slope.abs().amax(1))
        assert_close(concept_maps(model, image, Gradient("sum"))[:, k], slope.sum(1))
        assert_close(concept_maps(model, image, "input_x_gradient")[:, k], (slope * image).sum(1).detach())
        product = concept_maps(model, image, InputXGradient("abs_sum"))[:, k]
        assert_close(product, (slope * image).abs().sum(1).detach())
    assert image.grad is None


def test_they_tell_where_a_model_looks() -> None:
    for name in ("gradient", "input_x_gradient", "integrated_gradients", "smooth_grad"):
        maps = concept_maps(reader(8, 4, 4), images(), name)
        inside = maps[:, :, 8:12, 4:8].abs()
        assert inside[:, :2].min() > 0
        assert inside[:, 2].max() == 0
        assert_close(inside.sum((2, 3)), maps.abs().sum((2, 3)))


@pytest.mark.parametrize("quadrature", ["gausslegendre", "riemann_middle"])
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_integrated_gradients_account_for_the_score(model: CBMModule, quadrature: Any, baseline: float) -> None:
    method = IntegratedGradients(60, baseline, quadrature)
    maps = concept_maps(model, images(), method)
    rise = scores_of(model, images()) - scores_of(model, torch.full((1, 3, 32, 32), baseline))
    assert_close(maps.sum((2, 3)), rise, rtol=0, atol=1e-4)
    assert rise.abs().min() > 2e-3


# ---------------------------------------------------------------- noise


def test_noise_is_drawn_from_the_seed_alone(model: CBMModule) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = concept_maps(model, images(), SmoothGrad(samples=3, seed=7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(concept_maps(model, images(), SmoothGrad(samples=3, seed=7)), first)
    assert not torch.equal(concept_maps(model, images(), SmoothGrad(samples=3, seed=8)), first)


@pytest.mark.parametrize("inner", ["gradient", "input_x_gradient", "integrated_gradients"])
def test_without_noise_it_is_what_it_averages(model: CBMModule, inner: str) -> None:
    for method in (SaliencyMethod.make(inner), type(SaliencyMethod.make(inner))(channels="abs_sum", batch_size=4)):
        smooth = SmoothGrad(method, samples=2, std=1e-6)
        assert_close(concept_maps(model, images(), smooth), concept_maps(model, images(), method), rtol=1e-3, atol=1e-6)


def test_the_mean_over_noise_is_what_a_loop_gives(model: CBMModule) -> None:
    method = SmoothGrad(Gradient("sum"), samples=400, std=0.5)
    maps = concept_maps(model, images(1), method, concepts=[1])[:, 0]
    noisy = (images(1) + 0.5 * torch.randn(400, 3, 32, 32)).requires_grad_()
    (slopes,) = torch.autograd.grad(model(noisy).concepts.logits[:, 1].sum(), noisy)
    expected = slopes.sum(1)
    error = maps[0] - expected.mean(0)
    plain = concept_maps(model, images(1), Gradient("sum"), concepts=[1])[0, 0]
    assert error.norm() < 5 * (expected.var(0).sum() / 400).sqrt()
    assert error.norm() < 0.5 * (plain - expected.mean(0)).norm()


def test_kinds_of_average() -> None:
    class OneChannel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x[:, 0]).mean((1, 2))[:, None]

    model = model_of(OneChannel())
    mean, squares, variance = (
        concept_maps(model, images(), SmoothGrad(Gradient("sum"), samples=5, kind=kind))
        for kind in ("smoothgrad", "smoothgrad_sq", "vargrad")
    )
    assert_close(squares - mean.square(), variance, rtol=1e-3, atol=1e-9)
    assert squares.min() >= 0
    assert variance.max() > 0
    assert (mean < 0).any()


def test_a_linear_model_does_not_mind_noise() -> None:
    made = reader(0, 0, 8)
    assert_close(concept_maps(made, images(), SmoothGrad(std=3.0, samples=4)), concept_maps(made, images(), "gradient"))


def test_whole_numbers_are_numbers(model: CBMModule) -> None:
    options: dict[str, Any] = {"samples": 2, "seed": 3}
    whole = concept_maps(model, images(), SmoothGrad(std=1, **options))
    assert torch.equal(whole, concept_maps(model, images(), SmoothGrad(std=1.0, **options)))
    whole = concept_maps(model, images(), IntegratedGradients(3, baseline=1))
    assert torch.equal(whole, concept_maps(model, images(), IntegratedGradients(3, baseline=1.0)))
    whole = concept_maps(model, images(), Occlusion(8, baseline=1))
    assert torch.equal(whole, concept_maps(model, images(), Occlusion(8, baseline=1.0)))


# ---------------------------------------------------------------- covering


def test_covering_finds_the_only_window_that_is_read() -> None:
    model = reader(8, 4, 4)
    maps = concept_maps(model, images(), Occlusion(window=4, stride=4))
    expected = torch.zeros(2, 3, 32, 32)
    means = images()[:, :, 8:12, 4:8].mean((1, 2, 3))
    for k, factor in enumerate((1.0, -2.0, 0.0)):
        expected[:, k, 8:12, 4:8] = factor * means[:, None, None]
    assert_close(maps, expected)


@pytest.mark.parametrize(("window", "stride", "baseline"), [(5, 3, 0.0), (4, 4, 0.5), (7, 2, -1.0), (32, 32, 0.0)])
def test_covering_as_by_hand(model: CBMModule, window: int, stride: int, baseline: float) -> None:
    """The fall under each window, averaged over the windows that cover a pixel; the last ones may jut out."""
    image, tops = images(), list(range(0, 32 - window + stride, stride))
    total, covered = torch.zeros(2, 3, 32, 32), torch.zeros(32, 32)
    for top in tops:
        for left in tops:
            inside = (..., slice(top, top + window), slice(left, left + window))
            hidden = image.clone()
            hidden[inside] = baseline
            fall = scores_of(model, image) - scores_of(model, hidden)
            total[inside] += fall[:, :, None, None]
            covered[inside] += 1
    assert covered.min() >= 1
    maps = concept_maps(model, image, Occlusion(window, stride, baseline))
    assert_close(maps, total / covered, rtol=1e-4, atol=1e-6)


def test_the_window_is_an_eighth_of_the_image_by_default(model: CBMModule) -> None:
    expected = concept_maps(model, images(), Occlusion(window=4, stride=2))
    assert torch.equal(concept_maps(model, images(), "occlusion"), expected)
    # of its shorter side, and a pixel at least
    wide = torch.randn(1, 3, 32, 40)
    assert torch.equal(concept_maps(model, wide, "occlusion"), concept_maps(model, wide, Occlusion(4, 2)))
    tiny = model_of(nn.Conv2d(3, 5, 1), size=3)
    assert concept_maps(tiny, torch.randn(1, 3, 3, 3), "occlusion").shape == (1, 3, 3, 3)


@pytest.mark.parametrize(("window", "stride"), [(33, 1), (4, 5), (None, 5), (40, None)])
def test_windows_that_do_not_fit(model: CBMModule, window: int | None, stride: int | None) -> None:
    with pytest.raises(ValueError, match="window, stride: expected a window within 32x32 pixels and a stride of at mo"):
        concept_maps(model, images(), Occlusion(window, stride))


# ---------------------------------------------------------------- options of all

SIZED: dict[str, Callable[[int], SaliencyMethod]] = {
    "gradient": lambda n: Gradient(batch_size=n),
    "input_x_gradient": lambda n: InputXGradient(batch_size=n),
    "integrated_gradients": lambda n: IntegratedGradients(5, batch_size=n),
    "occlusion": lambda n: Occlusion(8, batch_size=n),
}


@pytest.mark.parametrize("name", SIZED)
def test_batch_size_changes_nothing_and_is_kept(name: str) -> None:
    model = model_of(conv_net())
    whole = concept_maps(model, images(3), SIZED[name](64))
    sizes: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    for n in (1, 2, 7):
        sizes.clear()
        assert_close(concept_maps(model, images(3), SIZED[name](n)), whole, rtol=1e-4, atol=1e-6)
        assert max(sizes) == n if name != "occlusion" else max(sizes) <= n


def test_noisy_copies_keep_the_batch_size_too() -> None:
    model = model_of(conv_net())
    sizes: list[int] = []
    model.backbone.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    concept_maps(model, images(3), SmoothGrad(Gradient(batch_size=4), samples=3))
    # nine pairs of an image and a concept, three times each
    assert sizes == [4, 4, 4, 4, 4, 4, 1, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gradient("mean"), r"channels: expected one of \('sum', 'abs_sum', 'max_abs'\), got 'mean'"),
        (lambda: Gradient(batch_size=0), "batch_size: expected at least 1, got 0"),
        (lambda: IntegratedGradients(0), "n_steps: expected at least 1, got 0"),
        (lambda: IntegratedGradients(quadrature="simpson"), "quadrature: expected one of .*gausslegendre.*'simpson'"),
        (lambda: SmoothGrad(samples=0), "samples: expected at least 1, got 0"),
        (lambda: SmoothGrad(std=0.0), "std: expected a positive number, got 0"),
        (lambda: SmoothGrad(std=float("nan")), "std: expected a positive number, got nan"),
        (lambda: SmoothGrad(kind="cubes"), "kind: expected one of .*smoothgrad_sq.*'cubes'"),
        (lambda: SmoothGrad("occlusion"), "method: SmoothGrad averages attributions to pixels, not Occlusion"),
        (lambda: SmoothGrad("smooth_grad"), "method: SmoothGrad averages attributions to pixels, not SmoothGrad"),
        (lambda: SmoothGrad("gradients"), "method: nothing is called 'gradients'; did you mean 'gradient'"),
        (lambda: Occlusion(window=0), "window: expected at least 1, got 0"),
        (lambda: Occlusion(stride=0), "stride: expected at least 1, got 0"),
        (lambda: Occlusion(batch_size=0), "batch_size: expected at least 1, got 0"),
    ],
)
def test_options_out_of_range(make: Callable[[], SaliencyMethod], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_attribution_of_ones_own(model: CBMModule) -> None:
    class Squared(PixelAttribution):
        """Slopes squared; without a name, so that it is handed over as it is."""

        def explainer(self, forward: Callable[[Tensor], Tensor]) -> Any:
            return Gradient().explainer(forward)

        def reduce(self, attribution: Tensor) -> Tensor:
            return attribution.square().sum(1)

    image = images().requires_grad_()
    (slope,) = torch.autograd.grad(model(image).concepts.logits[:, 2].sum(), image)
    assert_close(concept_maps(model, image, Squared())[:, 2], slope.square().sum(1))
