"""Estimators of mutual information against slow forms, closed forms and the published code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import digamma
from torch import Tensor

from cbm_lightning.metrics.leakage import entropy, mutual_information
from cbm_lightning.metrics.leakage.mutual_information import (
    continuous_information,
    discrete_information,
    is_discrete,
    jitter,
    mixed_information,
)


def ross_by_hand(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """Ross 2014, sample by sample."""
    kept = [i for i in range(len(x)) if (y == y[i]).sum() > 1]
    total = 0.0
    for i in kept:
        distance = {j: np.linalg.norm(x[i] - x[j]) for j in kept if j != i}
        same = sorted(d for j, d in distance.items() if y[j] == y[i])
        number = min(k, len(same))
        inside = 1 + sum(d < same[number - 1] for d in distance.values())
        total += digamma(len(kept)) + digamma(number) - digamma(len(same) + 1) - digamma(inside)
    return total / len(kept)


def ksg_by_hand(x: np.ndarray, y: np.ndarray, k: int) -> float:
    total = 0.0
    for i in range(len(x)):
        a, b = np.abs(x - x[i]).max(1), np.abs(y - y[i]).max(1)
        radius = sorted(np.maximum(a, b)[np.arange(len(x)) != i])[k - 1]
        near = [sum(d < radius for j, d in enumerate(part) if j != i) for part in (a, b)]
        total += digamma(len(x)) + digamma(k) - digamma(near[0] + 1) - digamma(near[1] + 1)
    return total / len(x)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("neighbours", [1, 3, 7])
def test_mixed_information_is_that_of_ross(width: int, neighbours: int) -> None:
    y = torch.randint(0, 4, (70,))
    y[0] = 9  # nobody else has it
    x = torch.randn(70, width, dtype=torch.float64) + y[:, None]
    found = mixed_information(x, y, neighbours)
    assert found.isnan().nonzero().flatten().tolist() == [0]
    assert found.nanmean().item() == pytest.approx(ross_by_hand(x.numpy(), y.numpy(), neighbours), abs=1e-10)


def test_few_samples_of_a_class_have_fewer_neighbours() -> None:
    y = torch.tensor([0] * 40 + [1, 1])
    x = torch.randn(42, 1, dtype=torch.float64)
    expected = ross_by_hand(x.numpy(), y.numpy(), 3)
    assert mixed_information(x, y, 3).mean().item() == pytest.approx(expected, abs=1e-10)


def test_one_and_many_dimensions_agree() -> None:
    """The fast way along a line and the distances of all pairs; also far from zero, where rounding is coarse."""
    y = torch.randint(0, 3, (300,))
    x = torch.randn(300, 1, dtype=torch.float64) + y[:, None]
    constant = torch.zeros_like(x)
    on_a_plane = mixed_information(torch.cat([x, constant], 1), y)
    torch.testing.assert_close(mixed_information(x, y), on_a_plane)
    generator = torch.Generator().manual_seed(0)
    far = mixed_information(jitter(x + 1e6, generator), y)
    assert far.mean().item() == pytest.approx(on_a_plane.mean().item(), abs=1e-3)


@pytest.mark.parametrize("width", [1, 2])
def test_continuous_information_is_that_of_kraskov(width: int) -> None:
    x = torch.randn(60, width, dtype=torch.float64)
    y = x[:, :1] + 0.5 * torch.randn(60, 1, dtype=torch.float64)
    expected = ksg_by_hand(x.numpy(), y.numpy(), 3)
    assert continuous_information(x, y, 3).mean().item() == pytest.approx(expected, abs=1e-10)


def test_embeddings_count_samples_not_numbers() -> None:
    """Copies of a column change nothing in the maximum norm; the published code counted every number as a sample."""
    x = torch.randn(200, 1, dtype=torch.float64)
    y = x + torch.randn(200, 1, dtype=torch.float64)
    wide = continuous_information(x.expand(-1, 4), y)
    torch.testing.assert_close(wide, continuous_information(x, y))


def test_gaussian_information() -> None:
    x = torch.randn(2000, 1, dtype=torch.float64)
    y = 0.8 * x + 0.6 * torch.randn(2000, 1, dtype=torch.float64)
    assert mutual_information(x, y).mean().item() == pytest.approx(-0.5 * math.log(1 - 0.64), abs=0.05)


def test_discrete_information_is_that_of_counts() -> None:
    from sklearn.metrics import mutual_info_score

    x, y = torch.randint(0, 3, (100,)), torch.randint(0, 4, (100,))
    x[:50] = y[:50] % 3
    assert discrete_information(x, y).mean().item() == pytest.approx(mutual_info_score(x, y), abs=1e-12)
    assert mutual_information(y, y).mean().item() == pytest.approx(entropy(y), abs=1e-12)


def test_kinds_are_told_by_the_numbers() -> None:
    assert is_discrete(torch.tensor([0.0, 1.0, 3.0]))
    assert not is_discrete(torch.tensor([0.0, 0.5]))
    assert is_discrete(torch.full((3, 2), 0.5))
    assert mutual_information(torch.full((4,), 0.3), torch.tensor([0, 0, 1, 1])).tolist() == [0.0] * 4
    x = torch.randint(0, 2, (100, 1)).double()
    soft = x + 0.01 * torch.randn(100, 1)
    assert mutual_information(x, soft).mean().item() == mutual_information(soft, x).mean().item()


def test_saturated_probabilities_are_told_apart_by_noise_of_their_own_scale() -> None:
    """Half of the numbers are equal: without noise no radius would be known. A mean near zero makes no difference."""
    y = torch.randint(0, 2, (400,))
    x = torch.where(torch.rand(400) < 0.5, torch.rand(400), 1.0)
    for shift in (0.0, -x.mean().item()):
        found = mutual_information(x + shift, y).mean().item()
        assert abs(found) < 0.1
    generator = torch.Generator().manual_seed(0)
    noisy = jitter(torch.ones(50, 1, dtype=torch.float64), generator)
    assert (noisy == noisy[0]).all()


def test_nothing_depends_on_the_global_generator() -> None:
    x, y = torch.rand(100), torch.randint(0, 2, (100,))
    state = torch.get_rng_state()
    first = mutual_information(x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(mutual_information(x, y), first)


def test_estimates_of_the_published_code(shared) -> None:
    golden = np.load(shared / "golden" / "dev" / "leakage_mi.npz")

    def estimate(x: str | Tensor, y: Tensor, k: int = 3) -> float:
        given = torch.from_numpy(golden[x]) if isinstance(x, str) else x
        return max(0.0, mutual_information(given, y, k).nanmean().item())

    y = torch.from_numpy(golden["class_labels"])
    x = torch.from_numpy(golden["ksg_cc_y"])
    for k in (3, 5):
        assert estimate("ksg_cc_x", x, k) == pytest.approx(golden[f"ksg_cc_mi_k{k}"].item(), abs=1e-3)
    soft, wide = torch.from_numpy(golden["soft_leaky"]), torch.from_numpy(golden["embedding_nkh"])
    assert estimate(soft[:, 0], y) == pytest.approx(golden["ross_cd_mi_k3_soft_leaky0_vs_y"].item(), abs=1e-3)
    assert estimate(wide[:, 0], y) == pytest.approx(golden["ross_cd_mi_k3_embedding0_vs_y"].item(), abs=1e-3)
    assert entropy(y) == pytest.approx(golden["H_y_nats"].item(), abs=1e-9)
