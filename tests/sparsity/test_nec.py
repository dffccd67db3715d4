from __future__ import annotations

import pytest
import torch

from cbm_lightning.sparsity import Sparsity, nec
from cbm_lightning.sparsity.nec import THRESHOLD, clip_levels, kept

WEIGHT = torch.tensor(
    [
        [1.0, 0.0, -2.0, 0.0, 0.0],
        [0.0, 0.0, 3.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.0, -0.1, 0.2, 0.0],
    ]
)


def test_what_a_head_rests_on() -> None:
    found = Sparsity.of(WEIGHT)
    assert nec(WEIGHT) == found.nec == 6 / 4
    assert found.density == 6 / 20
    assert found.active_concepts == 3
    assert found.max_per_class == 3
    assert found.empty_classes == 1
    assert found.per_class.tolist() == [2, 1, 0, 3]
    assert found.per_class.dtype == torch.int64
    assert found.histogram().tolist() == [1, 1, 1, 1]


def test_the_histogram_counts_every_class_once() -> None:
    weight = torch.randn(50, 20) * (torch.rand(50, 20) < 0.2)
    found = Sparsity.of(weight)
    counts = found.histogram()
    assert len(counts) == found.max_per_class + 1
    assert int(counts.sum()) == 50
    assert int(counts[0]) == found.empty_classes
    assert float((counts * torch.arange(len(counts))).sum()) / 50 == pytest.approx(found.nec)


def test_numbers_to_log() -> None:
    scalars = Sparsity.of(WEIGHT).scalars()
    assert scalars == {"nec": 1.5, "density": 0.3, "active_concepts": 3, "max_per_class": 3, "empty_classes": 1}
    assert all(type(value) is float for value in scalars.values())


def test_a_dense_and_an_empty_head() -> None:
    dense, empty = Sparsity.of(torch.ones(3, 4)), Sparsity.of(torch.zeros(3, 4))
    assert (dense.nec, dense.density, dense.active_concepts, dense.empty_classes) == (4, 1, 4, 0)
    assert (empty.nec, empty.density, empty.active_concepts, empty.empty_classes) == (0, 0, 0, 3)
    assert empty.histogram().tolist() == [3]


def test_a_weight_counts_if_it_is_larger_than_the_threshold() -> None:
    weight = torch.tensor([[1e-6, -2e-5, 0.5, -1e-5]], dtype=torch.float64)
    assert THRESHOLD == 1e-5
    assert kept(weight).tolist() == [[False, True, True, False]]
    assert nec(weight, threshold=0.0) == 4
    assert Sparsity.of(weight, threshold=0.1).per_class.tolist() == [1]


def test_a_concept_of_several_numbers_counts_once() -> None:
    blocks = torch.zeros(2, 3, 4)
    blocks[0, 0, 1], blocks[0, 0, 3], blocks[1, 2, 0] = 1.0, -1.0, 2e-5
    assert kept(blocks).tolist() == [[True, False, False], [False, False, True]]
    assert nec(blocks) == 1
    found = Sparsity.of(blocks)
    assert (found.active_concepts, found.density) == (2, 2 / 6)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 5), (0, 3), (3, 0)])
def test_weights_of_another_shape(shape: tuple[int, ...]) -> None:
    for measure in (kept, nec, Sparsity.of):
        with pytest.raises(ValueError, match=r"^weight: expected \[L, K\]"):
            measure(torch.ones(shape))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(number: float) -> None:
    weight = WEIGHT.clone()
    weight[1, 1] = number
    for measure in (kept, nec, Sparsity.of):
        with pytest.raises(ValueError, match="^weight: expected finite"):
            measure(weight)


def test_levels_are_clipped_to_the_number_of_concepts() -> None:
    protocol = [5, 10, 15, 20, 25, 30]
    assert clip_levels(protocol, 100) == protocol
    assert clip_levels(protocol, 18) == [5, 10, 15, 18]
    assert clip_levels(protocol, 15) == [5, 10, 15]
    assert clip_levels(protocol, 3) == [3]
    assert clip_levels([10, 5, 5, 2.5], 8) == [2.5, 5, 8]
    assert clip_levels((5,), 8) == [5]


@pytest.mark.parametrize("levels", [[], [0, 5], [-1]])
def test_levels_that_are_none(levels: list[float]) -> None:
    with pytest.raises(ValueError, match="^levels: "):
        clip_levels(levels, 10)
