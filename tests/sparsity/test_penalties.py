"""Proximal operators beside their definition: the point that no other point beats."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from cbm_lightning.sparsity.penalties import (
    ElasticNet,
    GroupElasticNet,
    KeptRidge,
    Penalty,
    group_norms,
    group_soft_threshold,
    make_penalty,
    soft_threshold,
)

# six columns in three groups that do not lie side by side
GROUPS = torch.tensor([0, 1, 0, 2, 2, 1])
PENALTIES: dict[str, Penalty] = {
    "lasso": ElasticNet(1.0),
    "elastic net": ElasticNet(0.4),
    "ridge": ElasticNet(0.0),
    "columns": GroupElasticNet(1.0),
    "columns and ridge": GroupElasticNet(0.6),
    "rows": GroupElasticNet(0.9, dim=0),
    "rows, counted from the end": GroupElasticNet(0.9, dim=-2),
    "groups of columns": GroupElasticNet(0.7, groups=GROUPS),
}


@pytest.fixture(params=PENALTIES)
def penalty(request: pytest.FixtureRequest) -> Penalty:
    return PENALTIES[request.param]


def weights(seed: int = 0, rows: int = 4) -> Tensor:
    """``[rows, 6]`` of very different sizes, so that some groups vanish and some stay."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator, dtype=torch.float64) * torch.logspace(-1.5, 0.5, 6)


def assert_proximal(cost: Callable[[Tensor], Tensor], found: Tensor, target: Tensor) -> None:
    """What defines the proximal point ``p``: ``f(v) >= f(p) + |v - p|^2 / 2`` for every ``v``, near and far."""

    def total(v: Tensor) -> Tensor:
        return cost(v) + (v - target).square().sum() / 2

    generator = torch.Generator().manual_seed(7)
    for size in (1e-5, 1e-3, 1e-1, 1.0):
        for _ in range(60):
            step = size * torch.randn(found.shape, generator=generator, dtype=found.dtype)
            # steps on some entries only, so that zeros are left alone in some of them
            step *= torch.rand(found.shape, generator=generator) < torch.rand((), generator=generator)
            assert total(found + step) >= total(found) + step.square().sum() / 2 - 1e-12


@pytest.mark.parametrize("strength", [0.0, 0.05, 0.4, 2.0])
def test_no_point_beats_the_proximal_point(penalty: Penalty, strength: float) -> None:
    target = weights()
    assert_proximal(lambda v: strength * penalty.value(v), penalty.prox(target, strength), target)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("strength", [0.2, 0.7])
def test_the_elastic_net_is_that_of_a_general_solver(alpha: float, strength: float) -> None:
    target = weights(seed=3).flatten().numpy()
    size = len(target)

    # positive and negative parts make the problem smooth
    def total(parts: np.ndarray) -> tuple[float, np.ndarray]:
        v = parts[:size] - parts[size:]
        value = strength * (alpha * parts.sum() + (1 - alpha) / 2 * v @ v) + (v - target) @ (v - target) / 2
        slope = strength * (1 - alpha) * v + v - target
        return value, np.concatenate([slope, -slope]) + strength * alpha

    bounds = [(0.0, None)] * (2 * size)
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 50000}
    solved = minimize(total, np.zeros(2 * size), jac=True, bounds=bounds, method="L-BFGS-B", options=options)
    ours = ElasticNet(alpha).prox(torch.from_numpy(target), strength)
    np.testing.assert_allclose(ours, solved.x[:size] - solved.x[size:], atol=1e-6)
    assert 0 < int((ours == 0).sum()) < size


def test_a_group_is_that_of_a_general_solver() -> None:
    target, alpha, strength = weights(seed=5), 0.8, 0.3
    ours = GroupElasticNet(alpha).prox(target, strength)
    kept = ours.abs().sum(0) > 0
    assert 0 < int(kept.sum()) < 6
    for column in kept.nonzero().flatten():
        start = target[:, column].numpy()

        def total(v: np.ndarray, start: np.ndarray = start) -> float:
            return strength * (alpha * np.linalg.norm(v) + (1 - alpha) / 2 * v @ v) + (v - start) @ (v - start) / 2

        # where the optimum is not zero the norm is smooth around it
        solved = minimize(total, start, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(ours[:, column], solved.x, atol=1e-6)


def test_a_soft_threshold_goes_to_zero_and_no_further() -> None:
    x = torch.tensor([3.0, 1.0, 0.25, 0.0, -0.5, -1.5])
    assert soft_threshold(x, 1.0).tolist() == [2.0, 0.0, 0.0, 0.0, 0.0, -0.5]
    assert torch.equal(soft_threshold(x, 0.0), x)
    each = torch.tensor([1.0, 0.5, 0.5, 1.0, 0.25, 2.0])
    assert soft_threshold(x, each).tolist() == [2.0, 0.5, 0.0, 0.0, -0.25, 0.0]


def test_a_strength_for_every_entry() -> None:
    target, strength = weights(), torch.rand(4, 6, dtype=torch.float64)
    net = ElasticNet(0.5)
    cost = 0.5 * strength, 0.25 * strength
    assert_proximal(lambda v: (cost[0] * v.abs() + cost[1] * v.square()).sum(), net.prox(target, strength), target)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["columns", "groups"])
def test_strengths_that_differ_within_a_group_count_as_their_harmonic_mean(groups: Tensor | None) -> None:
    target, strength = weights(), torch.rand(4, 6, dtype=torch.float64)
    members = torch.arange(6) if groups is None else groups
    mean = torch.stack([1 / (1 / strength[:, members == g]).mean() for g in range(int(members.max()) + 1)])[members]
    ours = GroupElasticNet(0.7, groups=groups).prox(target, strength)

    def cost(v: Tensor) -> Tensor:
        each = [v[:, members == g].norm() * mean[members == g][0] for g in range(int(members.max()) + 1)]
        return 0.7 * torch.stack(each).sum() + 0.15 * (mean * v.square()).sum()

    assert_proximal(cost, ours, target)


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["columns", "groups"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_column_is_zero_and_never_nan(groups: Tensor | None, strength: float, dtype: torch.dtype) -> None:
    weight = weights().to(dtype)
    dead = torch.zeros(6, dtype=torch.bool)
    dead[[0, 2]] = True
    weight[:, dead] = 0.0
    penalty = GroupElasticNet(0.9, groups=groups)
    for result in (penalty.prox(weight, strength), group_soft_threshold(weight, strength, groups=groups)):
        assert result.isfinite().all()
        assert (result[:, dead] == 0).all()
        assert result[:, 4].norm() > 0
    assert penalty.value(weight).isfinite()
    assert penalty.residual(weight, torch.ones_like(weight), strength).isfinite()
    everything = torch.zeros_like(weight)
    assert torch.equal(penalty.prox(everything, strength), everything)


def test_norms_of_groups() -> None:
    x = torch.tensor([[3.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    assert group_norms(x).tolist() == pytest.approx([5.0, 2**0.5, 0.0])
    assert group_norms(x, dim=0).tolist() == pytest.approx([10**0.5, 17**0.5])
    assert group_norms(x, groups=torch.tensor([0, 1, 0])).tolist() == pytest.approx([5.0, 2**0.5])
    embedding = torch.randn(3, 4, 2)
    torch.testing.assert_close(group_norms(embedding, dim=1), embedding.permute(1, 0, 2).flatten(1).norm(dim=1))


def test_a_group_per_class_is_a_row() -> None:
    weight = weights()
    torch.testing.assert_close(
        GroupElasticNet(0.8, dim=0).prox(weight, 0.3), GroupElasticNet(0.8).prox(weight.T, 0.3).T
    )


def test_values() -> None:
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, -1.0]])
    assert float(ElasticNet(1.0).value(weight)) == 9.0
    assert float(ElasticNet(0.25).value(weight)) == pytest.approx(0.25 * 9 + 0.375 * 27)
    assert float(GroupElasticNet(1.0).value(weight)) == pytest.approx(5 + 2**0.5)
    assert float(GroupElasticNet(0.25, groups=torch.tensor([0, 1, 0])).value(weight)) == pytest.approx(
        0.25 * 27**0.5 + 0.375 * 27
    )


def test_nothing_is_missed_at_the_proximal_point_and_something_elsewhere(penalty: Penalty) -> None:
    target = weights()
    for strength in (0.0, 0.05, 0.4, 2.0):
        # the loss |V - W|^2 / 2 has the gradient V - W, and its optimum is the proximal point
        optimum = penalty.prox(target, strength)
        assert float(penalty.residual(optimum, optimum - target, strength)) == pytest.approx(0.0, abs=1e-14)
        for off in (optimum + 0.01, optimum * 0.9, optimum + 0.01 * torch.eye(4, 6, dtype=torch.float64)):
            if not torch.equal(off, optimum):
                assert penalty.residual(off, off - target, strength) > 1e-4


def test_how_much_is_missed() -> None:
    weight = torch.tensor([[0.0, 2.0, -1.0]])
    gradient = torch.tensor([[-0.7, -0.5, 0.9]])
    # |-.7| - .5 at zero; -.5 + .5 and .9 - .5 elsewhere
    assert float(ElasticNet(1.0).residual(weight, gradient, 0.5)) == pytest.approx(0.4)
    # |-.7| - .25; -.5 + .5 + .25; .9 - .25 - .25
    assert float(ElasticNet(0.5).residual(weight, gradient, 0.5)) == pytest.approx(0.45)
    column = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    pulled = torch.tensor([[-0.3, 0.6], [-0.4, 0.8]])
    assert float(GroupElasticNet().residual(column, pulled, 0.5)) == pytest.approx(0.5)
    assert float(GroupElasticNet().residual(column, pulled, 0.25)) == pytest.approx(0.75)


def test_the_null_strength_is_the_smallest_that_allows_nothing(penalty: Penalty) -> None:
    gradient, zero = weights(seed=2), torch.zeros(4, 6, dtype=torch.float64)
    null = penalty.null_strength(gradient)
    if getattr(penalty, "alpha", 1.0) == 0.0:
        assert null == pytest.approx(1000 * float(gradient.abs().max()))
        return
    assert float(penalty.residual(zero, gradient, null)) == pytest.approx(0.0, abs=1e-14)
    assert penalty.residual(zero, gradient, 0.99 * null) > 0
    assert (penalty.prox(-gradient, null * (1 + 1e-12)) == 0).all()
    assert (penalty.prox(-gradient, 0.99 * null) != 0).any()


def test_a_refit_keeps_zeros_and_shrinks_the_rest() -> None:
    mask = torch.rand(4, 6) < 0.5
    keep, target = KeptRidge(mask), weights()
    found = keep.prox(target, 0.5)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found[mask], target[mask] / 1.5)
    assert_proximal(lambda v: 0.5 * keep.value(v) + 1e6 * (v * ~mask).abs().sum(), found, target)
    # what lies outside the mask is fixed, so its gradient says nothing
    assert float(keep.residual(found, found - target, 0.5)) == pytest.approx(0.0, abs=1e-14)
    assert keep.residual(found, torch.where(mask, found - target + 1e-3, 0.0), 0.5) == pytest.approx(1e-3)
    assert keep.null_strength(target) == float("inf")
    assert keep.null_strength(target * ~mask) == 0.0


def test_penalties_by_name() -> None:
    assert isinstance(make_penalty("l1", 0.5), ElasticNet)
    group = make_penalty("group", 0.5, groups=GROUPS)
    assert isinstance(group, GroupElasticNet)
    assert group.groups is GROUPS
    with pytest.raises(ValueError, match="^penalty: .*'l1', 'group'.*'l0'"):
        make_penalty("l0", 0.5)


@pytest.mark.parametrize("kind", [ElasticNet, GroupElasticNet])
@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_is_a_share(kind: type, alpha: float) -> None:
    with pytest.raises(ValueError, match="^alpha: expected a share"):
        kind(alpha)
