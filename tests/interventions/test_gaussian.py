"""Concepts that hang together: conditional Gaussians, against SCBM's own numbers and closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussian_problems import COUNTS, official, official_numbers, problem
from golden_models import engine_of, linear_model, mask_after, planned, samples_of
from torch import Tensor

from cbm_lightning import CBMModule
from cbm_lightning.concepts import ConceptSet
from cbm_lightning.interventions import InterventionValues, Policy
from cbm_lightning.interventions.gaussian import condition, stable_cholesky
from cbm_lightning.interventions.values import ConstantValues, OwnValues, PercentileValues, percentiles
from cbm_lightning.types import Prediction

STRATEGIES = ["simple_perc", "emp_perc", "conf_interval_optimal"]


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, Tensor]:
    return official_numbers(shared)


# ---------------------------------------------------------------- the official numbers


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conditional_moments_are_the_official_ones(golden: dict[str, Tensor], strategy: str, count: int) -> None:
    mask, logits = official(golden, strategy, count)
    mean, covariance = condition(golden["mu"], golden["cov"], mask, logits)
    free = ~mask
    pairs = free[:, :, None] & free[:, None, :]
    left = 6 - count
    expected = golden[f"cond_mu__{strategy}__{count}"], golden[f"cond_cov__{strategy}__{count}"]
    torch.testing.assert_close(mean[free].view(12, left), expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(covariance[pairs].view(12, left, left), expected[1], rtol=0, atol=1e-10)
    assert torch.equal(mean[mask], logits[mask])
    assert not covariance[~pairs].any()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sampled_probabilities_are_the_official_ones(golden: dict[str, Tensor], strategy: str, count: int) -> None:
    mask, logits = official(golden, strategy, count)
    mean, covariance = condition(golden["mu"], golden["cov"], mask, logits)
    noise = torch.randn(4000, 12, 6, 1, dtype=torch.float64)
    drawn = mean + (stable_cholesky(covariance) @ noise).squeeze(-1)
    probs = torch.where(mask, golden["concepts"].double(), drawn.sigmoid().mean(0))
    expected = golden[f"mc_mean_probs__{strategy}__{count}"].double()
    torch.testing.assert_close(probs, expected, rtol=0, atol=0.03)


def cbm_of(golden: dict[str, Tensor]) -> tuple[CBMModule, Prediction]:
    data = {"W": golden["W"], "b": golden["b"], "bottleneck": golden["concept_probs"], "group_ids": torch.arange(6)}
    return linear_model(data, "sigmoid")


def test_the_official_uncertainty_policy_is_ucp(golden: dict[str, Tensor]) -> None:
    model, prediction = cbm_of(golden)
    engine = engine_of(model)
    samples = samples_of(prediction, golden["concepts"], torch.zeros(12, dtype=torch.long))
    steps = planned(engine, samples, Policy.make("ucp"))
    for count in range(7):
        assert torch.equal(mask_after(engine, steps, count), golden["masks__prob_unc_static"][count].bool())


def fitted(golden: dict[str, Tensor], name: str) -> InterventionValues:
    values = {"percentile": ConstantValues(), "empirical": PercentileValues(), "hard": OwnValues()}[name]
    values.build(ConceptSet.make(6))
    values.fit(golden["train_concept_probs"].logit(), golden["concepts"].float())
    return values


def test_percentiles_of_training_probabilities_are_the_official_ones(golden: dict[str, Tensor]) -> None:
    found = percentiles(golden["train_concept_probs"], (0.05, 0.95))
    torch.testing.assert_close(found, golden["empirical_percentiles_5_95"], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "atol"), [("percentile", 1e-6), ("empirical", 1e-3), ("hard", 0.0)])
def test_corrected_probabilities_of_a_plain_bottleneck(golden: dict[str, Tensor], name: str, atol: float) -> None:
    model, prediction = cbm_of(golden)
    mask = golden["masks__prob_unc_static"][3].bool()
    correction = fitted(golden, name).correction(prediction.concepts, golden["concepts"].float(), mask)
    corrected = model.intervene(prediction, correction).concepts
    # the official percentiles are interpolated between probabilities, ours between logits
    expected = golden[f"cbm_intervened_probs__{name}"]
    torch.testing.assert_close(corrected.values[mask], expected[mask], rtol=0, atol=atol)
    torch.testing.assert_close(corrected.probs, corrected.values)
    torch.testing.assert_close(corrected.values[~mask], golden["concept_probs"][~mask])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("strategy", "name", "atol"), [("simple_perc", "percentile", 1e-6), ("emp_perc", "empirical", 0.05)]
)
def test_intervened_logits(golden: dict[str, Tensor], strategy: str, name: str, atol: float, count: int) -> None:
    mask, expected = official(golden, strategy, count)
    _, prediction = cbm_of(golden)
    found = fitted(golden, name).correction(prediction.concepts, golden["concepts"].float(), mask).logits
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=0, atol=atol)


# ---------------------------------------------------------------- conditional moments


def test_two_concepts_in_closed_form() -> None:
    mean, covariance = torch.tensor([[1.0, -2.0]]), torch.tensor([[[4.0, 1.5], [1.5, 2.0]]])
    found = condition(mean, covariance, torch.tensor([[False, True]]), torch.tensor([[torch.nan, 1.0]]))
    # regression of the first on the second: slope 1.5 / 2, what is left 4 - 1.5^2 / 2
    assert found[0].tolist() == [[pytest.approx(1.0 + 0.75 * 3.0), 1.0]]
    assert found[1].tolist() == [[[pytest.approx(2.875), 0.0], [0.0, 0.0]]]
    assert found[0].dtype == found[1].dtype == torch.float64


def test_nobody_corrects_and_all_is_corrected() -> None:
    mean, covariance, _, _ = problem(5, 4)
    nothing = torch.full_like(mean, torch.nan)
    found = condition(mean, covariance, torch.zeros(5, 4, dtype=torch.bool), nothing)
    assert torch.equal(found[0], mean)
    torch.testing.assert_close(found[1], covariance, rtol=0, atol=1e-14)
    told = torch.randn(5, 4, dtype=torch.float64)
    found = condition(mean, covariance, torch.ones(5, 4, dtype=torch.bool), told)
    assert torch.equal(found[0], told)
    assert not found[1].any()
    found = condition(mean[:0], covariance[:0], torch.zeros(0, 4, dtype=torch.bool), nothing[:0])
    assert found[0].shape == (0, 4)


def test_a_partner_moves_along() -> None:
    mean, covariance = torch.zeros(2, 3), torch.eye(3).repeat(2, 1, 1)
    covariance[:, 0, 1] = covariance[:, 1, 0] = 0.8
    covariance[:, 0, 2] = covariance[:, 2, 0] = -0.5
    mask, told = torch.tensor([[True, False, False]] * 2), torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    found, left = condition(mean, covariance, mask, told)
    torch.testing.assert_close(found[0].float(), torch.tensor([2.0, 1.6, -1.0]))
    torch.testing.assert_close(found[1], -found[0])
    assert (left[:, 1, 1] < 1).all()
    assert (left[:, 2, 2] < 1).all()


def test_one_after_another_is_all_at_once() -> None:
    mean, covariance, _, _ = problem(6, 5)
    told = torch.randn(6, 5, dtype=torch.float64)
    first, both = torch.zeros(6, 5, dtype=torch.bool), torch.zeros(6, 5, dtype=torch.bool)
    first[:, 3] = both[:, 3] = both[:, 1] = True
    # a concept without variance left explains nothing more, so only the second one is conditioned on
    step = condition(*condition(mean, covariance, first, told), both & ~first, told)
    at_once = condition(mean, covariance, both, told)
    torch.testing.assert_close(step[0], at_once[0])
    torch.testing.assert_close(step[1], at_once[1])


def test_each_sample_has_corrections_of_its_own() -> None:
    mean, covariance, mask, _ = problem(12, 5)
    told = torch.randn(12, 5, dtype=torch.float64).masked_fill(~mask, torch.nan)
    before = mean.clone(), covariance.clone(), mask.clone()
    together = condition(mean, covariance, mask, told)
    for b in range(12):
        one = slice(b, b + 1)
        alone = condition(mean[one], covariance[one], mask[one], told[one])
        for found, expected in zip(alone, together, strict=True):
            torch.testing.assert_close(found[0], expected[b])
            assert expected[b].isfinite().all()
    assert all(map(torch.equal, before, (mean, covariance, mask)))


def test_concepts_that_cannot_be_told_apart() -> None:
    # the first two concepts are one and the same, the fourth never varies
    direction = torch.tensor([1.0, 1.0, 0.5, 0.0])
    covariance = (direction[:, None] * direction + torch.diag(torch.tensor([0.0, 0.0, 0.3, 0.0]))).unsqueeze(0)
    mask = torch.tensor([[True, True, False, True]])
    mean, left = condition(torch.zeros(1, 4), covariance, mask, torch.tensor([[2.0, 2.0, 0.0, 1.0]]))
    torch.testing.assert_close(mean.float(), torch.tensor([[2.0, 2.0, 1.0, 1.0]]), rtol=0, atol=1e-4)
    torch.testing.assert_close(left[0, 2, 2].item(), 0.3, rtol=0, atol=1e-4)


def test_what_is_wholly_explained_keeps_no_negative_variance() -> None:
    # the second concept is a multiple of the first, up to rounding on either side
    factor = torch.randn(500, 2, 1, dtype=torch.float64)
    mask = torch.tensor([True, False]).expand(500, 2)
    _, left = condition(torch.zeros(500, 2), factor @ factor.mT, mask, torch.zeros(500, 2))
    assert (left.diagonal(dim1=-2, dim2=-1) >= 0).all()
    assert left.abs().max() < 1e-12


@pytest.mark.parametrize("entry", [float("nan"), float("inf"), 5.0])
def test_what_is_no_covariance_is_refused(entry: float) -> None:
    covariance = torch.eye(3).repeat(4, 1, 1)
    covariance[2, 0, 1] = covariance[2, 1, 0] = entry
    mask = torch.tensor([True, True, False]).expand(4, 3)
    with pytest.raises(ValueError, match=r"covariance: .* samples \[2\]"):
        condition(torch.zeros(4, 3), covariance, mask, torch.zeros(4, 3))
