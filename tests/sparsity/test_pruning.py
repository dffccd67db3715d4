from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbm_lightning.sparsity import SparseSolution, keep_largest, keep_top_k, nec


@pytest.fixture
def weight() -> Tensor:
    """``[7, 9]`` with a third of zeros, each class at a scale of its own."""
    drawn = torch.randn(7, 9) * torch.logspace(-1, 1, 7)[:, None]
    return drawn * (torch.rand(7, 9) < 0.67)


def solution(weight: Tensor, group_size: int = 1) -> SparseSolution:
    columns = weight.shape[1]
    return SparseSolution(
        weight,
        torch.arange(len(weight)).float(),
        torch.zeros(columns),
        torch.ones(columns),
        0.1,
        1.0,
        0.0,
        5,
        group_size,
    )


@pytest.mark.parametrize("level", [0, 0.5, 1, 2.6, 4])
def test_as_many_as_asked_for_and_none_that_is_smaller(weight: Tensor, level: float) -> None:
    mask = keep_largest(weight, level)
    assert mask.dtype == torch.bool
    assert int(mask.sum()) == round(7 * level)
    if level:
        assert weight.abs()[mask].min() >= weight.abs()[~mask].max()


def test_one_threshold_for_all_classes_or_one_a_class(weight: Tensor) -> None:
    together, each = keep_largest(weight, 2), keep_top_k(weight, 2)
    assert together[0].sum() == 0
    assert (each.sum(1) == 2).all()
    for row, mask in zip(weight.abs(), each, strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_zeros_are_never_kept(weight: Tensor) -> None:
    there = weight != 0
    assert torch.equal(keep_largest(weight, 9), there)
    assert torch.equal(keep_top_k(weight, 9), there)
    weight[3] = 0.0
    assert keep_top_k(weight, 5)[3].sum() == 0
    assert not keep_largest(torch.zeros(3, 4), 2).any()


def test_of_ties_as_many_stay_as_asked_for() -> None:
    ties = torch.tensor([[1.0, -1.0, 1.0, 0.0], [1.0, 1.0, -1.0, 2.0]])
    for level in (0.5, 1, 1.5, 2, 3, 3.5):
        mask = keep_largest(ties, level)
        assert int(mask.sum()) == round(2 * level)
        assert mask[1, 3]
    assert keep_top_k(ties, 2).sum(1).tolist() == [2, 2]
    assert keep_top_k(ties, 1)[1].tolist() == [False, False, False, True]


def test_concepts_of_several_numbers_are_judged_by_their_length() -> None:
    blocks = torch.zeros(2, 3, 2)
    blocks[0] = torch.tensor([[3.0, 4.0], [4.9, 0.0], [0.0, 0.0]])
    blocks[1] = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.8, 0.7]])
    assert keep_largest(blocks, 1).tolist() == [[True, True, False], [False, False, False]]
    assert keep_largest(blocks, 1.5).tolist() == [[True, True, False], [False, False, True]]
    assert keep_top_k(blocks, 1).tolist() == [[True, False, False], [False, False, True]]
    assert torch.equal(keep_largest(blocks, 3), (blocks != 0).any(2))


def test_a_pruned_solution_keeps_whole_concepts_and_its_biases() -> None:
    full = solution(torch.randn(4, 6), group_size=2)
    assert full.by_concept.shape == (4, 3, 2)
    assert full.nec == 3
    pruned = full.pruned(1.25)
    assert pruned.nec == 1.25
    assert int((pruned.weight != 0).sum()) == 4 * 1.25 * 2
    assert torch.equal(pruned.weight[pruned.weight != 0], full.weight[pruned.weight != 0])
    assert torch.equal(pruned.bias, full.bias)
    assert (pruned.lam, pruned.objective, pruned.kkt, pruned.group_size) == (0.1, 1.0, 0.0, 2)
    assert full.nec == 3


def test_a_level_that_is_no_whole_number_of_weights_is_rounded() -> None:
    weight = torch.randn(7, 9)
    assert nec(weight * keep_largest(weight, 5.1)) == pytest.approx(36 / 7)


def test_what_a_solution_says_of_scores_as_they_came() -> None:
    weight, x = torch.randn(3, 4), torch.randn(5, 4) * 3 + 2
    made = SparseSolution(
        weight, torch.randn(3), x.mean(0), torch.tensor([1.0, 2.0, float("inf"), 0.5]), 0.1, 1.0, 0.0, 5
    )
    standardised = (x - made.mean) / made.scale
    torch.testing.assert_close(made.logits(x), standardised @ weight.T + made.bias, rtol=1e-4, atol=1e-4)
    assert (made.coef[:, 2] == 0).all()


@pytest.mark.parametrize("level", [-1, 4.01, float("nan")])
def test_levels_out_of_range(level: float) -> None:
    weight = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"^nec: .*\[0, 4\]"):
        keep_largest(weight, level)
    with pytest.raises(ValueError, match=r"^nec: .*\[0, 4\]"):
        solution(weight).pruned(level)
    with pytest.raises(ValueError, match=r"^k: .*\[0, 4\]"):
        keep_top_k(weight, level)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5)])
def test_weights_of_another_shape(shape: tuple[int, ...]) -> None:
    for keep in (keep_largest, keep_top_k):
        with pytest.raises(ValueError, match=r"^weight: expected \[L, K\]"):
            keep(torch.randn(shape), 1)


def test_the_mask_lies_where_the_weights_lie_and_takes_no_gradient() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    for mask in (keep_largest(weight, 2), keep_top_k(weight, 2)):
        assert mask.device == weight.device
        assert not mask.requires_grad
        [gradient] = torch.autograd.grad((weight * mask).sum(), weight)
        assert torch.equal(gradient, mask.float())
