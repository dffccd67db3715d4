from __future__ import annotations

import pytest
import torch

from cbm_lightning.bottlenecks.activation import ConceptActivation
from cbm_lightning.concepts import ConceptSet

MIXED = ConceptSet(
    ["red", "blue", "green", "round", "size"],
    groups={"colour": ["red", "blue", "green"]},
    kinds=["categorical"] * 3 + ["binary", "real"],
)


def test_each_kind_gets_its_own_activation() -> None:
    logits = torch.randn(7, 5) * 30
    probs = ConceptActivation(MIXED)(logits)
    torch.testing.assert_close(probs[:, :3], logits[:, :3].softmax(1))
    torch.testing.assert_close(probs[:, 3], logits[:, 3].sigmoid())
    torch.testing.assert_close(probs[:, 4], logits[:, 4])


def test_log_softmax_is_stable_and_zero_outside_groups() -> None:
    logits = torch.tensor([[1000.0, 999.0, -1000.0, 5000.0, -5000.0]], requires_grad=True)
    logs = ConceptActivation(MIXED).log_softmax(logits)
    torch.testing.assert_close(logs[:, :3], logits[:, :3].log_softmax(1))
    assert logs[0, 3:].tolist() == [0.0, 0.0]
    logs.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_hard_values_pass_the_gradient_straight_through() -> None:
    activation = ConceptActivation(MIXED)
    probs = torch.tensor([[0.3, 0.4, 0.3, 0.2, 7.0]], requires_grad=True)
    hard = activation.harden(probs)
    assert hard.tolist() == [[0.0, 1.0, 0.0, 0.0, 7.0]]
    (hard * torch.arange(5.0)).sum().backward()
    assert probs.grad.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_values_are_exact_and_one_of_equals_wins(dtype: torch.dtype) -> None:
    concepts = ConceptSet(["red", "blue", "round"], {"colour": ["red", "blue"]}, ["categorical"] * 2 + ["binary"])
    hard = ConceptActivation(concepts).harden(torch.rand(500, 3).to(dtype))
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert ConceptActivation(concepts).harden(torch.tensor([[0.5, 0.5, 0.5]], dtype=dtype)).tolist() == [
        [1.0, 0.0, 1.0]
    ]
