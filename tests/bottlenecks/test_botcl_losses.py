"""Losses of discovered concepts against loops over pairs, and where the official ones overflow or divide by zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from cbm_lightning.bottlenecks.botcl_losses import (
    active,
    consistency_loss,
    distinctiveness_loss,
    quantization_loss,
    retrieval_loss,
    same_label,
)


def test_retrieval_matches_a_loop_over_pairs() -> None:
    codes, label = 2 * torch.rand(7, 5) - 1, torch.tensor([0, 1, 2, 0, 1, 0, 2])
    alike, apart = [], []
    for i in range(7):
        for j in range(7):
            product = 10 / 32 * float(codes[i] @ codes[j])
            if i != j and label[i] == label[j]:
                alike.append(math.log(1 + math.exp(product)) - product)
            elif i != j:
                apart.append(math.log(1 + math.exp(product)))
    expected = sum(alike) / len(alike) + sum(apart) / len(apart)
    assert float(retrieval_loss(codes, label)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("label", [[0, 0, 0], [0, 1, 2], [0]])
def test_retrieval_of_a_kind_of_pairs_that_is_not_there(label: list[int]) -> None:
    codes = (2 * torch.rand(len(label), 400) - 1).requires_grad_()
    # the official loss overflows from a product of 89 on
    loss = retrieval_loss(codes, torch.tensor(label), scale=1e4)
    loss.backward()
    assert loss.isfinite()
    assert codes.grad.isfinite().all()
    assert (loss == 0) == (len(label) == 1)


def test_what_is_alike_for_each_task() -> None:
    expected = [[True, False, True], [False, True, False], [True, False, True]]
    for label in ([4, 2, 4], [0.0, 1.0, 0.0], [[1.0], [0.0], [1.0]], [[1, 0, 1], [0, 1, 0], [0, 0, 1]]):
        assert same_label(torch.tensor(label)).tolist() == expected
    assert not same_label(torch.zeros(2, 3)).any()


def test_features_of_active_images_match_loops() -> None:
    found, strength = torch.randn(8, 4, 6), torch.rand(8, 4)
    strength[:, 3] = 0.0
    strength[1, 3] = 1.0
    chosen = active(strength)
    kept = [[b for b in range(8) if strength[b, k] > strength[:, k].mean()] for k in range(4)]
    assert kept[3] == [1]
    assert min(len(rows) for rows in kept[:3]) >= 2
    consistent = []
    for k in range(3):
        pairs = [(i, j) for i in kept[k] for j in kept[k] if i != j]
        consistent.append(sum(1 - cosine_similarity(found[i, k], found[j, k], dim=0) for i, j in pairs) / len(pairs))
    torch.testing.assert_close(consistency_loss(found, chosen), sum(consistent) / 3)
    means = [found[rows, k].mean(0) for k, rows in enumerate(kept)]
    pairs = [(k, other) for k in range(4) for other in range(4) if k != other]
    distinct = sum(cosine_similarity(means[k], means[other], dim=0) for k, other in pairs) / len(pairs)
    torch.testing.assert_close(distinctiveness_loss(found, chosen), distinct)


def test_losses_at_their_ends() -> None:
    ones, everything = torch.ones(5, 3, 4), torch.ones(5, 3).bool()
    apart = torch.eye(4)[:3].expand(5, -1, -1)
    assert float(consistency_loss(ones, everything)) == pytest.approx(0, abs=1e-6)
    assert float(distinctiveness_loss(ones, everything)) == pytest.approx(1)
    assert float(distinctiveness_loss(apart, everything)) == 0
    for nothing in (everything & False, active(torch.ones(5, 3))):
        assert float(consistency_loss(ones, nothing)) == float(distinctiveness_loss(ones, nothing)) == 0
    assert float(distinctiveness_loss(ones[:, :1], everything[:, :1])) == 0, "a single concept"
    assert float(quantization_loss(torch.tensor([[1.0, -1.0]]))) == 0
    assert float(quantization_loss(torch.tensor([[0.0, 0.5]]))) == pytest.approx((1 + 0.25) / 2)
