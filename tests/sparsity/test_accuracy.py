"""Label accuracy of many heads at once: against torchmetrics and counts by hand, over batches and processes."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MultilabelAccuracy

from cbm_lightning.sparsity.accuracy import HeadAccuracy

HEADS, SAMPLES, COLUMNS = 4, 37, 5
OUTPUTS = {"multiclass": 3, "binary": 1, "multilabel": 3}
REFERENCES: dict[str, Any] = {
    "multiclass": lambda: MulticlassAccuracy(3, average="micro"),
    "binary": BinaryAccuracy,
    "multilabel": lambda: MultilabelAccuracy(3, average="micro"),
}


def problem(task: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Heads, scores and labels, all drawn."""
    generator = torch.Generator().manual_seed(5)
    outputs = OUTPUTS[task]
    weight = torch.randn(HEADS, outputs, COLUMNS, generator=generator)
    bias = torch.randn(HEADS, outputs, generator=generator)
    values = torch.randn(SAMPLES, COLUMNS, generator=generator)
    shape = (SAMPLES, 3) if task == "multilabel" else (SAMPLES,)
    return weight, bias, values, torch.randint(3 if task == "multiclass" else 2, shape, generator=generator)


@pytest.mark.parametrize("task", OUTPUTS)
def test_it_is_that_of_torchmetrics_head_by_head(task: str) -> None:
    weight, bias, values, label = problem(task)
    metric = HeadAccuracy(weight, bias, task)
    metric.update(values, label)
    found = metric.compute()
    assert found.shape == (HEADS,)
    for r in range(HEADS):
        logits = values @ weight[r].T + bias[r]
        expected = REFERENCES[task]()(logits[:, 0] if task == "binary" else logits, label)
        assert found[r] == pytest.approx(float(expected), abs=1e-6)
    assert len(set(found.tolist())) > 1


def test_several_classes_counted_by_hand() -> None:
    # the first head says the sign of the score, the second always class 2
    weight = torch.tensor([[[-1.0], [1.0], [0.0]], [[0.0], [0.0], [0.0]]])
    bias = torch.tensor([[0.0, 0.0, -9.0], [0.0, 0.0, 1.0]])
    metric = HeadAccuracy(weight, bias)
    metric.update(torch.tensor([[-1.0], [2.0], [3.0], [-4.0], [5.0]]), torch.tensor([0, 1, 0, 2, 2]))
    assert metric.compute().tolist() == pytest.approx([2 / 5, 2 / 5])
    metric.update(torch.tensor([[1.0]]), torch.tensor([1]))
    assert metric.compute().tolist() == pytest.approx([3 / 6, 2 / 6])


@pytest.mark.parametrize("kind", ["index", "column", "float"])
def test_a_binary_label_may_come_as_a_column_or_as_a_float(kind: str) -> None:
    label = torch.tensor([1, 0, 1, 1])
    label = {"index": label, "column": label[:, None], "float": label[:, None].float()}[kind]
    metric = HeadAccuracy(torch.tensor([[[2.0]], [[-2.0]]]), torch.tensor([[1.0], [-1.0]]), "binary")
    # logits 3, -1, 0.5, -3 of the first head, and their opposites
    metric.update(torch.tensor([[1.0], [-1.0], [-0.25], [-2.0]]), label)
    assert metric.compute().tolist() == [0.75, 0.25]


def test_of_several_labels_each_counts() -> None:
    metric = HeadAccuracy(torch.eye(3)[None], torch.zeros(1, 3), "multilabel")
    logits = torch.tensor([[3.0, -1.0, 2.0], [-1.0, -1.0, -1.0]])
    label = torch.tensor([[1, 0, 0], [0, 0, 0]])
    metric.update(logits, label)
    assert metric.compute().reshape(1).tolist() == pytest.approx([5 / 6])
    metric = HeadAccuracy(torch.stack([torch.eye(3), -torch.eye(3)]), torch.zeros(2, 3), "multilabel")
    metric.update(logits, label.float())
    assert metric.compute().tolist() == pytest.approx([5 / 6, 1 / 6])


@pytest.mark.parametrize("task", OUTPUTS)
@pytest.mark.parametrize("size", [1, 7, SAMPLES])
def test_batches_of_any_size_give_the_same(task: str, size: int) -> None:
    weight, bias, values, label = problem(task)
    whole, parts = HeadAccuracy(weight, bias, task), HeadAccuracy(weight, bias, task)
    whole.update(values, label)
    for rows, labels in zip(values.split(size), label.split(size), strict=True):
        parts.update(rows, labels)
    # thirds of a sample are sums in another order
    assert parts.compute().tolist() == pytest.approx(whole.compute().tolist(), abs=1e-7)


def test_a_batch_has_its_own_accuracy_while_all_are_counted() -> None:
    weight, bias, values, label = problem("multiclass")
    metric = HeadAccuracy(weight, bias)
    first = metric(values[:5], label[:5])
    second = metric(values[5:], label[5:])
    torch.testing.assert_close(metric.compute(), (5 * first + 32 * second) / 37)


@pytest.mark.parametrize("task", OUTPUTS)
def test_merged_states_are_those_of_all_samples(task: str) -> None:
    weight, bias, values, label = problem(task)
    whole, one, two = (HeadAccuracy(weight, bias, task) for _ in range(3))
    whole.update(values, label)
    one.update(values[:30], label[:30])
    two.update(values[30:], label[30:])
    one.merge_state(two)
    torch.testing.assert_close(one.compute(), whole.compute())
    assert int(one.total) == SAMPLES


def test_many_small_batches_lose_no_sample() -> None:
    metric = HeadAccuracy(torch.ones(1, 1, 1), torch.zeros(1, 1), "binary")
    # in single precision a sum stands still at 2^24
    metric.correct += 2**24
    metric.total += 2**24
    for _ in range(3):
        metric.update(torch.ones(1, 1), torch.ones(1))
    assert (int(metric.correct), int(metric.total)) == (2**24 + 3, 2**24 + 3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_without_samples_it_is_not_a_number() -> None:
    weight, bias, values, label = problem("multiclass")
    metric = HeadAccuracy(weight, bias)
    assert metric.compute().isnan().all()
    metric.update(values, label)
    before = metric.compute()
    metric.reset()
    assert metric.compute().isnan().all()
    metric.update(values, label)
    assert torch.equal(metric.compute(), before)
    metric.reset()
    metric.update(values[:0], label[:0])
    assert metric.compute().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_other_precisions_are_taken(dtype: torch.dtype) -> None:
    weight, bias, values, label = problem("multiclass")
    metric = HeadAccuracy(weight, bias)
    metric.update(values.to(dtype), label)
    expected = HeadAccuracy(weight, bias)
    expected.update(values.to(dtype).float(), label)
    assert torch.equal(metric.compute(), expected.compute())


def test_the_heads_are_no_state_and_follow_the_metric() -> None:
    weight, bias, *_ = problem("multiclass")
    metric = HeadAccuracy(weight, bias)
    assert metric.state_dict() == {}
    moved = metric.to("meta")
    assert {x.device.type for x in (moved.weight, moved.bias, moved.correct, moved.total)} == {"meta"}


# ---------------------------------------------------------------- processes


def count(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    meet = f"file://{folder / 'meet'}"
    patience = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=2, timeout=patience)
    found = {}
    for task in OUTPUTS:
        weight, bias, values, label = problem(task)
        metric = HeadAccuracy(weight, bias, task)
        rows = slice(0, 30) if rank == 0 else slice(30, None)
        metric.update(values[rows], label[rows])
        found[task] = metric.compute()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32" or not torch.distributed.is_gloo_available(), reason="needs fork and gloo")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_add_up_exactly(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(count, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for task in OUTPUTS:
        weight, bias, values, label = problem(task)
        alone = HeadAccuracy(weight, bias, task)
        alone.update(values, label)
        for found in ranks:
            torch.testing.assert_close(found[task], alone.compute())
