"""Drawn gates beside the distribution of Louizos et al. (2018), and the settled gates of evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cbm_lightning.sparsity import HardConcrete

LOG_ALPHA = [-3.0, -1.0, 0.0, 0.7, 3.0]
DRAWS = 200_000
KINDS = [{}, {"temperature": 0.3}, {"temperature": 1.5}, {"stretch": (-0.05, 1.3)}]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gates(log_alpha: list[float] = LOG_ALPHA, **options: Any) -> HardConcrete:
    made = HardConcrete(len(log_alpha), **options)
    with torch.no_grad():
        made.log_alpha.copy_(torch.tensor(log_alpha))
    return made


def above(log_alpha: Tensor, threshold: Tensor, temperature: float, stretch: tuple[float, float]) -> Tensor:
    """Probability that a stretched binary concrete variable exceeds a threshold (their equation 11)."""
    low, high = stretch
    at = (threshold - low) / (high - low)
    return (log_alpha - temperature * at.logit()).sigmoid()


def options_of(kind: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    return kind.get("temperature", 2 / 3), kind.get("stretch", (-0.1, 1.1))


def mean_by_hand(kind: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The mean of each gate, the integral of the probability to exceed a threshold, and its slope by log alpha."""
    thresholds = ((torch.arange(4000) + 0.5) / 4000).double()
    p = above(torch.tensor(LOG_ALPHA).double()[:, None], thresholds, *options_of(kind))
    return p.mean(1), (p * (1 - p)).mean(1)


def drawn(made: HardConcrete) -> Tensor:
    torch.manual_seed(7)
    return made(DRAWS)


def check_shares(found: Tensor, expected: Tensor) -> None:
    """Shares of the draws are within five standard errors of the probabilities."""
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((found - expected).abs() < 5 * error + 1e-5).all(), (found, expected)


# ---------------------------------------------------------------- draws


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_draws_are_distributed_as_in_the_paper(kind: dict[str, Any]) -> None:
    made = gates(**kind)
    z = drawn(made).detach()
    assert z.shape == (DRAWS, len(LOG_ALPHA))
    assert bool(((z >= 0) & (z <= 1)).all())
    temperature, (low, high) = options_of(kind)
    open_by_hand = torch.tensor([sigmoid(a - temperature * math.log(-low / high)) for a in LOG_ALPHA])
    torch.testing.assert_close(made.open_probability(), open_by_hand)
    check_shares((z != 0).float().mean(0), open_by_hand)
    ones = [sigmoid(a - temperature * math.log((1 - low) / (high - 1))) for a in LOG_ALPHA]
    check_shares((z == 1).float().mean(0), torch.tensor(ones))
    for threshold in (0.1, 0.5, 0.9):
        expected = above(torch.tensor(LOG_ALPHA), torch.tensor(threshold), temperature, (low, high))
        check_shares((z > threshold).float().mean(0), expected)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_mean_and_its_slope(kind: dict[str, Any]) -> None:
    made = gates(**kind)
    means = drawn(made).mean(0)
    (slope,) = torch.autograd.grad(means.sum(), made.log_alpha)
    expected, by_log_alpha = mean_by_hand(kind)
    torch.testing.assert_close(means.double(), expected, atol=5e-3, rtol=0)
    # gradients through draws are unbiased
    torch.testing.assert_close(slope.double(), by_log_alpha, atol=5e-3, rtol=0)
    assert means.tolist() == sorted(means.tolist())


def test_draws_are_exactly_0_and_exactly_1() -> None:
    z = drawn(gates())
    for value in (0.0, 1.0):
        assert bool((z == value).any(0).all())
    assert bool(((z > 0) & (z < 1)).any(0).all())


def test_cut_off_draws_pass_no_gradient() -> None:
    made = gates([0.5])
    z = made(64)[:, 0]
    slopes = torch.stack([torch.autograd.grad(one, made.log_alpha, retain_graph=True)[0] for one in z])[:, 0]
    inside = (z > 0) & (z < 1)
    assert 0 < int(inside.sum()) < len(z)
    assert torch.equal(slopes != 0, inside)


def test_the_penalty_closes_gates() -> None:
    made = gates()
    p = made.open_probability()
    (slope,) = torch.autograd.grad(p.sum(), made.log_alpha)
    torch.testing.assert_close(slope, p * (1 - p))
    optimizer = torch.optim.SGD(made.parameters(), lr=20.0)
    for _ in range(20):
        optimizer.zero_grad()
        made.open_probability().sum().backward()
        optimizer.step()
    assert made.settled().tolist() == [0.0] * len(LOG_ALPHA)


def test_each_sample_and_gate_has_a_draw_of_its_own() -> None:
    z = drawn(gates([0.0, 0.0, 0.0])).detach()
    independent = torch.corrcoef(z.T) - torch.eye(3)
    assert independent.abs().max() < 0.02
    assert abs(float(torch.corrcoef(torch.stack([z[1:, 0], z[:-1, 0]]))[0, 1])) < 0.02


def test_draws_follow_the_global_seed() -> None:
    made = gates()
    first, again = (torch.manual_seed(seed) and made(50) for seed in (3, 3))
    assert torch.equal(first, again)
    torch.manual_seed(4)
    assert not torch.equal(first, made(50))


@pytest.mark.parametrize("extreme", [0.0, 1.0])
def test_extreme_noise_gives_finite_gates_and_gradients(extreme: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = gates([-40.0, 0.0, 40.0], temperature=0.01)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, extreme, **options))
    z = made(2)
    assert z.tolist() == [[0.0, extreme, 1.0]] * 2
    z.sum().backward()
    assert bool(made.log_alpha.grad.isfinite().all())


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize("stretch", [(-0.1, 1.1), (-0.05, 1.3)])
def test_evaluation_is_the_formula_without_noise(stretch: tuple[float, float]) -> None:
    low, high = stretch
    made = gates([-9.0, *LOG_ALPHA, 9.0], stretch=stretch).eval()
    before = torch.get_rng_state()
    z = made(3)
    assert torch.equal(torch.get_rng_state(), before)
    expected = [min(max(sigmoid(a) * (high - low) + low, 0.0), 1.0) for a in made.log_alpha.tolist()]
    torch.testing.assert_close(z, torch.tensor(expected).expand(3, -1))
    assert torch.equal(z[0], made.settled())
    assert z[0, 0] == 0.0
    assert z[0, -1] == 1.0
    settled = made.train().settled()
    assert torch.equal(settled, z[0]), "what evaluation will read is known while gates train"


def test_where_a_gate_closes_for_good() -> None:
    # sigmoid(log alpha) * 1.2 - 0.1 <= 0
    edge = math.log((0.1 / 1.2) / (1 - 0.1 / 1.2))
    shut, ajar = gates([edge - 1e-3, edge + 1e-3]).settled().tolist()
    assert shut == 0.0
    assert 0.0 < ajar < 1e-3


# ---------------------------------------------------------------- temperature


def test_cold_draws_are_harder_and_evaluation_stays() -> None:
    made = gates()
    settled, shares = made.settled(), []
    for temperature in (1.0, 0.5, 0.1):
        made.temperature.fill_(temperature)
        z = drawn(made)
        shares.append(float(((z == 0) | (z == 1)).float().mean()))
        check_shares((z != 0).float().mean(0), made.open_probability().detach())
        assert torch.equal(made.settled(), settled)
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < 0.9 < shares[-1]


def test_state_dict_brings_temperature_and_gates_along() -> None:
    source, target = gates(temperature=0.25), HardConcrete(len(LOG_ALPHA))
    assert list(source.state_dict()) == ["log_alpha", "temperature"]
    assert [name for name, _ in source.named_parameters()] == ["log_alpha"]
    target.load_state_dict(source.state_dict())
    assert target.temperature == 0.25
    assert torch.equal(drawn(target), drawn(source))


def test_double_precision() -> None:
    made = gates().double()
    assert {x.dtype for x in (made(3), made.settled(), made.open_probability(), made.temperature)} == {torch.float64}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize("drop", [0.01, 0.2, 0.5, 0.9])
def test_gates_start_closed_with_the_given_probability(drop: float) -> None:
    made = HardConcrete(3, drop=drop, stretch=(-1e-6, 1 + 1e-6), temperature=1e-3)
    torch.testing.assert_close(made.log_alpha.sigmoid(), torch.full((3,), 1 - drop))
    # hardly stretched and very cold, a gate is a coin
    check_shares((drawn(made) < 0.5).float().mean(0), torch.full((3,), drop))


def test_defaults_are_those_of_the_paper() -> None:
    made = HardConcrete(2)
    assert made.log_alpha.tolist() == [0.0, 0.0]
    assert float(made.temperature) == pytest.approx(2 / 3)
    assert (made.low, made.high) == (-0.1, 1.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": 0.0}, r"drop: expected a probability in \(0, 1\), got 0.0"),
        ({"drop": 1.0}, "drop: .* got 1.0"),
        ({"drop": math.nan}, "drop: .* got nan"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": -1.0}, "temperature: .* got -1.0"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"stretch": (0.0, 1.1)}, r"stretch: expected an interval around \[0, 1\], got \(0.0, 1.1\)"),
        ({"stretch": (-0.1, 1.0)}, "stretch: "),
        ({"stretch": (1.1, -0.1)}, "stretch: "),
        ({"stretch": (math.nan, 1.1)}, "stretch: "),
    ],
)
def test_bad_options_name_the_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        HardConcrete(2, **options)
