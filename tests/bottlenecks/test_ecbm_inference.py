"""The descent against the plain definition of the energies, their automatic gradients and torch's own Adam."""

from __future__ import annotations

import pytest
import torch
from bottlenecks.plain_ecbm import CLASSES, CONCEPTS, GROUPED, WIDTH, model_of, total_energy
from torch import Tensor

from cbm_lightning.bottlenecks.ecbm_inference import Held, Point, descend, mixture, slopes
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.types import Features

WEIGHTS = (0.7, 1.1, 2.3)


def problem(concepts: ConceptSet = CONCEPTS, n: int = 5):
    model = model_of(concepts).double()
    x = torch.randn(n, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        terms = model.bottleneck.terms(Features(x))
    return model.bottleneck, x, terms


def free(n: int, concepts: int) -> Held:
    nothing = torch.zeros(n, concepts, dtype=torch.bool)
    return Held(nothing, torch.zeros(n, concepts, dtype=torch.float64), nothing)


def every_sample(weights: tuple[float, float, float], n: int) -> Tensor:
    return torch.tensor(weights, dtype=torch.float64).expand(n, 3)


@pytest.mark.parametrize("exclusive", [True, False])
def test_energy_and_slopes_are_those_of_the_plain_definition(exclusive: bool) -> None:
    bottleneck, x, terms = problem()
    removed = torch.tensor([[False, True, False]] * 2 + [[False] * 3] * 3)
    p = torch.rand(5, 3, dtype=torch.float64, requires_grad=True)
    classes = torch.rand(5, CLASSES, dtype=torch.float64, requires_grad=True)
    plain = total_energy(bottleneck, x, p, classes, WEIGHTS, removed, exclusive)
    by_concept, by_class = torch.autograd.grad(plain.sum(), (p, classes))
    with torch.no_grad():
        found = slopes(terms, p, classes, every_sample(WEIGHTS, 5), removed, exclusive)
    torch.testing.assert_close(found.energy, plain)
    torch.testing.assert_close(found.concepts, by_concept)
    torch.testing.assert_close(found.classes, by_class)


def plain_descent(bottleneck, x: Tensor, held: Held, start: tuple[Tensor, Tensor], steps: int, rate: float):
    """The paper's: two logits a concept, logits of the classes, torch's Adam on automatic gradients; the best kept."""
    pairs, label = (part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.Adam([pairs, label], lr=rate)
    best = [torch.full((len(x),), torch.inf), pairs, label]
    for step in range(steps + 1):
        p = torch.where(held.mask, held.probs, pairs.softmax(-1)[..., 1])
        energy = total_energy(bottleneck, x, p, label.softmax(-1), WEIGHTS, held.removed)
        better = energy.detach() < best[0]
        rows = better.view(-1, 1, 1)
        best = [
            torch.where(better, energy.detach(), best[0]),
            torch.where(rows, pairs.detach(), best[1]),
            torch.where(better.view(-1, 1), label.detach(), best[2]),
        ]
        if step < steps:
            optimizer.zero_grad()
            energy.sum().backward()
            optimizer.step()
    return best[1][..., 1] - best[1][..., 0], best[2]


@pytest.mark.parametrize("corrected", [False, True])
def test_a_descent_goes_where_adam_goes_on_the_plain_definition(corrected: bool) -> None:
    bottleneck, x, terms = problem()
    mask = torch.tensor([[True, False, False], [False, True, True]] + [[False] * 3] * 3) & corrected
    removed = torch.tensor([[False] * 3, [False, False, True]] + [[False] * 3] * 3) & corrected
    held = Held(mask, torch.rand(5, 3, dtype=torch.float64), removed)
    pairs = torch.zeros(5, 3, 2, dtype=torch.float64)
    label = torch.zeros(5, CLASSES, dtype=torch.float64)
    logits, classes = plain_descent(bottleneck, x, held, (pairs, label), steps=25, rate=0.1)
    start = Point(torch.zeros(5, 3, dtype=torch.float64), label)
    weights = every_sample(WEIGHTS, 5)
    found = descend(terms, start, held, weights, bottleneck.activation, steps=25, step_size=0.1)
    torch.testing.assert_close(found.logits[~mask], logits[~mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.classes, classes, atol=1e-4, rtol=1e-4)
    assert found.logits[~mask].abs().min() > 0.1  # it moved


def test_members_of_a_categorical_group_move_by_the_gradient_of_their_softmax() -> None:
    bottleneck, x, terms = problem(GROUPED)
    generator = torch.Generator().manual_seed(1)
    start = Point(
        torch.randn(5, 4, dtype=torch.float64, generator=generator),
        torch.randn(5, CLASSES, dtype=torch.float64, generator=generator),
    )
    logits = start.logits.clone().requires_grad_()
    plain = total_energy(bottleneck, x, bottleneck.activation(logits), start.classes.softmax(-1), WEIGHTS)
    (gradient,) = torch.autograd.grad(plain.sum(), logits)
    weights = every_sample(WEIGHTS, 5)
    moved = descend(terms, start, free(5, 4), weights, bottleneck.activation, steps=1, step_size=1e-3).logits
    # Adam's first step is the sign of the gradient, twice as long for the difference of two logits
    rate = torch.tensor([1e-3, 1e-3, 1e-3, 2e-3], dtype=torch.float64)
    torch.testing.assert_close(moved, start.logits - rate * gradient.sign(), atol=1e-6, rtol=0)


def test_the_best_point_is_kept() -> None:
    bottleneck, _, terms = problem(n=20)
    start = Point(torch.randn(20, 3, dtype=torch.float64) * 3, torch.randn(20, CLASSES, dtype=torch.float64) * 3)
    weights = every_sample(WEIGHTS, 20)
    held = free(20, 3)

    def energy(point: Point) -> Tensor:
        p = mixture(point.logits, held, bottleneck.activation)
        return slopes(terms, p, point.classes.softmax(-1), weights, held.removed, True).energy

    energies = [energy(start)]
    for steps in (0, 1, 5, 20):
        # steps so long that many of them overshoot
        found = descend(terms, start, held, weights, bottleneck.activation, steps=steps, step_size=3.0)
        energies.append(energy(found))
        assert (energies[-1] <= energies[-2] + 1e-12).all()
    torch.testing.assert_close(energies[1], energies[0])
    assert (energies[-1] < energies[0]).all()


def test_labels_that_do_not_exclude_each_other_descend_alone() -> None:
    bottleneck, _, terms = problem()
    start = Point(torch.zeros(5, 3, dtype=torch.float64), torch.zeros(5, CLASSES, dtype=torch.float64))
    weights = every_sample((1.0, 0.0, 0.0), 5)
    options = {"steps": 10, "step_size": 0.1, "exclusive": False}
    found = descend(terms, start, free(5, 3), weights, bottleneck.activation, **options)
    assert torch.equal(found.classes > 0, terms.class_energies() < 0)
