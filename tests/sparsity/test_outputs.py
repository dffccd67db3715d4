"""From the rows of a fitted classifier to those of a head: every number of rows and logits, and classes never seen."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cbm_lightning.sparsity.outputs import fill_rows

VALUES = torch.randn(40, 3, generator=torch.Generator().manual_seed(2))


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.randn(count, generator=generator)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_rows_as_logits_stay(count: int) -> None:
    coef, intercept = rows(count)
    weight, bias = fill_rows(coef, intercept, torch.arange(max(count, 2)), count, VALUES)
    assert torch.equal(weight, coef)
    assert torch.equal(bias, intercept)


def test_one_logit_becomes_two_that_say_the_same() -> None:
    coef, intercept = rows(1)
    weight, bias = fill_rows(coef, intercept, torch.tensor([0, 1]), 2, VALUES)
    assert (weight.shape, bias.shape) == ((2, 3), (2,))
    probs = (VALUES @ weight.T + bias).softmax(-1)
    torch.testing.assert_close(probs[:, 1], (VALUES @ coef.T + intercept).sigmoid()[:, 0])


def test_two_logits_become_one_that_says_the_same() -> None:
    coef, intercept = rows(2)
    weight, bias = fill_rows(coef, intercept, torch.tensor([0, 1]), 1, VALUES)
    assert (weight.shape, bias.shape) == ((1, 3), (1,))
    probs = (VALUES @ coef.T + intercept).softmax(-1)
    torch.testing.assert_close((VALUES @ weight.T + bias).sigmoid()[:, 0], probs[:, 1])


@pytest.mark.parametrize("seen", [[0, 1, 3], [1, 2, 4], [0, 4, 2]])
def test_a_class_without_a_sample_has_no_weights_and_never_wins(seen: list[int]) -> None:
    coef, intercept = rows(3)
    weight, bias = fill_rows(coef, intercept, torch.tensor(seen), 5, VALUES)
    unseen = [label for label in range(5) if label not in seen]
    assert torch.equal(weight[seen], coef)
    assert torch.equal(bias[seen], intercept)
    assert (weight[unseen] == 0).all()
    logits = VALUES @ coef.T + intercept
    assert bias[unseen].tolist() == [logits.min().item()] * 2
    found = VALUES @ weight.T + bias
    assert torch.equal(found.argmax(-1), torch.tensor(seen)[logits.argmax(-1)])
    torch.testing.assert_close(found[:, unseen].amax(-1), logits.min().expand(len(VALUES)))


@pytest.mark.parametrize("seen", [[0, 2], [3, 1]])
def test_one_logit_for_two_classes_of_many(seen: list[int]) -> None:
    coef, intercept = rows(1)
    weight, bias = fill_rows(coef, intercept, torch.tensor(seen), 4, VALUES)
    found = VALUES @ weight.T + bias
    decision = (VALUES @ coef.T + intercept)[:, 0]
    assert torch.equal(found.argmax(-1), torch.where(decision > 0, seen[1], seen[0]))
    two = found[:, seen].softmax(-1)
    torch.testing.assert_close(two[:, 1], decision.sigmoid())
    unseen = [label for label in range(4) if label not in seen]
    assert (weight[unseen] == 0).all()
    assert torch.equal(bias[unseen], found[:, seen].min().expand(2))


@pytest.mark.parametrize("case", [(1, 2), (2, 1), (3, 3), (3, 5), (1, 4)])
def test_the_type_is_that_of_the_samples_and_what_was_given_stays(case: tuple[int, int]) -> None:
    count, outputs = case
    coef, intercept = (part.double() for part in rows(count))
    before = coef.clone(), intercept.clone()
    weight, bias = fill_rows(coef, intercept, torch.arange(max(count, 2)), outputs, VALUES)
    assert (weight.dtype, bias.dtype) == (torch.float32, torch.float32)
    assert (weight.shape, bias.shape) == ((outputs, 3), (outputs,))
    weight.zero_()
    bias.zero_()
    assert torch.equal(coef, before[0])
    assert torch.equal(intercept, before[1])


def fill(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    patience = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=patience)
    shard = VALUES[:7] if rank == 0 else VALUES[7:]
    coef, intercept = rows(3)
    torch.save(fill_rows(coef, intercept, torch.tensor([0, 1, 3]), 5, shard, True), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_lowest_logit_is_that_of_all_processes(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(fill, (tmp_path,), nprocs=2, start_method="fork")
    coef, intercept = rows(3)
    logits = VALUES @ coef.T + intercept
    assert logits[:7].min() != logits[7:].min()
    expected = fill_rows(coef, intercept, torch.tensor([0, 1, 3]), 5, VALUES)
    for rank in (0, 1):
        weight, bias = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(weight, expected[0])
        torch.testing.assert_close(bias, expected[1])
