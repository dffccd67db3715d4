from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils import parametrize

from cbm_lightning.metrics.faithfulness import RandomisationSimilarity
from cbm_lightning.saliency import randomisation
from cbm_lightning.saliency.randomisation import map_similarity, randomised

NAN = float("nan")


class Mixed(nn.Module):
    """Layers that can initialise themselves, weights that nobody initialises, buffers, and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.scorer = nn.Parameter(3.0 + 0.5 * torch.randn(40, 50))
        self.scale = nn.Parameter(torch.tensor(14.0))
        self.ones = nn.Parameter(torch.ones(4))
        self.tied = nn.Linear(6, 5)
        self.tied.weight = self.linear.weight
        self.register_buffer("texts", torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale


def trained() -> Mixed:
    """Nothing stands as it was initialised."""
    module = Mixed()
    with torch.no_grad():
        for part in (module.linear.weight, module.linear.bias, module.tied.bias, module.norm.weight, module.norm.bias):
            part.add_(1.0)
        module.norm.running_mean.fill_(0.3)
    return module


def contents(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in [*module.named_parameters(), *module.named_buffers()]}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if a[name].equal(b[name])]


def test_weights_are_random_inside_and_what_they_were_outside() -> None:
    module = trained()
    before = contents(module)
    tensors = {name: (x, x.data_ptr()) for name, x in module.named_parameters()}
    with randomised(module, seed=0):
        inside = contents(module)
    # a scale and equal numbers have no arrangement to lose; buffers stay
    stayed = ["scale", "ones", "texts", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert sorted(same(before, inside)) == sorted(stayed)
    assert same(before, contents(module)) == list(before)
    for name, x in module.named_parameters():
        assert x is tensors[name][0]
        assert x.data_ptr() == tensors[name][1]
        assert x.requires_grad
    assert module.tied.weight is module.linear.weight


def test_what_is_drawn() -> None:
    module = trained()
    with randomised(module, seed=0):
        # initialised anew: uniform within the square root of 1/6
        assert module.linear.weight.abs().max() <= 6**-0.5
        assert module.norm.weight.eq(1).all()
        assert module.norm.bias.eq(0).all()
        # drawn with its own mean and spread, of which 2000 numbers make an error of a few hundredths
        scorer = module.scorer.detach().clone()
        assert scorer.mean().item() == pytest.approx(3.0, abs=0.06)
        assert scorer.std().item() == pytest.approx(0.5, abs=0.04)
    assert torch.corrcoef(torch.stack([scorer.flatten(), module.scorer.detach().flatten()]))[0, 1].abs() < 0.1


def drawn(module: nn.Module, seed: int) -> dict[str, Tensor]:
    with randomised(module, seed):
        return contents(module)


def test_the_seed_alone_decides_what_is_drawn() -> None:
    module = trained()
    first = drawn(module, 7)
    torch.rand(13)
    drawn(copy.deepcopy(module), 8)
    assert same(first, drawn(module, 7)) == list(first)
    assert {"linear.weight", "scorer"} <= first.keys() - set(same(first, drawn(module, 8)))


def test_no_global_random_state_moves() -> None:
    module = trained()
    state = torch.get_rng_state()
    with randomised(module, seed=0):
        assert torch.get_rng_state().equal(state)
    assert torch.get_rng_state().equal(state)


def test_an_exception_restores_too() -> None:
    module = trained()
    before = contents(module)
    with pytest.raises(RuntimeError, match="out of luck"), randomised(module, seed=0):
        raise RuntimeError("out of luck")
    assert same(before, contents(module)) == list(before)


def test_what_happens_inside_stays_inside() -> None:
    module = trained().train()
    before = contents(module)
    with randomised(module, seed=0):
        module(torch.randn(8, 6))
        assert not module.norm.running_mean.equal(before["norm.running_mean"])
        with torch.no_grad():
            module.linear.bias.fill_(NAN)
    assert same(before, contents(module)) == list(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes(mode: Callable[[], Any]) -> None:
    module = trained().eval()
    before, x = contents(module), torch.randn(4, 6)
    expected = module(x).detach()
    with mode():
        with randomised(module, seed=0):
            assert not torch.allclose(module(x), expected)
        assert module(x).equal(expected)
    assert same(before, contents(module)) == list(before)
    assert not any(p.is_inference() for p in module.parameters())


def test_an_optimizer_goes_on_as_if_nothing_had_been() -> None:
    modules = [trained().eval() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(4, 6)
    for i, module in enumerate(modules):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for _ in range(3):
            if i:
                with randomised(module, seed=0):
                    # gradients of inputs, as for maps
                    probe = x.clone().requires_grad_()
                    assert torch.autograd.grad(module(probe).sum(), probe)[0].shape == x.shape
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert same(contents(modules[0]), contents(modules[1])) == list(contents(modules[0]))


def test_weights_under_a_parametrisation_are_reached() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = nn.Linear(6, 5, bias=False)
    parametrize.register_parametrization(layer, "weight", Double())
    before = contents(layer)
    inside = drawn(layer, 0)
    assert list(inside) == ["parametrizations.weight.original"]
    assert same(before, inside) == []
    assert same(before, contents(layer)) == list(before)


def test_half_precision() -> None:
    layer = nn.Linear(6, 5).to(torch.bfloat16)
    layer.extra = nn.Parameter(torch.randn(5, 5).to(torch.bfloat16))
    before = contents(layer)
    inside = drawn(layer, 0)
    assert same(before, inside) == []
    assert {x.dtype for x in inside.values()} == {torch.bfloat16}
    assert same(before, contents(layer)) == list(before)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4)])
def test_nothing_to_randomise(module: nn.Module) -> None:
    before = contents(module)
    with pytest.raises(ValueError, match="^module: .* has no weights that could be randomised"), randomised(module, 0):
        pytest.fail("the block must not run")
    assert same(before, contents(module)) == list(before)


def edges(images: Tensor) -> Tensor:
    """What changes from one pixel to the next, whatever the model."""
    return (images[:, :, 1:, 1:] - images[:, :, :-1, :-1]).abs().mean(1)


def test_an_edge_detector_fails_the_check_and_an_exact_map_passes() -> None:
    convolution, head = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(32, 6)
    images = torch.rand(24, 3, 10, 10)
    concepts = torch.arange(24) % 6

    def class_activation_maps() -> Tensor:
        features = convolution(images)
        features = features - features.mean((2, 3), keepdim=True)
        return torch.einsum("bdhw,bd->bhw", features, head.weight[concepts])

    def edge_detector() -> Tensor:
        return edges(images)

    found = {}
    for method in (class_activation_maps, edge_detector):
        metric = RandomisationSimilarity(6, seed=1)
        with torch.inference_mode():
            before = method()
            for seed in range(8):
                with randomised(head, seed):
                    metric.update(before, method(), concepts)
        found[method] = float(metric.compute()), float(metric.chance())
    similarity, chance = found[class_activation_maps]
    assert similarity == pytest.approx(chance, abs=0.15)
    similarity, chance = found[edge_detector]
    assert similarity == pytest.approx(1.0)
    assert chance < 0.95


def some_maps() -> tuple[Tensor, Tensor]:
    a, b = torch.randn(7, 6, 5), torch.randn(7, 6, 5)
    # many ties, as where negative evidence is cut off
    a[2], b[2] = a[2].relu(), b[2].round()
    b[3] = a[3] + 0.1 * b[3]
    return a, b


def test_similarities_agree_with_torch_and_scipy() -> None:
    a, b = some_maps()
    torch.testing.assert_close(map_similarity(a, b), cosine_similarity(a.flatten(1), b.flatten(1)))
    ranks = [spearmanr(x, y).statistic for x, y in zip(a.flatten(1), b.flatten(1), strict=True)]
    torch.testing.assert_close(map_similarity(a, b, "spearman"), torch.tensor(ranks).float())


def test_the_default_is_the_cosine() -> None:
    a, b = some_maps()
    assert map_similarity(a, b).equal(map_similarity(a, b, "cosine"))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("kind", ["cosine", "spearman"])
def test_the_scale_of_maps_does_not_matter(scale: float, kind: Any) -> None:
    a, b = some_maps()
    torch.testing.assert_close(map_similarity(a * scale, b, kind), map_similarity(a, b, kind))


@pytest.mark.parametrize("kind", ["cosine", "spearman"])
def test_maps_that_say_nothing(kind: Any) -> None:
    a, b = some_maps()
    a[0], b[1], a[4], b[5, 0, 0] = 0.0, 2.0, 3.0, NAN
    expected = [True, True, False, False, True, True, False]
    assert map_similarity(a, b, kind).isnan().tolist() == expected
    assert map_similarity(b, a, kind).isnan().tolist() == expected


@pytest.mark.parametrize("kind", ["cosine", "spearman"])
def test_chunks_change_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = some_maps()
    whole = map_similarity(a, b, kind)
    for entries in (1, 65, 90):
        monkeypatch.setattr(randomisation, "_ENTRIES", entries)
        assert map_similarity(a, b, kind).equal(whole)
    assert map_similarity(a[:0], b[:0], kind).shape == (0,)


def test_precision_of_similarities() -> None:
    a, b = some_maps()
    for kind in ("cosine", "spearman"):
        assert map_similarity(a.double(), b.double(), kind).dtype == torch.float64
        assert map_similarity(a.bfloat16(), b.bfloat16(), kind).dtype == torch.float32
        # views that are not contiguous
        turned = map_similarity(a.mT, b.mT, kind)
        torch.testing.assert_close(turned, map_similarity(a.mT.contiguous(), b.mT.contiguous(), kind))


def test_bad_input() -> None:
    a, b = some_maps()
    with pytest.raises(ValueError, match=r"^a, b: expected maps .* got \[7, 6, 5\] and \[6, 6, 5\]"):
        map_similarity(a, b[:6])
    with pytest.raises(ValueError, match=r"^a, b: expected maps \[P, H, W\]"):
        map_similarity(a[None], b[None])
    with pytest.raises(ValueError, match="^kind: expected 'cosine' or 'spearman', got 'ssim'"):
        map_similarity(a, b, "ssim")  # type: ignore[arg-type]
