"""Losses beside autograd and beside differences in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbm_lightning.sparsity.families import Family, Multinomial, OneVsRest, make_family

FAMILIES: dict[str, Family] = {"multinomial": Multinomial(), "ovr": OneVsRest()}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def drawn(name: str, n: int = 20, classes: int = 4, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits and targets in double precision."""
    logits = spread * torch.randn(n, classes, dtype=torch.float64)
    if name == "multinomial":
        return logits, torch.randint(0, classes, (n,))
    return logits, (torch.rand(n, classes) < 0.4).double()


def test_the_derivative_is_that_of_the_value(name: str) -> None:
    family, (logits, targets) = FAMILIES[name], drawn(name, spread=5.0)
    logits.requires_grad_()
    [gradient] = torch.autograd.grad(family.value(logits, targets), logits)
    before = logits.detach().clone()
    torch.testing.assert_close(family.derivative(before, targets), gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(before, logits.detach())


@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
def test_the_divergence_is_what_the_loss_exceeds_its_tangent_by(name: str, size: float) -> None:
    family, (logits, targets) = FAMILIES[name], drawn(name)
    step = size * torch.randn_like(logits)
    tangent = family.value(logits, targets) + (family.derivative(logits, targets) * step).sum()
    expected = family.value(logits + step, targets) - tangent
    torch.testing.assert_close(family.divergence(logits, step), expected, rtol=1e-8, atol=1e-10)
    single = family.divergence(logits.float(), step.float())
    assert float(single) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_small_steps_lose_few_digits_in_single_precision(name: str, size: float) -> None:
    family, (logits, targets) = FAMILIES[name], drawn(name, n=200)
    step = size * torch.randn_like(logits)
    exact = float(family.divergence(logits, step))
    logits, step = logits.float(), step.float()
    # the roundings of the terms are of the size of the step, and are not biased
    assert float(family.divergence(logits, step)) == pytest.approx(exact, rel=0.05)
    targets = targets if name == "multinomial" else targets.float()
    tangent = family.value(logits, targets) + (family.derivative(logits, targets) * step).sum()
    naive = float(family.value(logits + step, targets) - tangent)
    if size == 1e-3:
        assert abs(float(family.divergence(logits, step)) - exact) < abs(naive - exact)


def test_equal_shifts_of_all_classes_change_no_softmax() -> None:
    logits, _ = drawn("multinomial")
    shift = torch.randn(20, 1, dtype=torch.float64).expand(20, 4)
    assert float(Multinomial().divergence(logits, shift)) == pytest.approx(0.0, abs=1e-13)


def test_the_second_derivative_stays_below_its_bound(name: str) -> None:
    family = FAMILIES[name]
    largest = 0.0
    for spread in (0.0, 1.0, 4.0):
        logits, targets = drawn(name, n=12, spread=spread)
        for row in range(12):

            def loss(at: Tensor, targets: Tensor = targets[row : row + 1]) -> Tensor:
                return family.value(at[None], targets)

            hessian = torch.autograd.functional.hessian(loss, logits[row])
            largest = max(largest, float(torch.linalg.eigvalsh(hessian)[-1]))
    assert largest <= family.curvature + 1e-12


@pytest.mark.parametrize(
    ("name", "logits"), [("multinomial", [0.0, 0.0, -60.0, -60.0]), ("ovr", [0.0, 30.0, -9.0, 2.0])]
)
def test_the_bound_is_reached(name: str, logits: list[float]) -> None:
    family, target = FAMILIES[name], drawn(name, n=1)[1]
    hessian = torch.autograd.functional.hessian(
        lambda at: family.value(at[None], target), torch.tensor(logits, dtype=torch.float64)
    )
    assert float(torch.linalg.eigvalsh(hessian)[-1]) == pytest.approx(family.curvature)


def test_no_constant_is_better_than_the_null_logits(name: str) -> None:
    family, (logits, targets) = FAMILIES[name], drawn(name, n=200)
    prevalence = targets.mean(0) if name == "ovr" else torch.bincount(targets, minlength=4).double() / 200
    null = family.null_logits(prevalence)
    slope = family.derivative(null.expand_as(logits).clone(), targets).sum(0)
    assert float(slope.abs().max()) == pytest.approx(0.0, abs=1e-10)
    if name == "multinomial":
        assert float(null.mean()) == pytest.approx(0.0, abs=1e-12)


def test_probabilities(name: str) -> None:
    logits, _ = drawn(name)
    probs = FAMILIES[name].probabilities(logits)
    expected = logits.softmax(-1) if name == "multinomial" else 1 / (1 + (-logits).exp())
    torch.testing.assert_close(probs, expected)


def test_huge_logits_are_no_problem(name: str) -> None:
    family, (logits, targets) = FAMILIES[name], drawn(name, spread=1e4)
    logits = logits.float()
    targets = targets if name == "multinomial" else targets.float()
    assert family.value(logits, targets).isfinite()
    assert family.derivative(logits, targets).isfinite().all()
    assert family.derivative(logits, targets).abs().max() <= 1


def test_families_by_name(name: str) -> None:
    assert type(make_family(name)) is type(FAMILIES[name])
    with pytest.raises(ValueError, match="^family: .*'multinomial', 'ovr'.*'probit'"):
        make_family("probit")
